"""What a cache keeps of each sample besides its tokens, for preferences and prompts: two files beside those of a shard.

0000.notes.npy           one NOTE record a sample
0000.rows.jsonl          prompts only: {text, messages, fields} of each sample, a line each
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from data.encode import Encoded, Prepared

NOTE = np.dtype(
    [
        ("split", "<i8"),  # tokens of the first document; the rest is the second's
        ("value", "<f8"),  # margin of a pair (NaN: none), label of a judged answer
        ("fault", "<i4"),  # why the sample is of no use: FINE, EQUAL or EMPTY
        ("file", "<i4"),  # number of the source's file
        ("line", "<i8"),  # of the row in the file, from 1
        ("row", "<i8"),  # where its line in rows.jsonl begins; -1 without one
    ]
)

FINE, EQUAL, EMPTY = range(3)

BLOCK = 4096
"""Notes that are kept as Python objects at a time."""


@dataclass(frozen=True)
class Note:
    """Where a sample stands in its source, its number, and the line to keep of a prompt."""

    file: int
    line: int
    value: float = float("nan")
    row: dict[str, Any] | None = None


class NoteWriter:
    """Writes the two files of one shard."""

    def __init__(self, stem: str) -> None:
        self._stem = stem
        self._full: list[np.ndarray] = []
        self._notes: list[tuple[int, float, int, int, int, int]] = []
        self._rows = create(f"{stem}.rows.jsonl")
        self._at = 0

    def add(self, documents: tuple[Prepared, ...], encoded: list[Encoded], note: Note) -> None:
        """Append one sample: its documents, their tokens, its note."""
        row = -1
        if note.row is not None:
            line = json.dumps(note.row, default=str).encode() + b"\n"
            self._rows.write(line)
            row, self._at = self._at, self._at + len(line)
        fault = FINE if note.row is not None else _fault(documents, encoded)
        self._notes.append((len(encoded[0].tokens_L), note.value, fault, note.file, note.line, row))
        if len(self._notes) == BLOCK:
            self._full.append(np.array(self._notes, dtype=NOTE))
            self._notes = []

    def close(self) -> list[str]:
        """Finish and flush; the names of the files."""
        with open(f"{self._stem}.notes.npy", "wb") as stream:
            np.save(stream, np.concatenate([*self._full, np.array(self._notes, dtype=NOTE)]))
            stream.flush()
            os.fsync(stream.fileno())
        self._rows.flush()
        os.fsync(self._rows.fileno())
        self._rows.close()
        return ["notes.npy", "rows.jsonl"]

    def abandon(self) -> None:
        """Close the files of a build that failed."""
        self._rows.close()


def create(path: str) -> BinaryIO:
    """A file to write whose owner closes it."""
    return open(path, "wb")


def read_row(stream: BinaryIO, at: int) -> dict[str, Any]:
    """The kept line that begins at byte `at`."""
    stream.seek(at)
    return json.loads(stream.readline())


def _fault(documents: tuple[Prepared, ...], encoded: list[Encoded]) -> int:
    if len(encoded) == 2 and np.array_equal(encoded[0].tokens_L, encoded[1].tokens_L):
        return EQUAL
    if any(document.blank for document in documents) or any(not made.learn_L[1:].any() for made in encoded):
        return EMPTY
    return FINE
