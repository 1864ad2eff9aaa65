"""The token cache on disk: what one rank writes, and how everyone reads it back by memory map.

manifest.json            written last: version, key, shards with the sizes of their files, tokenizer facts
0000.tokens              uint16 or uint32, all samples one after another
0000.learn               one bit a token: is it learnt (little bit order)
0000.samples.npy         one SAMPLE record a sample
0000.bad.jsonl           malformed rows: {file, line, reason}
0000.notes.npy, .rows.jsonl   of preferences and prompts, see notes.py
0000.pictures.npy, .pictures.bin   where there are pictures, see pictures/notes.py

A pair is one sample: the tokens of the chosen document, then those of the rejected one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, BinaryIO

import numpy as np

from data.encode import Encoded, Prepared
from data.kinds import KINDS, KindName
from data.notes import NOTE, Note, NoteWriter, create, read_row
from data.pictures.notes import PictureNotes, PictureWriter, Seen
from data.tokenizer import TokenizerInfo

VERSION = 3
"""Part of every key: raise it whenever the files or the way tokens and masks are made change."""

SAMPLE = np.dtype(
    [
        ("offset", "<i8"),  # first token in the shard
        ("length", "<i8"),  # tokens
        ("targets", "<i8"),  # learnt tokens that have a token before them
        ("hash", "<u8"),  # of the text
        ("channel", "<i4"),  # index into the shard's channels
        ("turns", "<i4"),  # endings to learn
        ("stops", "<i4"),  # of them with a learnt stop token
        ("too_long", "<i4"),  # encode.CUT, TRUNCATE or DROP
    ]
)


@dataclass(frozen=True)
class BadRow:
    """A row that could not be used. `line` counts from 1 (rows for Parquet, Arrow and JSON arrays)."""

    file: str
    line: int
    reason: str


@dataclass(frozen=True)
class ShardInfo:
    """What the manifest says of one shard."""

    samples: int
    tokens: int
    bad: int
    channels: tuple[str, ...]
    max_token_id: int
    examples: dict[str, str]
    """The end of the first text of each channel, to show when nothing of a channel is learnt."""
    sizes: dict[str, int]
    """Bytes of each file: a shard whose files differ is not trusted."""


@dataclass(frozen=True)
class Item:
    """A sample to write."""

    documents: tuple[Prepared, ...]
    """Two of a pair, one of anything else."""
    channel: str
    note: Note | None = None
    """Of every sample, where the kind of the cache has notes."""
    pictures: tuple[Seen, ...] = ()
    """In the order of their places in the text; all documents of the sample have them."""
    place: tuple[int, int] = (0, 0)
    """File and line of its row, where it has pictures."""


class ShardWriter:
    """Writes one shard; `close` returns its ShardInfo."""

    def __init__(
        self,
        folder: str,
        index: int,
        token_dtype: np.dtype,
        kind: KindName = "text",
        around: tuple[int, int] = (0, 0),
    ) -> None:
        """
        Args:
            around: tokens before and behind those of a picture that belong to it.
        """
        self._around = around
        self._stem = os.path.join(folder, f"{index:04d}")
        self._dtype = token_dtype
        self._open = ExitStack()
        self._streams: dict[str, BinaryIO] = {}
        for name in ("tokens", "learn", "bad.jsonl"):
            self._streams[name] = self._open.enter_context(create(f"{self._stem}.{name}"))
        self._notes = NoteWriter(self._stem) if KINDS[kind].noted else None
        self._pictures = PictureWriter(self._stem)
        self._samples: list[np.ndarray] = []
        self._spare_bits = np.zeros(0, dtype=bool)
        self._channels: dict[str, int] = {}
        self._examples: dict[str, str] = {}
        self._tokens = self._num_bad = 0
        self._max_id = -1

    def add(self, items: list[Item], encoded: list[Encoded]) -> None:
        """Append samples; `encoded` has the tokens of all their documents, one after another."""
        if not items:
            return
        fields, at, next_document = [], self._tokens, iter(encoded)
        samples_before = sum(len(part) for part in self._samples)
        for item in items:
            number = self._channels.setdefault(item.channel, len(self._channels))
            self._examples.setdefault(item.channel, item.documents[0].text[-300:])
            made = [next(next_document) for _ in item.documents]
            length = sum(len(each.tokens_L) for each in made)
            targets = sum(int(each.learn_L[1:].sum()) for each in made)
            turns, stops = sum(each.turns for each in item.documents), sum(each.stops for each in item.documents)
            first = item.documents[0]
            fields.append((at, length, targets, first.content_hash, number, turns, stops, first.too_long))
            at += length
            if item.pictures:
                self._add_pictures(samples_before + len(fields) - 1, item, made)
            if self._notes is not None:
                assert item.note is not None
                self._notes.add(item.documents, made, item.note)
        self._samples.append(np.array(fields, dtype=SAMPLE))
        tokens_L = np.concatenate([made.tokens_L for made in encoded])
        self._max_id = max(self._max_id, int(tokens_L.max(initial=-1)))
        assert self._max_id <= np.iinfo(self._dtype).max, "the tokenizer made an id beyond its own vocabulary"
        self._streams["tokens"].write(tokens_L.astype(self._dtype).tobytes())
        bits = np.concatenate([self._spare_bits, *(made.learn_L for made in encoded)])
        full = len(bits) // 8 * 8
        self._streams["learn"].write(np.packbits(bits[:full], bitorder="little").tobytes())
        self._spare_bits = bits[full:]
        self._tokens = at

    def _add_pictures(self, sample: int, item: Item, made: list[Encoded]) -> None:
        first = 0
        for document in made:
            for number, (seen, start) in enumerate(zip(item.pictures, document.starts, strict=True)):
                around = self._extent(item.pictures, document.starts, number)
                self._pictures.add(sample, seen, first + start, around, item.place)
            first += len(document.tokens_L)

    def _extent(self, pictures: Sequence[Seen], starts: Sequence[int], number: int) -> tuple[int, int]:
        """Tokens before and behind those of a picture that no cut goes through: around it, or the rest of its video."""
        seen, (before, after) = pictures[number], self._around
        first, last = number - seen.frame, number
        while last + 1 < len(pictures) and pictures[last + 1].frame > pictures[last].frame:
            last += 1
        return before + starts[number] - starts[first], after + starts[last] - starts[number]

    def add_bad(self, file: int, line: int, reason: str) -> None:
        """Note a malformed row of the source's file number `file`."""
        self._num_bad += 1
        row = json.dumps({"file": file, "line": line, "reason": reason})
        self._streams["bad.jsonl"].write(f"{row}\n".encode())

    def close(self) -> ShardInfo:
        """Finish and flush all files to disk."""
        self._streams["learn"].write(np.packbits(self._spare_bits, bitorder="little").tobytes())
        with open(self._stem + ".samples.npy", "wb") as stream:
            np.save(stream, np.concatenate([np.zeros(0, dtype=SAMPLE), *self._samples]))
            _flush(stream)
        for stream in self._streams.values():
            _flush(stream)
        self._open.close()
        names = ["tokens", "learn", "samples.npy", "bad.jsonl", *(self._notes.close() if self._notes else ())]
        names += self._pictures.close()
        sizes = {name: os.path.getsize(f"{self._stem}.{name}") for name in names}
        num_samples = sum(len(part) for part in self._samples)
        channels = tuple(self._channels)
        return ShardInfo(num_samples, self._tokens, self._num_bad, channels, self._max_id, self._examples, sizes)

    def abandon(self) -> None:
        """Close the files of a build that failed; what they hold does not count."""
        if self._notes:
            self._notes.abandon()
        self._pictures.abandon()
        self._open.close()


