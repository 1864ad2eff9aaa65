"""The token cache of a source: its key, and building it on all ranks at once.

A cache is a folder named by its key, the hash of everything that decides its content. It is written beside its place
and renamed when whole, so a folder under a key is complete or not there; a killed build leaves a `.build-*` folder that
nothing reads and the next build on that machine clears. Every rank must see the same `data.cache_dir`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tqdm import tqdm

from data.cache_files import VERSION, Item, ShardInfo, ShardWriter, TokenCache, is_complete, write_manifest
from data.captions import captioned, ends_of
from data.chat import ChatTemplate, special_tokens, template_renderer
from data.config import SourceConfig
from data.disk import new_build_folder, not_shared, put_in_place, writing
from data.encode import Encoder
from data.hashing import hash_files
from data.kinds import KINDS, KindName, check_format, detect_format
from data.notes import Note
from data.peers import Peers
from data.pictures.looking import look_at
from data.pictures.rows import split_row
from data.pictures.types import PictureConfig
from data.readers import READERS
from data.rows import Ask, Judged, Pair, Row, RowError, Sample, as_chat
from data.sources import SourceFile, Unit, cut_units, list_files, share_units
from data.tokenizer import TokenizerInfo, add_special, describe, load_tokenizer, tokenizer_digest

BATCH_ROWS = 512
BATCH_CHARS = 2 << 20
ROWS_TO_DETECT = 64


@dataclass
class Maker:
    """The tokenizer and template of a run, loaded at the first source whose cache has to be built."""

    folder: str
    template_path: str | None
    loss_on: str
    key: str = "data.tokenizer"
    pictures: PictureConfig | None = None
    """What the model makes of pictures, if it sees any."""
    max_pixels: int = 0
    """Of a picture that is decoded."""
    _loaded: tuple[Any, TokenizerInfo] | None = field(default=None, repr=False)

    def digest(self) -> str:
        """Hash of the tokenizer's files, the template and what is learnt."""
        parts = [tokenizer_digest(self.folder, self.key), self._template() or "", self.loss_on]
        if self.pictures is not None:
            parts.append(repr((self.pictures, self.max_pixels)))
        return hashlib.blake2b("\0".join(parts).encode("utf-8"), digest_size=16).hexdigest()

    def load(self) -> tuple[Any, TokenizerInfo]:
        """The tokenizer and its facts."""
        if self._loaded is None:
            tokenizer = load_tokenizer(self.folder, self.key)
            if self.pictures is not None and not self.pictures.placeless:
                for text in self.pictures.tokens:
                    add_special(tokenizer, text)
            self._loaded = tokenizer, describe(tokenizer)
        return self._loaded

    def encoder(self) -> Encoder:
        """A fresh encoder."""
        tokenizer, info = self.load()

        def chat() -> ChatTemplate:
            render = template_renderer(tokenizer, self._template(), self.template_path or self.folder)
            return ChatTemplate(render, special_tokens(tokenizer), tokenizer.eos_token, tokenizer.bos_token)

        pictures = self.pictures.tokens if self.pictures else ()
        return Encoder(tokenizer, info, chat, self.loss_on, pictures, ends_of(tokenizer))

    def around(self) -> tuple[int, int]:
        """Tokens before and behind those of a picture that belong to it."""
        if self.pictures is None or self.pictures.placeless:
            return 0, 0
        backend = self.load()[0].backend_tokenizer
        ends = (self.pictures.begin, self.pictures.end)
        before, after = (len(backend.encode(text, add_special_tokens=False).ids) for text in ends)
        return before, after

    def _template(self) -> str | None:
        if self.template_path is None:
            return None
        try:
            with open(os.path.expanduser(self.template_path), encoding="utf-8") as stream:
                return stream.read()
        except (OSError, UnicodeDecodeError) as err:
            raise ValueError(f"data.chat_template={self.template_path} cannot be read: {err}") from err


