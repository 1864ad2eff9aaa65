"""Between the shared folder and a backend: rows are claimed and become requests, texts become lines."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

from data.formats import Row, RowError
from models.generation import Completion, Request
from trainer.inference.claims import Claim, Claims
from trainer.inference.index import BadLine, Index, parsed
from trainer.inference.prompts import Asking, Prompter
from trainer.inference.results import Part, pieces, result_of
from trainer.inference.workplace import Workplace

POLL_S = 0.5
"""Between two looks for chunks that have become free."""


@dataclass
class Open:
    """A chunk that is being worked on."""

    claim: Claim
    left: int
    """Rows without a result."""


@dataclass
class Asked:
    """A row that a backend has."""

    number: int
    row: Row
    chunk: Open
    samples: int
    made: list[Completion]


@dataclass(frozen=True)
class Done:
    """What became of a row: `tokens` new ones, or it was bad."""

    tokens: int
    bad: bool


class Desk:
    """One worker's.

    Args:
        part: where its results go.
        tell: is called for each row that is done.
        share: most rows it has at one time, so that others have some too.
    """

    def __init__(
        self,
        place: Workplace,
        index: Index,
        claims: Claims,
        asking: Asking,
        prompter: Prompter,
        stream: BinaryIO,
        part: Part,
        tell: Callable[[Done], None],
        share: int,
    ) -> None:
        self.place, self.index, self.claims, self.asking, self.prompter = place, index, claims, asking, prompter
        self.stream, self.part, self.tell, self.share = stream, part, tell, share
        self._waiting: deque[tuple[int, Open]] = deque()
        self._asked: dict[int, Asked] = {}
        self._count = 0
        self._look_at = 0.0

    def take(self, room: int, idle: bool) -> list[Request] | None:
        """As `backend.Take`."""
        found: list[Request] = []
        while room > 0 and len(self._asked) < self.share and (free := self._next_row()) is not None:
            request = self._request(*free)
            if request is not None:
                found.append(request)
                room -= request.sampling.samples
        if found or not idle:
            return found
        if not self.claims.open():
            return None
        time.sleep(POLL_S)
        return []

    def put(self, made: Completion) -> None:
        """Take a text that has ended; a row is written when it has all its samples."""
        asked = self._asked[made.prompt]
        asked.made.append(made)
        if made.finish == "error":
            del self._asked[made.prompt]
            self._bad(asked.number, asked.chunk, made.error)
        elif len(asked.made) == asked.samples:
            del self._asked[made.prompt]
            texts = sorted(asked.made, key=lambda each: each.sample)
            self.part.write(asked.number, result_of(asked.row, texts))
            self._done(asked.chunk, Done(sum(len(each.tokens) for each in texts), bad=False))

    def _next_row(self) -> tuple[int, Open] | None:
        while not self._waiting:
            if time.monotonic() < self._look_at:
                return None
            claim = self.claims.claim()
            if claim is None:
                self._look_at = time.monotonic() + POLL_S
                return None
            made = {number for owner in claim.before for number in self._made_by(owner.name)}
            rows = [number for number in self.place.rows_of(claim.chunk, self.index) if number not in made]
            chunk = Open(claim, len(rows))
            self._waiting += [(number, chunk) for number in rows]
            if not rows:
                self.claims.finish(claim)
        return self._waiting.popleft()

    def _made_by(self, worker: str) -> Iterator[int]:
        path = self.place.part(worker)
        return (piece.number for piece in pieces(path)) if path.is_file() else iter(())

    def _request(self, number: int, chunk: Open) -> Request | None:
        """The request of a row; None where it is a bad one."""
        self.stream.seek(self.index.offset_N[number])
        try:
            row = parsed(self.stream.readline())
            request = self.prompter.request(self.asking.asked(row, int(self.index.line_N[number])))
        except RowError as error:
            self._bad(number, chunk, str(error))
            return None
        self._asked[self._count] = Asked(number, row, chunk, request.sampling.samples, [])
        self._count += 1
        return request

    def _bad(self, number: int, chunk: Open, reason: str) -> None:
        self.part.write(number, BadLine(int(self.index.line_N[number]), reason))
        self._done(chunk, Done(0, bad=True))

    def _done(self, chunk: Open, what: Done) -> None:
        chunk.left -= 1
        if not chunk.left:
            self.part.keep()
            self.claims.finish(chunk.claim)
        self.tell(what)
