"""Prompts to write answers to: rows of the sources as reinforcement learning takes them.

    data = prompts.read(cfg, tokenizer_folder=..., max_prompt_tokens=256, seed=0, peers=peers)
    data.prompts(position, count)

A row is a prompt (text, messages, `question` or `instruction`) or a conversation. Assistant messages at its end are
what the policy has to write: they are taken off, and their text is kept as the field `completion`. Messages end with
the chat template's generation prompt; a plain text is asked as it is, after BOS where the tokenizer puts one. All other
fields of the row reach the reward functions, as JSON has them (tuples are lists; what JSON does not know is text).

Rows lie in a token cache, so a run holds no more of them in memory than a step needs. Generated rows become a file
first (`rows_file`). Their pictures are read when they are asked for (`PromptData.shown`).
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import numpy as np

from data.batch import Document
from data.cache_files import TokenCache
from data.config import DataConfig
from data.disk import writing
from data.order import Pieces, RowOrder
from data.peers import Peers
from data.pictures.loader import PictureLoader
from data.pictures.types import PictureConfig
from data.pipeline import assemble, fingerprint_of
from data.prompt import Prompt
from data.report import GateReport


def read(
    cfg: DataConfig,
    *,
    tokenizer_folder: str | None,
    max_prompt_tokens: int,
    seed: int,
    peers: Peers,
    pictures: PictureConfig | None = None,
) -> PromptData:
    """The prompts of all sources behind their gate. To be called by all ranks together.

    Args:
        cfg: the data section; its seq_len and packing are not looked at.
        tokenizer_folder: folder of `init_from`, used unless cfg.tokenizer names one.
        max_prompt_tokens: a longer prompt is left out and counted.
        seed: of the order of prompts.
        pictures: what the model makes of pictures, if it sees any.

    Raises:
        ValueError: a mistake in the section, the tokenizer, the template or the files, or data of another kind.
        GateError: the data do not pass the gate (a ValueError that carries the report).
    """
    cfg = replace(cfg, seq_len=max_prompt_tokens, packing="none")
    found = assemble(cfg, tokenizer_folder, "assistant", seed, peers, "prompts", pictures)
    fingerprint = fingerprint_of(cfg, found.caches, seed)
    look = None if pictures is None else PictureLoader(pictures, cfg.max_picture_pixels, cfg.picture_workers)
    return PromptData(found.channels, found.report, found.caches, found.order, found.held_out, fingerprint, look)


@dataclass(frozen=True)
class PromptData:
    """Prompts by position, and the held-out ones."""

    channels: tuple[str, ...]
    report: GateReport
    caches: list[TokenCache] = field(repr=False)
    order: RowOrder = field(repr=False)
    held_out_pieces: Pieces = field(repr=False)
    fingerprint: str
    """Changes when the prompts at a position do: kept in a checkpoint, it tells whether a resumed run goes on with the
    same ones."""
    look: PictureLoader | None = None
    """Reads the pictures of prompts, where the model sees any."""

    @property
    def prompts_per_epoch(self) -> int:
        """Prompts of the first epoch (of every epoch, if all weights are whole numbers)."""
        return self.report.rows_per_epoch

    @property
    def max_token_id(self) -> int:
        """Largest id that occurs: the model's vocabulary must be larger."""
        return max(cache.max_token_id for cache in self.caches)

    def prompts(self, position: int, count: int) -> list[Prompt]:
        """Prompts position .. position + count - 1 of the run's order, the same on every rank and layout.

        In an epoch every prompt comes as often as its source's weight says, shuffled with (seed, epoch); epochs follow
        each other without a gap.
        """
        rows = self.order.rows(position, count)
        return [self._prompt(self.order.pieces, row.pieces[0], position + n) for n, row in enumerate(rows)]

    @cached_property
    def held_out(self) -> list[Prompt]:
        """The prompts of data.eval_fraction and data.eval_sources, in the order of the sources."""
        return [self._prompt(self.held_out_pieces, piece, piece) for piece in range(len(self.held_out_pieces))]

    def shown(self, prompts: Sequence[Prompt]) -> list[Document]:
        """Prompts that show something as documents with their pictures, read by several threads.

        Raises:
            ValueError: a picture is gone, or is another one than when the cache was made.
        """
        assert self.look is not None, "a model without a vision tower sees no pictures"
        source_N = np.searchsorted(self._first_rows, [prompt.row for prompt in prompts], side="right") - 1
        sought = []
        for prompt, source in zip(prompts, source_N.tolist(), strict=True):
            tokens_L = np.array(prompt.tokens, dtype=np.int64)
            document = Document(tokens_L, np.zeros(len(tokens_L), dtype=bool), prompt.channel)
            sought.append((document, self.caches[source], prompt.row - int(self._first_rows[source]), 0))
        return self.look(sought)

    @cached_property
    def _first_rows(self) -> np.ndarray:
        return np.cumsum([0, *(cache.num_samples for cache in self.caches)])

    def _prompt(self, pieces: Pieces, piece: int, number: int) -> Prompt:
        source, sample = int(pieces.source_P[piece]), int(pieces.sample_P[piece])
        cache, channel = self.caches[source], int(pieces.channel_P[piece])
        kept = cache.row(sample)
        return Prompt(
            number=number,
            channel=channel,
            channel_name=self.channels[channel],
            tokens=tuple(cache.tokens(sample, 0, int(pieces.length_P[piece])).tolist()),
            text=kept["text"],
            messages=None if kept["messages"] is None else tuple(kept["messages"]),
            fields=kept["fields"],
            row=int(self._first_rows[source]) + sample,
            patches=int(pieces.patches_P[piece]),
        )


def rows_file(rows: Iterable[Mapping[str, Any]], name: str, cache_dir: str, peers: Peers) -> str:
    """The path of a JSONL file with these rows, for `SourceConfig(path, channel=name)`: generated tasks as a source.

    Rank 0 writes it, unless it is there already; its name holds a hash of the rows. To be called by all ranks together;
    the rows of the others are not looked at.

    Raises:
        ValueError: the folder cannot be written.
    """

    def write() -> str:
        lines = [json.dumps(row, default=str, sort_keys=True).encode() + b"\n" for row in rows]
        digest = hashlib.blake2b(b"".join(lines), digest_size=16).hexdigest()
        path = os.path.join(cache_dir, f"{name}-{digest}.jsonl")
        if not os.path.isfile(path):
            writing(cache_dir, partial(_write, path, lines))
        return path

    return peers.from_first(write)


def _write(path: str, lines: list[bytes]) -> None:
    folder, file = os.path.split(path)
    os.makedirs(folder, exist_ok=True)
    part = os.path.join(folder, f".{file}-{uuid.uuid4().hex}")
    with open(part, "wb") as stream:
        stream.writelines(lines)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(part, path)