def open_cache(
    source: SourceConfig, key: str, cache_dir: str, maker: Maker, peers: Peers, kind: KindName = "text"
) -> TokenCache:
    """The token cache of a source, built first if it is not there. To be called by all ranks together.

    Args:
        source: the source.
        key: its name in the config, such as `data.sources[0]`, for messages and the progress bar.
        cache_dir: folder of all caches.
        maker: tokenizer, template and what to learn.
        kind: what the stage learns from.

    Raises:
        ValueError: the path, the format (or it gives another kind), the tokenizer or the template is wrong, or the
            cache cannot be written.
    """
    if source.format != "auto":
        check_format(source.format, key, kind)
    files = peers.from_first(lambda: list_files(source, key))
    paths = [file.path for file in files]
    digests = hash_files(paths, cache_dir, peers)
    parts = {
        "version": VERSION,
        "kind": kind,
        "files": [(file.name, file.kind, file.channel, digest) for file, digest in zip(files, digests, strict=True)],
        "format": source.format,
        "channel": (source.channel, source.channel_field),
        "as_chat": source.as_chat,
        "maker": peers.from_first(maker.digest),
    }
    name = hashlib.blake2b(json.dumps(parts).encode("utf-8"), digest_size=16).hexdigest()
    folder = os.path.join(cache_dir, name)
    if not peers.from_first(lambda: is_complete(folder)):
        _build(_Plan(source, key, files, folder, name, maker, kind), peers)
    opened: list[TokenCache] = []
    peers.run(lambda: opened.append(_open(folder, paths)))
    return opened[0]


@dataclass(frozen=True)
class _Plan:
    source: SourceConfig
    key: str
    files: list[SourceFile]
    folder: str
    name: str
    maker: Maker
    kind: KindName


def _build(plan: _Plan, peers: Peers) -> None:
    cache_dir = os.path.dirname(plan.folder)
    work = peers.from_first(lambda: writing(cache_dir, lambda: new_build_folder(cache_dir)))
    try:
        form = peers.from_first(lambda: _format(plan))
        shards = peers.run(lambda: writing(cache_dir, lambda: _build_shard(plan, form, work, peers)))
        dtype, info = _token_dtype(plan.maker.load()[1]), plan.maker.load()[1]
        peers.from_first(
            lambda: writing(cache_dir, lambda: write_manifest(work, plan.name, plan.kind, dtype, info, shards))
        )
        peers.from_first(lambda: writing(cache_dir, lambda: put_in_place(work, plan.folder)))
    finally:
        if peers.rank == 0:
            shutil.rmtree(work, ignore_errors=True)  # after success it has been renamed away


def _build_shard(plan: _Plan, form: str, work: str, peers: Peers) -> ShardInfo:
    """This rank's run of units as one shard: shards in rank order hold the source's rows in order."""
    if not os.path.isdir(work):
        raise not_shared(os.path.dirname(work))
    units = share_units(cut_units(plan.files), peers.rank, peers.world)
    encoder = plan.maker.encoder()
    dtype, around = _token_dtype(plan.maker.load()[1]), plan.maker.around()
    writer = ShardWriter(work, peers.rank, dtype, plan.kind, around)
    parse = KINDS[plan.kind].formats[form].samples
    try:
        lines = _LineNumbers(plan.files)
        hidden = peers.rank != 0 or not sys.stderr.isatty()
        label = f"tokens of {plan.source.path}"
        with tqdm(total=sum(unit.size for unit in units), unit="B", unit_scale=True, desc=label, disable=hidden) as bar:
            for unit in units:
                file = plan.files[unit.file]
                batch: list[Item] = []
                chars = 0
                for line, row, reason in READERS[file.kind].read(file.path, unit.start, unit.stop):
                    try:
                        if row is None:
                            raise RowError(reason)
                        channel = _channel(plan.source, file, row)
                        row = captioned(row) if plan.kind == "captions" else row
                        folder = plan.source.image_dir or os.path.dirname(file.path)
                        maker, answered = plan.maker, plan.kind == "text"
                        row, seen, identity = look_at(row, folder, maker.pictures, maker.max_pixels, answered)
                        samples = parse(as_chat(row, plan.kind != "prompts") if plan.source.as_chat else row)
                        tokens = tuple(each.tokens for each in seen)
                        made = [(sample, encoder.prepare(sample, tokens, identity)) for sample in samples]
                    except RowError as err:
                        writer.add_bad(unit.file, lines.whole(unit, line), str(err))
                        continue
                    for sample, documents in made:
                        note = None
                        if KINDS[plan.kind].noted:
                            note = make_note(sample, documents[0].text, unit.file, lines.whole(unit, line))
                        place = (unit.file, lines.whole(unit, line)) if seen else (0, 0)
                        batch.append(Item(documents, channel, note, seen, place))
                        chars += sum(len(document.text) for document in documents)
                    if len(batch) >= BATCH_ROWS or chars >= BATCH_CHARS:
                        _write(writer, encoder, batch)
                        batch, chars = [], 0
                _write(writer, encoder, batch)
                bar.update(unit.size)
        return writer.close()
    except BaseException:
        writer.abandon()
        raise