def write_manifest(
    folder: str, key: str, kind: KindName, token_dtype: np.dtype, info: TokenizerInfo, shards: list[ShardInfo]
) -> None:
    """Write manifest.json, the file that makes the folder a cache."""
    content = {
        "version": VERSION,
        "key": key,
        "kind": kind,
        "dtype": token_dtype.name,
        "tokenizer": asdict(info),
        "shards": [asdict(shard) for shard in shards],
    }
    with open(os.path.join(folder, "manifest.json"), "w", encoding="utf-8") as stream:
        json.dump(content, stream)
        _flush(stream)


class TokenCache:
    """The samples of one source, numbered 0 .. num_samples - 1 over all shards in order."""

    def __init__(self, folder: str, paths: list[str]) -> None:
        """
        Args:
            folder: a complete cache (see `is_complete`).
            paths: today's paths of the source's files, to name bad rows.
        """
        manifest = _read_manifest(folder)
        assert manifest is not None, folder
        self.folder = folder
        self.key: str = manifest["key"]
        self.kind: KindName = manifest["kind"]
        self._paths = paths
        self.tokenizer = TokenizerInfo(**manifest["tokenizer"])
        self.shards = [ShardInfo(**{**shard, "channels": tuple(shard["channels"])}) for shard in manifest["shards"]]
        self.num_bad = sum(shard.bad for shard in self.shards)
        self.num_samples = sum(shard.samples for shard in self.shards)
        self.max_token_id = max((shard.max_token_id for shard in self.shards), default=-1)
        self.channels = tuple(dict.fromkeys(name for shard in self.shards for name in shard.channels))
        stems = [os.path.join(folder, f"{index:04d}") for index in range(len(self.shards))]
        sizes = [shard.tokens for shard in self.shards]
        self._tokens = [_map(f"{stem}.tokens", manifest["dtype"], n) for stem, n in zip(stems, sizes, strict=True)]
        self._learn = [_map(f"{stem}.learn", "uint8", -(-n // 8)) for stem, n in zip(stems, sizes, strict=True)]
        self._first = np.cumsum([0] + [shard.samples for shard in self.shards])
        self.samples = self._load_samples(stems)
        self.notes = _load_notes(stems) if KINDS[self.kind].noted else None
        """NOTE [S], where the kind has notes."""
        self.pictures = PictureNotes(stems, self._first)

    @cached_property
    def has_margins(self) -> bool:
        """Whether a pair says how much better its chosen answer is."""
        if self.notes is None or self.kind != "preference":
            return False
        return bool(np.isfinite(self.notes["value"]).any())

    def _load_samples(self, stems: list[str]) -> np.ndarray:
        parts = []
        for stem, shard in zip(stems, self.shards, strict=True):
            part = np.load(f"{stem}.samples.npy")
            names = np.array([self.channels.index(name) for name in shard.channels], dtype=np.int32)
            if len(part):
                part["channel"] = names[part["channel"]]
            parts.append(part)
        return np.concatenate([np.zeros(0, dtype=SAMPLE), *parts])

    def example(self, channel: str) -> str:
        """The end of the channel's first text."""
        return next((shard.examples[channel] for shard in self.shards if channel in shard.examples), "")

    def tokens(self, sample: int, start: int, length: int) -> np.ndarray:
        """Tokens [start, start + length) of a sample, int64 [length]."""
        shard, at = self._where(sample, start)
        return self._tokens[shard][at : at + length].astype(np.int64)

    def learn(self, sample: int, start: int, length: int) -> np.ndarray:
        """Whether each of those tokens is learnt, bool [length]."""
        shard, at = self._where(sample, start)
        bits = np.unpackbits(self._learn[shard][at // 8 : -(-(at + length) // 8)], bitorder="little")
        return bits[at % 8 : at % 8 + length].astype(bool)

    def row(self, sample: int) -> dict[str, Any]:
        """What is kept of a prompt's row: {text, messages, fields}."""
        assert self.kind == "prompts" and self.notes is not None
        shard, _ = self._where(sample, 0)
        with open(os.path.join(self.folder, f"{shard:04d}.rows.jsonl"), "rb") as stream:
            return read_row(stream, int(self.notes["row"][sample]))

    def place(self, sample: int, reason: str) -> BadRow:
        """Where a sample with a note stands in the source, to name it."""
        assert self.notes is not None
        note = self.notes[sample]
        return BadRow(self._paths[note["file"]], int(note["line"]), reason)

    def place_of_picture(self, record: np.void, reason: str) -> BadRow:
        """Where the row of a picture stands in the source, to name it."""
        return BadRow(self._paths[record["file"]], int(record["line"]), reason)

    def bad_rows(self) -> Iterator[BadRow]:
        """All malformed rows, in order."""
        for index in range(len(self.shards)):
            with open(os.path.join(self.folder, f"{index:04d}.bad.jsonl"), encoding="utf-8") as stream:
                for line in stream:
                    row = json.loads(line)
                    yield BadRow(self._paths[row["file"]], row["line"], row["reason"])

    def _where(self, sample: int, start: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self._first, sample, side="right")) - 1
        return shard, int(self.samples["offset"][sample]) + start


def _load_notes(stems: list[str]) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype=NOTE), *(np.load(f"{stem}.notes.npy") for stem in stems)])


def is_complete(folder: str) -> bool:
    """Whether the folder is a cache of this version with every file at its full size."""
    manifest = _read_manifest(folder)
    if manifest is None:
        return False
    return all(
        os.path.isfile(path := os.path.join(folder, f"{index:04d}.{name}")) and os.path.getsize(path) == size
        for index, shard in enumerate(manifest["shards"])
        for name, size in shard["sizes"].items()
    )


def _read_manifest(folder: str) -> dict[str, Any] | None:
    try:
        with open(os.path.join(folder, "manifest.json"), encoding="utf-8") as stream:
            manifest = json.load(stream)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None  # no cache, or a damaged one: it is built again
    return manifest if isinstance(manifest, dict) and manifest.get("version") == VERSION else None


def _map(path: str, dtype: str, length: int) -> np.ndarray:
    return np.memmap(path, dtype=dtype, mode="r", shape=(length,)) if length else np.zeros(0, dtype=dtype)


def _flush(stream: Any) -> None:
    stream.flush()
    os.fsync(stream.fileno())
