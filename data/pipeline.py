"""From the data section to training rows: read this page to know what happens to the data, in order."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from data.batch import MicroBatch, Row, collate, split_ragged, split_rows
from data.cache import Maker, open_cache
from data.cache_files import TokenCache
from data.config import DataConfig
from data.documents import Numbers, documents_of
from data.gate import check, make_report
from data.kinds import KindName
from data.order import VERSION, Pieces, RowOrder, packed_once
from data.peers import Peers
from data.pictures.loader import PictureLoader
from data.pictures.types import PictureConfig
from data.report import GateReport
from data.samples import channel_names, held_out, keep, sample_channels
from data.tokenizer import TokenizerInfo


def build(
    cfg: DataConfig,
    *,
    tokenizer_folder: str | None,
    loss_on: str,
    seed: int,
    peers: Peers,
    max_seq_len: int,
    kind: KindName = "text",
    pictures: PictureConfig | None = None,
) -> TrainingData:
    """Everything from sources to rows. To be called by all ranks together.

    Args:
        cfg: the data section.
        tokenizer_folder: folder of `init_from`, used unless cfg.tokenizer names one.
        loss_on: "assistant" (answers with their stop token, completions) or "all" (every token).
        seed: of the order of samples and of random channels.
        peers: the other ranks; they share the work of building caches and hear of each other's errors.
        max_seq_len: longest sequence the model allows.
        kind: what the stage learns from: "text", "preference" or "unpaired" ("prompts" are read by `prompts.py`).
            Of the last two the answers are scored, whatever `loss_on` says. "captions": a row is a pair, whatever
            cfg.packing says.
        pictures: what the model makes of pictures, if it sees any.

    Raises:
        ValueError: a mistake in the section, the tokenizer, the template or the files, or data of another kind.
        GateError: the data do not pass the gate (a ValueError that carries the report).
    """
    assert kind != "prompts", "prompts have no loss: see prompts.read"
    if cfg.seq_len > max_seq_len:
        raise ValueError(f"data.seq_len={cfg.seq_len} is longer than the model allows; set data.seq_len={max_seq_len}")
    cfg = replace(cfg, packing="none") if kind == "captions" else cfg
    found = assemble(cfg, tokenizer_folder, loss_on if kind == "text" else "assistant", seed, peers, kind, pictures)
    fingerprint = fingerprint_of(cfg, found.caches, seed)
    look = None if pictures is None else PictureLoader(pictures, cfg.max_picture_pixels, cfg.picture_workers)
    return TrainingData(
        found.channels, found.report, found.caches, found.order, found.held_out, fingerprint, kind, look=look
    )


@dataclass(frozen=True)
class Assembled:
    """Sources behind the gate: what TrainingData and prompts are made of."""

    channels: tuple[str, ...]
    report: GateReport
    caches: list[TokenCache]
    order: RowOrder
    held_out: Pieces


def assemble(
    cfg: DataConfig,
    tokenizer_folder: str | None,
    loss_on: str,
    seed: int,
    peers: Peers,
    kind: KindName,
    pictures: PictureConfig | None = None,
) -> Assembled:
    """Sources as caches, their pieces, their order, and the gate. To be called by all ranks together.

    Raises:
        ValueError: see `build`.
        GateError: the data do not pass the gate.
    """
    folder = cfg.tokenizer or tokenizer_folder
    if folder is None:
        raise ValueError("data.tokenizer=null and there is no init_from to take one from; set data.tokenizer=FOLDER")

    # 1. Every source as a token cache: one numbered list of samples with tokens, loss mask and channel.
    key = "data.tokenizer" if cfg.tokenizer else "init_from"
    seeing = None if pictures is None else replace(pictures, video_frames=cfg.video_frames)
    maker = Maker(folder, cfg.chat_template, loss_on, key, seeing, cfg.max_picture_pixels)
    named = [(f"data.sources[{index}]", source) for index, source in enumerate(cfg.sources)]
    named_eval = [(f"data.eval_sources[{index}]", source) for index, source in enumerate(cfg.eval_sources)]
    everything = [open_cache(source, key, cfg.cache_dir, maker, peers, kind) for key, source in named + named_eval]
    caches, eval_caches = everything[: len(named)], everything[len(named) :]

    # 2. Channels, and which samples are held out: both by content, so neither layout nor file order matters.
    channels = channel_names(everything, cfg.random_channels)
    channel_of = [sample_channels(cache, channels, cfg.random_channels, seed) for cache in everything]
    out = [held_out(cache, cfg.eval_fraction) for cache in caches]
    everyone = [np.ones(cache.num_samples, dtype=bool) for cache in eval_caches]

    # 3. Samples as pieces that fit in a row; the held-out ones number all caches, to be read from `everything`.
    train = keep(caches, [~mask for mask in out], channel_of[: len(named)], len(channels), cfg.seq_len)
    held = keep(everything, out + everyone, channel_of, len(channels), cfg.seq_len)

    # 4. The order of rows, a function of seed and data; the gate looks at its first epoch.
    weights = tuple(source.weight for source in cfg.sources)
    cost = pictures.patch_cost if pictures else 0.0
    order = RowOrder(train.pieces, weights, seed, cfg.seq_len, cfg.packing, cost)
    report = make_report(channels, train, held, order, tuple(everything), kind)
    keys = [(key, source.path) for key, source in named + named_eval]
    check(report, keys, cfg.max_bad_fraction, loss_on)
    return Assembled(channels, report, everything, order, held.pieces)


@dataclass(frozen=True)
class TrainingData:
    """Rows to train on, by position, and the held-out ones."""

    channels: tuple[str, ...]
    report: GateReport
    caches: list[TokenCache] = field(repr=False)
    order: RowOrder = field(repr=False)
    held_out: Pieces = field(repr=False)
    fingerprint: str
    """Changes when the rows at a position do (data, tokenizer, template, seed, weights, seq_len, packing): kept in a
    checkpoint, it tells whether a resumed run goes on with the same rows."""
    kind: KindName = "text"
    numbers: Mapping[str, Numbers] = field(default_factory=dict, repr=False)
    """Facts of documents that were computed before, by name (see precomputed.py)."""
    share: str | None = None
    """A fact: documents of a micro-batch in which it is the same have what they begin with in common once."""
    look: PictureLoader | None = None
    """Reads the pictures of documents, where the model sees any."""

    @property
    def rows_per_epoch(self) -> int:
        """Rows of the first epoch (of every epoch, if all weights are whole numbers)."""
        return self.report.rows_per_epoch

    @property
    def tokenizer(self) -> TokenizerInfo:
        """Facts of the tokenizer that made the tokens."""
        return self.caches[0].tokenizer

    @property
    def max_token_id(self) -> int:
        """Largest id that occurs: the model's vocabulary must be larger."""
        return max(cache.max_token_id for cache in self.caches)

    def global_batch(self, position: int, rows: int) -> list[Row]:
        """The rows of one optimizer step, the same on every rank and layout.

        Args:
            position: rows consumed since the start of training; epochs follow each other without a gap.
            rows: data.global_batch_rows.
        """
        return self.order.rows(position, rows)

    def micro_batches(self, rows: Sequence[Row], rank: int, world: int, micro_batch_rows: int) -> list[MicroBatch]:
        """This rank's micro-batches of a global batch; those of all ranks hold every row once.

        Raises:
            ValueError: the rows are no multiple of world x micro_batch_rows.
        """
        mine = split_rows(rows, rank, world, micro_batch_rows)
        return [self.micro_batch_of(self.order.pieces, part) for part in mine]

    def eval_batches(self, rank: int, world: int, micro_batch_rows: int) -> list[MicroBatch]:
        """This rank's share of the held-out samples, in a fixed order, each sample once over all ranks.

        Every rank gets equally many micro-batches (one token without target fills up), so that collectives inside the
        forward stay in step. Empty if nothing is held out.
        """
        pieces = self.held_out
        if not len(pieces):
            return []
        rows = packed_once(pieces, self.order.seq_len, self.order.packing, self.order.patch_cost)
        mine = split_ragged(rows, rank, world, micro_batch_rows)
        return [self.micro_batch_of(pieces, part) for part in mine]

    def with_numbers(self, name: str, numbers: Numbers) -> TrainingData:
        """The same data, whose documents have the fact `name`: float64 [samples, documents] of each cache."""
        return replace(self, numbers={**self.numbers, name: numbers})

    def sharing_prompts(self) -> TrainingData:
        """The same pairs, whose prompt comes once for both answers."""
        assert self.kind == "preference", "only both answers of a pair have a prompt in common"
        return replace(self, share="pair")

    def micro_batch_of(self, pieces: Pieces, rows: Sequence[Row]) -> MicroBatch:
        """The documents of some rows of `pieces` as one micro-batch; without rows a token without a target."""
        chosen = [piece for row in rows for piece in row.pieces]
        return collate(documents_of(self.caches, self.numbers, pieces, chosen, self.look), self.share)


def fingerprint_of(cfg: DataConfig, caches: list[TokenCache], seed: int) -> str:
    """Hash of everything that decides the order of rows; `caches` are those of the sources, then others."""
    weights = [source.weight for source in cfg.sources]
    keys = [cache.key for cache in caches[: len(weights)]]
    parts = [VERSION, keys, weights, seed, cfg.seq_len, cfg.packing, cfg.eval_fraction]
    return hashlib.blake2b(repr(parts).encode("utf-8"), digest_size=16).hexdigest()
