"""Loss, perplexity and bits per byte by channel, over supervised tokens only: what a trainer calls its evaluation."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tqdm import tqdm

import data.pipeline
from data.batch import IGNORED, MicroBatch
from data.cache_files import BadRow
from data.config import DataConfig, SourceConfig, source_problems
from data.formats import RowError
from data.kinds import detect_format
from data.order import Pieces
from data.peers import Peers
from data.pictures.rows import split_row
from data.pictures.types import PictureConfig
from data.pipeline import TrainingData
from data.readers import READERS
from data.sources import list_files
from data.tokenizer import load_tokenizer
from trainer.channels import perplexity
from trainer.evaluation.scorer import Scorer
from trainer.evaluation.tokens import byte_lengths, check_ids

WINDOW_TOKENS = 2**22
"""Most tokens that are in memory as batches at one time."""
ALL = "all"
KEY = "data.sources[0]"
OPTIONS = {
    "path": "data",
    "seq_len": "seq-len",
    "chat_template": "chat-template",
    "cache_dir": "cache-dir",
    "loss_on": "loss-on",
}
"""Config keys that have another name on a command line."""
LOSS, TOKENS, BYTES = 0, 1, 2


@dataclass(frozen=True)
class Corpus:
    """Held-out documents as the data room packs and masks them."""

    data: TrainingData
    tokenizer: str
    """Folder."""
    seq_len: int
    bad_rows: int

    def bad(self) -> Iterator[BadRow]:
        """The malformed rows that were passed over."""
        return self.data.report.bad_rows()


def held_out(
    cfg: DataConfig, tokenizer: str, loss_on: str, seed: int, max_seq_len: int, pictures: PictureConfig | None = None
) -> Corpus:
    """The held-out part of a run's data: the same documents, cuts, masks and channels as in its own evaluations.

    Raises:
        ValueError: nothing is held out, or the data cannot be read.
    """
    cfg = dataclasses.replace(cfg, tokenizer=tokenizer)
    corpus = _built(cfg, loss_on, seed, max_seq_len, pictures)
    if not len(corpus.held_out):
        raise ValueError(
            "the run holds nothing out (data.eval_fraction=0, no data.eval_sources); name files with --data FILE"
        )
    return Corpus(corpus, tokenizer, cfg.seq_len, corpus.report.bad_row_count)


def files(
    sources: Sequence[SourceConfig],
    template: str | None,
    tokenizer: str,
    loss_on: str | None,
    seq_len: int,
    cache: str,
    pictures: PictureConfig | None = None,
) -> list[Corpus]:
    """Whole files, all of whose documents are evaluated; documents longer than `seq_len` are cut into such pieces.

    Args:
        loss_on: "assistant" or "all"; None = answers of conversations and completions, everything of plain text.
        pictures: what the model makes of pictures, if it sees any.

    Raises:
        ValueError: a file cannot be read or holds nothing that can be evaluated.
    """
    groups: dict[str, list[SourceConfig]] = defaultdict(list)
    try:
        for key, value, reason, way_out in (each for source in sources for each in source_problems(KEY, source)):
            raise ValueError(f"{key}={value} {reason}: {way_out}")
        for source in sources:
            groups[loss_on or _usual_loss(source)].append(source)
        return [
            _whole(group, template, tokenizer, learnt, seq_len, cache, pictures) for learnt, group in groups.items()
        ]
    except ValueError as error:
        raise ValueError(_as_options(str(error))) from error


def _whole(
    sources: Sequence[SourceConfig],
    template: str | None,
    tokenizer: str,
    learnt: str,
    seq_len: int,
    cache: str,
    pictures: PictureConfig | None,
) -> Corpus:
    cfg = DataConfig(
        sources=tuple(sources),
        tokenizer=tokenizer,
        chat_template=template,
        seq_len=seq_len,
        micro_batch_rows=1,
        global_batch_rows=1,
        cache_dir=cache,
        max_bad_fraction=1.0,
    )
    corpus = _built(cfg, learnt, 0, seq_len, pictures)
    corpus = dataclasses.replace(corpus, held_out=corpus.order.pieces)
    return Corpus(corpus, tokenizer, seq_len, corpus.report.bad_row_count)


def _built(
    cfg: DataConfig, loss_on: str, seed: int, max_seq_len: int, pictures: PictureConfig | None
) -> TrainingData:  # fmt: skip
    return data.pipeline.build(
        cfg,
        tokenizer_folder=None,
        loss_on=loss_on,
        seed=seed,
        peers=Peers.alone(),
        max_seq_len=max_seq_len,
        pictures=pictures,
    )


def _usual_loss(source: SourceConfig) -> str:
    """Everything of a text; of conversations and completions the answers."""
    rows = []
    for file in list_files(source, KEY):
        if file.kind == "text":
            continue
        for start, stop, _ in READERS[file.kind].cut(file.path)[:1]:
            records = zip(range(64), READERS[file.kind].read(file.path, start, stop), strict=False)
            rows += [_text_of(row) for _, (_, row, _) in records if row is not None]
    if not rows or source.format == "text":
        return "all"
    if any("choices" in row for row in rows):
        raise ValueError(f"--data {source.path} holds questions with choices: name it with --questions {source.path}")
    form = source.format if source.format != "auto" else detect_format(rows, source.path, KEY)
    return "all" if form == "text" else "assistant"


def _text_of(row: dict[str, Any]) -> dict[str, Any]:
    """The row without its pictures, which tells what kind it is."""
    try:
        return split_row(row, "")[0]
    except RowError:  # it will be counted as a bad one
        return row


def _as_options(message: str) -> str:
    """A message of the data room about its config keys, in the words of a command line."""

    def option(found: re.Match[str]) -> str:
        return f"--{OPTIONS.get(found[1], found[1])}" + (" " if found[2] else "")

    return re.sub(r"(?:data\.sources\[\d+\]|data|stage)\.(\w+)(=?)", option, message)


@dataclass
class _Moments:
    """Of documents' (loss, tokens, bytes): how many, their sums [3], and the sums of their products [3, 3]."""

    documents: int = 0
    sums: np.ndarray = field(default_factory=lambda: np.zeros(3))
    products: np.ndarray = field(default_factory=lambda: np.zeros((3, 3)))

    def add(self, each_N3: np.ndarray) -> None:
        self.documents += len(each_N3)
        self.sums += each_N3.sum(0)
        self.products += each_N3.T @ each_N3

    def ratio(self, above: int, below: int) -> tuple[float, float | None]:
        """Sum over sum, and its standard error: documents are drawn, their tokens are not independent.

        The error of a ratio of means (Cochran, Sampling Techniques, 1977, section 6.3); None for one document.
        """
        ratio = self.sums[above] / self.sums[below]
        p, n = self.products, self.documents
        square = p[above, above] - 2 * ratio * p[above, below] + ratio**2 * p[below, below]
        if n < 2:
            return float(ratio), None
        return float(ratio), math.sqrt(max(square, 0.0) * n / (n - 1)) / float(self.sums[below])


