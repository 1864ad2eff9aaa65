"""A file of rows, read once before the work: where each row lies, in which order they are worked on, what is no row."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.formats import Row, RowError
from data.readers import json_row, kind_of_suffix
from trainer.inference.prompts import Asked


@dataclass(frozen=True)
class BadLine:
    """A line that cannot be asked, from 1."""

    line: int
    reason: str


@dataclass(frozen=True)
class Index:
    """The rows of a file, by their number among those that can be asked (from 0, in the order of the file)."""

    offset_N: np.ndarray
    """int64: byte at which a row's line starts."""
    line_N: np.ndarray
    """int64: number of its line, from 1."""
    order_N: np.ndarray
    """int64: the rows as they are worked on, those with most work first, so that nothing long is left for the end."""
    digest: str
    """Of the file's content."""

    def __len__(self) -> int:
        return len(self.offset_N)

    def save(self, file: Path) -> None:
        """Write it."""
        np.savez(file, offset=self.offset_N, line=self.line_N, order=self.order_N, digest=np.array(self.digest))

    @staticmethod
    def load(file: Path) -> Index:
        """Read what `save` wrote."""
        with np.load(file) as saved:
            return Index(saved["offset"], saved["line"], saved["order"], str(saved["digest"]))


def check_data(path: Path) -> None:
    """That there is a file of rows.

    Raises:
        ValueError: there is none.
    """
    if not path.is_file():
        raise ValueError(f"--data {path}: {'is a folder; name a file' if path.is_dir() else 'there is no such file'}")
    if kind_of_suffix(path.name) not in (None, "jsonl"):
        raise ValueError(f"--data {path}: the rows must be JSON lines; write one JSON object a line into a .jsonl file")
    try:
        path.open("rb").close()
    except OSError as error:
        raise ValueError(f"--data {path}: cannot be read ({error.strerror})") from error


def read_index(path: Path, ask: Callable[[Row, int], Asked], show: bool = True) -> tuple[Index, list[BadLine]]:
    """Read every row once. Blank lines are no rows.

    Args:
        ask: as `Asking.asked`.
        show: a progress bar, if it takes long.
    """
    offsets, lines, work, bad = [], [], [], []
    digest, at = hashlib.blake2b(digest_size=16), 0
    bar = tqdm(total=path.stat().st_size, desc="reading", unit="B", unit_scale=True, disable=not show, delay=2)
    with path.open("rb") as stream, bar:
        for number, line in enumerate(stream, 1):
            digest.update(line)
            if line.strip():
                try:
                    asked = ask(parsed(line), number)
                    offsets.append(at)
                    lines.append(number)
                    work.append(asked.work * asked.sampling.samples)
                except RowError as error:
                    bad.append(BadLine(number, str(error)))
            at += len(line)
            bar.update(len(line))
    order = np.argsort(-np.array(work, dtype=np.int64), kind="stable")
    return Index(np.array(offsets, np.int64), np.array(lines, np.int64), order, digest.hexdigest()), bad


def digest_of(path: Path) -> str:
    """The digest that `read_index` gives of a file's content."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as stream:
        while block := stream.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def parsed(line: bytes) -> Row:
    """The row of a line.

    Raises:
        RowError: it is not JSON, not UTF-8, or no object.
    """
    row, reason = json_row(line)
    if row is None:
        raise RowError(reason)
    return row
