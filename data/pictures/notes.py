"""What a token cache keeps of pictures: where each stands in its sample, its size, and how to find it again.

0000.pictures.npy        one PICTURE record a picture, in the order of samples and of their tokens
0000.pictures.bin        paths, encoded pictures and lists of frames, one after another; the records say where
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from data.pictures.references import Reference

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
        ("inline", "<i4"),  # what lies there: PATH, CONTENT or FRAMES, of a video + VIDEO
        ("file", "<i4"),  # of the row, to name it
        ("line", "<i8"),
        ("shard", "<i4"),  # set when the cache is opened
        ("frames", "<i4"),  # that were taken of its video; 0: it is a picture
        ("frame", "<i4"),  # which of them it is, where each is a picture of its own; else 0: it is all of them
        ("seconds", "<f8"),  # from one of them to the next; 0 where nothing says it
    ]
)
SIZES = ("width", "height", "tokens", "patches", "frames", "frame")
PATH, CONTENT, FRAMES, VIDEO = 0, 1, 2, 4


@dataclass(frozen=True)
class Seen:
    """A picture that was looked at, a whole video (native mode), or a frame of one: where it is, its size, and how many
    tokens and patches it becomes."""

    where: Reference
    width: int
    height: int
    tokens: int
    patches: int
    frames: int = 0
    """Of the video, as many as were taken; 0: it is a picture."""
    frame: int = 0
    """Which of them it is, where each is a picture of its own."""
    seconds: float = 0.0
    """From one to the next; 0 where nothing says it."""


class PictureWriter:
    """Writes the two files of one shard; there are none for a shard without pictures."""

    def __init__(self, stem: str) -> None:
        self._stem = stem
        self._records: list[tuple[int | float, ...]] = []
        self._stream: BinaryIO | None = None
        self._at = 0

    def add(
        self, sample: int, seen: Seen, start: int, around: tuple[int, int], place: tuple[int, int]
    ) -> None:  # fmt: skip
        """Append a picture of a sample; `around` are the tokens before and behind its own that belong to it, `place`
        the row's file and line."""
        if self._stream is None:
            self._stream = open(f"{self._stem}.pictures.bin", "wb")  # noqa: SIM115 - closed in close or abandon
        kind, content = _written(seen.where)
        self._stream.write(content)
        sizes = (seen.width, seen.height, seen.patches)
        video = (seen.frames, seen.frame, seen.seconds)
        record = (sample, start, seen.tokens, *around, *sizes, self._at, len(content), kind, *place, 0, *video)
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
        return _read(int(record["inline"]), content)

    def seen(self, record: np.void) -> Seen:
        """The picture of a record as it was looked at."""
        width, height, tokens, patches, frames, frame = (int(record[name]) for name in SIZES)
        return Seen(self.where(record), width, height, tokens, patches, frames, frame, float(record["seconds"]))


def _written(where: Reference) -> tuple[int, bytes]:
    """A reference as bytes, and what they are."""
    video = VIDEO if where.video else PATH
    if where.frames:
        frames = [_written(frame) for frame in where.frames]
        return FRAMES | video, json.dumps([(kind, content.hex()) for kind, content in frames]).encode()
    if where.content is not None:
        return CONTENT | video, where.content
    return PATH | video, os.fsencode(where.path or "")


def _read(kind: int, content: bytes) -> Reference:
    video = bool(kind & VIDEO)
    if kind & FRAMES:
        frames = tuple(_read(number, bytes.fromhex(text)) for number, text in json.loads(content))
        return Reference(video=video, frames=frames)
    if kind & CONTENT:
        return Reference(content=content, video=video)
    return Reference(path=os.fsdecode(content), video=video)