@dataclass(frozen=True)
class ChannelLoss:
    """One channel, or all of them; errors are one standard error, over documents."""

    channel: str
    documents: int
    """Pieces of at most seq_len tokens with a supervised token."""
    tokens: int
    """Supervised tokens."""
    loss: float
    """Nats a token."""
    loss_error: float | None
    perplexity: float
    perplexity_error: float | None
    bits_per_byte: float | None
    """None where the tokenizer does not tell how many bytes a token stands for. Stop tokens stand for none."""
    bits_per_byte_error: float | None

    @staticmethod
    def of(channel: str, moments: _Moments, knows_bytes: bool) -> ChannelLoss:
        loss, error = moments.ratio(LOSS, TOKENS)
        bits, bits_error = None, None
        if knows_bytes and moments.sums[BYTES]:
            nats, nats_error = moments.ratio(LOSS, BYTES)
            bits, bits_error = nats / math.log(2), None if nats_error is None else nats_error / math.log(2)
        value = perplexity(loss)
        spread = None if error is None else value * error
        return ChannelLoss(
            channel, moments.documents, int(moments.sums[TOKENS]), loss, error, value, spread, bits, bits_error
        )


def evaluate(scorer: Scorer, corpora: Sequence[Corpus], batch_tokens: int) -> list[ChannelLoss]:
    """Losses of all documents, each channel and at last all channels together.

    Args:
        batch_tokens: most tokens of a forward pass, but at least one row of `seq_len`. Changes no result.

    Raises:
        ValueError: the tokenizer is not the model's, or nothing is supervised.
    """
    found: dict[str, _Moments] = defaultdict(_Moments)
    knows_bytes = True
    for corpus in corpora:
        check_ids(corpus.data.max_token_id, corpus.tokenizer, scorer.vocab_size)
        bytes_V = byte_lengths(load_tokenizer(corpus.tokenizer))
        knows_bytes &= bytes_V is not None
        names, rows = corpus.data.channels, max(batch_tokens // corpus.seq_len, 1)
        total = int(corpus.data.held_out.length_P.sum())
        with tqdm(total=total, unit="token", unit_scale=True, desc="losses", disable=None) as bar:
            for batch in _batches(corpus, rows):
                each_N3 = _documents(scorer, batch, bytes_V)
                channel_N = batch.doc_channel_N.numpy()
                for channel in np.unique(channel_N):
                    own = each_N3[channel_N == channel]
                    found[names[channel]].add(own[own[:, TOKENS] > 0])
                bar.update(len(batch.tokens_T))
    whole = _Moments()
    for moments in found.values():
        whole.documents += moments.documents
        whole.sums += moments.sums
        whole.products += moments.products
    if not whole.documents:
        raise ValueError(
            "the data hold no supervised token: there is no loss to measure (--loss-on all takes every token)"
        )
    told = [(name, found[name]) for name in sorted(found) if found[name].documents]
    return [ChannelLoss.of(name, moments, knows_bytes) for name, moments in [*told, (ALL, whole)]]


def _batches(corpus: Corpus, rows: int) -> Iterator[MicroBatch]:
    """The trainer's evaluation batches of one run of documents after another, so that few are in memory."""
    pieces, step = corpus.data.held_out, max(WINDOW_TOKENS // corpus.seq_len, 1)
    for start in range(0, len(pieces), step):
        part = {f.name: getattr(pieces, f.name)[start : start + step] for f in dataclasses.fields(Pieces)}
        yield from dataclasses.replace(corpus.data, held_out=Pieces(**part)).eval_batches(0, 1, rows)


def _documents(scorer: Scorer, batch: MicroBatch, bytes_V: np.ndarray | None) -> np.ndarray:
    """(loss sum, supervised tokens, their bytes) of each document, float64 [N, 3]."""
    targets_T = batch.targets_T.numpy()
    learnt_T = targets_T != IGNORED
    bytes_T = np.zeros(len(targets_T)) if bytes_V is None else bytes_V[np.where(learnt_T, targets_T, 0)] * learnt_T
    terms_T3 = np.stack([scorer.losses(batch).double().numpy(), learnt_T, bytes_T], axis=1)
    return np.add.reduceat(terms_T3, batch.cu_seqlens[:-1].numpy(), axis=0)