def _write(writer: ShardWriter, encoder: Encoder, batch: list[Item]) -> None:
    writer.add(batch, encoder.encode([document for item in batch for document in item.documents]))


def make_note(sample: Sample, text: str, file: int, line: int) -> Note:
    """What is kept of a sample beside its tokens."""
    if isinstance(sample, Pair):
        return Note(file, line, float("nan") if sample.margin is None else sample.margin)
    if isinstance(sample, Judged):
        return Note(file, line, float(sample.desirable))
    assert isinstance(sample, Ask)
    messages = None if isinstance(sample.prompt, str) else sample.prompt
    return Note(file, line, row={"text": text, "messages": messages, "fields": sample.fields})


def _channel(source: SourceConfig, file: SourceFile, row: Row) -> str:
    if source.channel_field is None:
        return source.channel or file.channel
    value = row.get(source.channel_field)
    if not isinstance(value, str | int) or value == "":
        raise RowError(f"channel_field {source.channel_field} is {'missing' if value is None else repr(value)}")
    return str(value)


def _format(plan: _Plan) -> str:
    """The source's format: as the config says, or from its first rows."""
    if plan.source.format != "auto":
        return plan.source.format
    if plan.kind == "text" and all(file.kind == "text" for file in plan.files):
        return "text"
    rows = list(_first_rows(plan))
    if not rows:
        return next(iter(KINDS[plan.kind].formats))  # nothing readable: the gate says so with the reasons of the rows
    return detect_format(rows, plan.source.path, plan.key, plan.kind)


def _first_rows(plan: _Plan) -> Iterator[Row]:
    found = 0
    for file in plan.files:
        for start, stop, _ in READERS[file.kind].cut(file.path):
            for _, row, _ in READERS[file.kind].read(file.path, start, stop):
                if row is not None:
                    with contextlib.suppress(RowError):  # told where rows are read
                        row, _ = split_row(row, "", plan.kind == "text")
                    yield row
                    found += 1
                if found >= ROWS_TO_DETECT:
                    return


class _LineNumbers:
    """Turns line numbers within a unit into those of the file; units come in order, so no byte is counted twice."""

    def __init__(self, files: list[SourceFile]) -> None:
        self._files = files
        self._file, self._start, self._lines = -1, 0, 0

    def whole(self, unit: Unit, line: int) -> int:
        """Number in the file of line `line` (from 1) of the unit."""
        if unit.file != self._file:
            self._file, self._start, self._lines = unit.file, 0, 0
        if unit.start != self._start:  # asked for every sample with a note, and some readers have to open the file
            file = self._files[unit.file]
            self._lines += READERS[file.kind].between(file.path, self._start, unit.start)
            self._start = unit.start
        return self._lines + line


def _token_dtype(info: TokenizerInfo) -> np.dtype:
    return np.dtype(np.uint16 if info.vocab_size <= 1 << 16 else np.uint32)


def _open(folder: str, paths: list[str]) -> TokenCache:
    if not is_complete(folder):
        raise not_shared(os.path.dirname(folder))
    return TokenCache(folder, paths)
