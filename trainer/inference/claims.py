"""Rows dealt out to workers of any machine by files that only one of them can make.

The rows, in the order of the work, are cut into chunks. Whoever makes the file `<chunk>.0` works on that chunk, and
makes `<chunk>.done` in the end. If its worker has died, whoever makes `<chunk>.1` goes on with what is left, and so on.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from trainer.inference.sessions import Owner, Sessions

YOUNG_S = 10.0
"""A claim without a name in it is just being made, unless it is older."""


@dataclass(frozen=True)
class Claim:
    """A chunk that is this worker's."""

    chunk: int
    attempt: int
    before: tuple[Owner, ...] = ()
    """Those who had it and died."""


class Claims:
    """The claims of a folder, seen by one worker.

    Args:
        folder: where the files are; it exists.
        count: chunks there are.
    """

    def __init__(self, folder: Path, count: int, sessions: Sessions, owner: Owner) -> None:
        self.folder, self.count, self.sessions, self.owner = folder, count, sessions, owner
        self._next = 0
        """Chunks before it have been claimed by someone."""
        self._looked = False

    def claim(self) -> Claim | None:
        """The next free chunk, unfinished ones first. None if there is none now: who has one may die."""
        if not self._looked:
            claim = self._orphan()
            self._looked = claim is None
            if claim is not None:
                return claim
        while self._next < self.count:
            chunk, self._next = self._next, self._next + 1
            if self._make(chunk, 0):
                return Claim(chunk, 0)
        return self._orphan()

    def finish(self, claim: Claim) -> None:
        """Say that the chunk's rows are all written."""
        (self.folder / f"{claim.chunk}.done").touch()

    def open(self) -> dict[int, int]:
        """Chunks that are not finished, and how often each was claimed."""
        found: dict[int, int] = dict.fromkeys(range(self.count), 0)
        done: set[int] = set()
        if not self.folder.exists():
            return {}
        for name in os.listdir(self.folder):
            chunk, _, attempt = name.partition(".")
            if attempt == "done":
                done.add(int(chunk))
            else:
                found[int(chunk)] = max(found[int(chunk)], int(attempt) + 1)
        return {chunk: attempts for chunk, attempts in found.items() if chunk not in done}

    def _orphan(self) -> Claim | None:
        """A chunk whose worker has died."""
        for chunk, attempts in sorted(self.open().items()):
            owners = [self._owner(chunk, attempt) for attempt in range(attempts)]
            if not owners or self._lives(chunk, attempts - 1, owners[-1]):
                continue
            if self._make(chunk, attempts):
                return Claim(chunk, attempts, tuple(owner for owner in owners if owner is not None))
        return None

    def _make(self, chunk: int, attempt: int) -> bool:
        """Make a claim's file; False if another was faster."""
        try:
            made = os.open(self.folder / f"{chunk}.{attempt}", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except (FileExistsError, FileNotFoundError):  # the folder is gone when all is done
            return False
        with open(made, "w") as stream:
            stream.write(self.owner.name)
        return True

    def _owner(self, chunk: int, attempt: int) -> Owner | None:
        """Who made a claim; None if the file has no name in it, or is gone."""
        try:
            return Owner.of((self.folder / f"{chunk}.{attempt}").read_text())
        except (OSError, ValueError):
            return None

    def _lives(self, chunk: int, attempt: int, owner: Owner | None) -> bool:
        if owner is not None:
            return self.sessions.alive(owner)
        try:
            age = self.sessions.now() - (self.folder / f"{chunk}.{attempt}").stat().st_mtime
        except OSError:  # the folder is being removed
            return True
        return age < YOUNG_S
