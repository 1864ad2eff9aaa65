"""What became of each row: a line in the part file of the worker that made it, and one file of all rows in the end.

A line of a part file is the row's number, a tab, and the line that will stand in the output; a row that could not be
asked has a `!` before an object with line and reason. A last line without its end (the worker was killed) is none.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data.formats import Row
from models.generation import Completion
from trainer.inference.index import BadLine

DIGITS = 5
"""Behind the point of a log-probability."""


def result_of(row: Row, made: Sequence[Completion]) -> Row:
    """The row with what was written: text, finish and the number of tokens, or a list of them if there are samples.

    A key of the row that has such a name is kept as `input_<name>`.
    """
    parts = [_part(each) for each in made]
    new: dict[str, Any] = {"samples": parts} if len(parts) > 1 else parts[0]
    new = {**new, "prompt_tokens": len(made[0].prompt_tokens)}
    kept = {f"input_{name}" if name in new else name: value for name, value in row.items()}
    return {**kept, **new}


def _part(made: Completion) -> Row:
    part: Row = {"text": made.text, "finish": made.finish, "tokens": len(made.tokens)}
    if made.score is not None:
        part["score"] = round(made.score, DIGITS)
    for name in ("log_probs", "model_log_probs"):
        values = getattr(made, name)
        if values is not None:
            part[name] = [round(value, DIGITS) for value in values]
    return part


class Part:
    """The part file of one worker."""

    def __init__(self, path: Path) -> None:
        self._stream = path.open("ab")

    def write(self, number: int, result: Row | BadLine) -> None:
        """Add what became of a row."""
        if isinstance(result, BadLine):
            content = b"!" + encoded({"line": result.line, "reason": result.reason})
        else:
            content = encoded(result)
        self._stream.write(b"%d\t%s\n" % (number, content))
        self._stream.flush()

    def keep(self) -> None:
        """Have what is written survive the machine."""
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        """No more comes."""
        self._stream.close()


def encoded(row: Mapping[str, Any]) -> bytes:
    """A row as JSON on one line."""
    try:
        return json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:  # half a surrogate pair somewhere in what was given
        return json.dumps(row).encode("ascii")


@dataclass(frozen=True)
class Piece:
    """One whole line of a part file."""

    number: int
    start: int
    """Byte at which the result begins, behind the tab and the `!`."""
    stop: int
    bad: bool


def pieces(path: Path) -> Iterator[Piece]:
    """The whole lines of a part file."""
    at = 0
    with path.open("rb") as stream:
        for line in stream:
            start, at = at, at + len(line)
            number, tab, rest = line[:24].partition(b"\t")
            if line.endswith(b"\n") and tab and number.isdigit():
                bad = rest.startswith(b"!")
                yield Piece(int(number), start + len(number) + 1 + bad, at, bad)


@dataclass(frozen=True)
class Made:
    """Where the result of each row lies; the first one counts where two workers made it."""

    files: tuple[Path, ...]
    file_N: np.ndarray
    """int32: number of the file, -1 = there is no result yet."""
    start_N: np.ndarray
    stop_N: np.ndarray
    bad_N: np.ndarray
    """bool"""

    @staticmethod
    def read(files: Iterable[Path], count: int) -> Made:
        """Look through the part files."""
        made = Made(
            tuple(files),
            np.full(count, -1, np.int32),
            np.zeros(count, np.int64),
            np.zeros(count, np.int64),
            np.zeros(count, bool),
        )
        for number, path in enumerate(made.files):
            for piece in pieces(path):
                if piece.number < count and made.file_N[piece.number] < 0:
                    made.file_N[piece.number] = number
                    made.start_N[piece.number], made.stop_N[piece.number] = piece.start, piece.stop
                    made.bad_N[piece.number] = piece.bad
        return made

    def missing(self) -> np.ndarray:
        """Rows without a result."""
        return np.flatnonzero(self.file_N < 0)

    def copy(self, out: BinaryIO, bad: list[BadLine]) -> int:
        """Write the results in the order of the rows and gather the bad ones; gives the number written."""
        streams = [path.open("rb") for path in self.files]
        written = 0
        try:
            for number in range(len(self.file_N)):
                stream = streams[self.file_N[number]]
                stream.seek(self.start_N[number])
                content = stream.read(int(self.stop_N[number] - self.start_N[number]))
                if self.bad_N[number]:
                    bad.append(BadLine(**json.loads(content)))
                else:
                    out.write(content)
                    written += 1
        finally:
            for stream in streams:
                stream.close()
        return written
