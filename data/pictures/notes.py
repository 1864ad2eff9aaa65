"""What a token cache keeps of pictures: where each stands in its sample, its size, and how to find it again.

0000.pictures.npy        one PICTURE record a picture, in the order of samples and of their tokens
0000.pictures.bin        paths and encoded pictures, one after another; the records say where
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from data.pictures.rows import Reference

PICTURE = np.dtype(
    [
        ("sample", "<i8"),  # of the shard
        ("start", "<i8"),  # its first token, counted from the sample's first
        ("tokens", "<i4"),  # that stand for its features
        ("before", "<i4"),  # tokens before and behind them that belong to the picture
        ("after", "<i4"),
        ("width", "<i4"),  # pixels
        ("height", "<i4"),
        ("patches", "<i4"),  # of all its tiles
        ("at", "<i8"),  # first byte of its path or content in pictures.bin
        ("size", "<i8"),
        ("inline", "<i4"),  # 1: content, 0: path
        ("file", "<i4"),  # of the row, to name it
        ("line", "<i8"),
        ("shard", "<i4"),  # set when the cache is opened
    ]
)


@dataclass(frozen=True)
class Seen:
    """A picture that was looked at: where it is, its size, and how many tokens and patches it becomes."""

    where: Reference
    width: int
    height: int
    tokens: int
    patches: int


class PictureWriter:
    """Writes the two files of one shard; there are none for a shard without pictures."""

    def __init__(self, stem: str) -> None:
        self._stem = stem
        self._records: list[tuple[int, ...]] = []
        self._stream: BinaryIO | None = None
        self._at = 0

    def add(
        self, sample: int, seen: Seen, start: int, around: tuple[int, int], place: tuple[int, int]
    ) -> None:  # fmt: skip
        """Append a picture of a sample; `around` are the tokens before and behind its own that belong to it, `place`
        the row's file and line."""
        if self._stream is None:
            self._stream = open(f"{self._stem}.pictures.bin", "wb")  # noqa: SIM115 - closed in close or abandon
        inline = seen.where.content is not None
        content = seen.where.content if seen.where.content is not None else os.fsencode(seen.where.path or "")
        self._stream.write(content)
        sizes = (seen.width, seen.height, seen.patches)
        record = (sample, start, seen.tokens, *around, *sizes, self._at, len(content), int(inline), *place, 0)
        self._records.append(record)
        self._at += len(content)

    def close(self) -> list[str]:
        """Finish and flush; the names of the files."""
        if self._stream is None:
            return []
        with open(f"{self._stem}.pictures.npy", "wb") as stream:
            np.save(stream, np.array(self._records, dtype=PICTURE))
            stream.flush()
            os.fsync(stream.fileno())
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        return ["pictures.npy", "pictures.bin"]

    def abandon(self) -> None:
        """Close the file of a build that failed."""
        if self._stream is not None:
            self._stream.close()


class PictureNotes:
    """The pictures of a cache, ordered by sample and place."""

    def __init__(self, stems: list[str], first_S: np.ndarray) -> None:
        """
        Args:
            stems: of each shard's files.
            first_S: number of each shard's first sample.
        """
        self._stems = stems
        parts = []
        for shard, stem in enumerate(stems):
            if os.path.exists(f"{stem}.pictures.npy"):
                part = np.load(f"{stem}.pictures.npy")
                part["sample"] += first_S[shard]
                part["shard"] = shard
                parts.append(part)
        self.records = np.concatenate([np.zeros(0, dtype=PICTURE), *parts])

    def __len__(self) -> int:
        return len(self.records)

    def of(self, sample: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """The records of a sample's pictures whose tokens lie in [start, stop)."""
        records = self.records
        first, last = np.searchsorted(records["sample"], [sample, sample + 1])
        mine = records[first:last]
        return mine[(mine["start"] >= start) & ((mine["start"] < stop) if stop is not None else True)]

    def where(self, record: np.void) -> Reference:
        """Where the picture of a record is."""
        with open(f"{self._stems[record['shard']]}.pictures.bin", "rb") as stream:
            stream.seek(int(record["at"]))
            content = stream.read(int(record["size"]))
        return Reference(content=content) if record["inline"] else Reference(path=os.fsdecode(content))
