"""Micro-batches: rows of packed documents as flat tensors, and the fair cut of a global batch among ranks."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from data.pictures.types import Pictures

IGNORED = -100
"""Target of a token whose next token is not learnt."""

ATTENTION_TOKENS = 16_384
"""A document of this length costs as much in attention as in everything else (about 12 x hidden size: between a
1.3B and a 7B model). Only the balance between ranks hangs on it, no result does."""


@dataclass(frozen=True)
class MicroBatch:
    """Documents one after another, without padding. Equal lengths stand side by side: attention can batch them."""

    tokens_T: torch.Tensor
    """int64 [T]"""
    positions_T: torch.Tensor
    """int64 [T]: from 0 in each document, whoever holds its beginning."""
    targets_T: torch.Tensor
    """int64 [T]: the next token of the same document where that is learnt, else IGNORED."""
    cu_seqlens: torch.Tensor
    """int32 [N+1]: document n is [cu_seqlens[n], cu_seqlens[n+1]), but for the beginning that another one holds."""
    max_seqlen: int
    """Tokens of the longest document."""
    doc_channel_N: torch.Tensor
    """int64 [N]: index into TrainingData.channels."""
    targets_N: torch.Tensor
    """int64 [N]: targets of each document."""
    doc_facts: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """float64 [N] each: what a stage knows of a document besides its tokens (the side of a pair, a label, a score)."""
    token_facts: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """fp32 [T] each: what a stage knows of a token (an advantage, an old log-probability), where the token is the
    target; 0 where there is none."""
    place_T: torch.Tensor | None = None
    """int64 [T]: where the tokens here stand among those of the documents; None = here are all of them, in order.
    Under context parallel a rank has some, while what is told of documents still tells of all."""
    pictures: Pictures | None = None
    """What the tokens that stand for pictures show; None where no document has any."""
    rotary_3T: torch.Tensor | None = None
    """int64 [3, T]: time, row and column of each token, where the model's positions are three numbers."""
    branches: tuple[tuple[int, int], ...] = ()
    """For each document who holds its beginning, and how many tokens that is: it begins with the first so many of that
    one, which are here once. Empty = every document has all its tokens."""

    @cached_property
    def doc_T(self) -> torch.Tensor:
        """int64 [T]: the document of each token here."""
        device = self.doc_channel_N.device
        lengths_N = (self.cu_seqlens[1:] - self.cu_seqlens[:-1]).to(device)
        doc_T = torch.repeat_interleave(torch.arange(len(lengths_N), device=device), lengths_N)
        return doc_T if self.place_T is None else doc_T[self.place_T]

    @cached_property
    def channel_T(self) -> torch.Tensor:
        """int64 [T]: the channel of each token here."""
        return self.doc_channel_N[self.doc_T]

    @property
    def inputs(self) -> dict[str, Any]:
        """What a model, or any chunk of one, is called with."""
        return {
            "tokens_T": self.tokens_T,
            "positions_T": self.positions_T,
            "cu_seqlens": self.cu_seqlens,
            "max_seqlen": self.max_seqlen,
            "channel_T": self.channel_T,
            **({"branches": self.branches} if self.branches else {}),
            **({} if self.pictures is None else {"pictures": self.pictures}),
            **({} if self.rotary_3T is None else {"rotary_3T": self.rotary_3T}),
        }

    @cached_property
    def num_targets(self) -> int:
        """Targets that are not IGNORED."""
        return int((self.targets_T != IGNORED).sum())


@dataclass(frozen=True)
class Row:
    """One row of an epoch: which pieces it holds. Light: tokens are read when a micro-batch is made."""

    pieces: tuple[int, ...]
    lengths: tuple[int, ...]
    """Tokens of each piece."""
    looked: float = 0.0
    """Work of looking at its pictures, in tokens."""

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    @property
    def cost(self) -> float:
        """Work of the row, in tokens: pictures, linear part, and attention, which is quadratic within a document."""
        return self.looked + sum(length + length * length / ATTENTION_TOKENS for length in self.lengths)


@dataclass(frozen=True)
class Document:
    """A piece of a sample with its tokens."""

    tokens_L: np.ndarray
    learn_L: np.ndarray
    """bool [L]: is this token learnt (as the target of the token before)."""
    channel: int
    facts: Mapping[str, float] = field(default_factory=dict)
    """See MicroBatch.doc_facts; all documents of a micro-batch have the same ones."""
    token_facts: Mapping[str, np.ndarray] = field(default_factory=dict)
    """float [L] each, see MicroBatch.token_facts: one number a token of the document."""
    pictures: Pictures | None = None
    """Its pictures; `slots_F` counts from its first token."""
    features: int = 0
    """Features that the tiles of its pictures have."""
    rotary_3L: np.ndarray | None = None
    """int64 [3, L]: time, row and column of each token, where the model's positions are three numbers."""


def split_rows(rows: Sequence[Row], rank: int, world: int, micro_batch_rows: int) -> list[list[Row]]:
    """The rows of each of this rank's micro-batches; all ranks' together are `rows`, each once.

    Heaviest first into the lightest micro-batch with room (LPT); then micro-batches are dealt by weight, so that those
    which ranks compute at the same time are alike. Deterministic in `rows` and the layout.

    Returns:
        len(rows) / (world x micro_batch_rows) lists of micro_batch_rows rows.

    Raises:
        ValueError: the rows do not divide.
    """
    bins = _balance(rows, _num_bins(len(rows), world, micro_batch_rows), micro_batch_rows)
    return bins[rank::world]


def split_ragged(rows: Sequence[Row], rank: int, world: int, micro_batch_rows: int, fewest: int = 0) -> list[list[Row]]:
    """Like `split_rows` for any number of rows: equally many lists on every rank, of at most micro_batch_rows rows.

    ``fewest``: so many lists a rank at least. A list is empty only where there are fewer rows than lists.
    """
    per_rank = max(fewest, -(-len(rows) // (world * micro_batch_rows)))
    return _balance(rows, per_rank * world, micro_batch_rows)[rank::world]


def collate(documents: Sequence[Document], share: str | None = None) -> MicroBatch:
    """Documents as one MicroBatch, longest first (the order of equals is kept).

    ``share``: the name of a fact. Documents in which it is the same number have the tokens that they begin with in
    common once, as far as nothing is learnt there; they stand side by side.
    """
    docs = sorted(documents, key=lambda doc: -len(doc.tokens_L))
    if share is not None:
        docs = _side_by_side(docs, share)
    branches = _beginnings(docs, share) if share is not None else ()
    kept_N = np.array([tokens for _, tokens in branches] or [0] * len(docs), dtype=np.int64)
    docs = [_behind(doc, tokens) if tokens else doc for doc, tokens in zip(docs, kept_N.tolist(), strict=True)]
    lengths_N = np.array([len(doc.tokens_L) for doc in docs], dtype=np.int64)
    assert len(docs) and lengths_N.min() > 0, "a micro-batch needs a document, a document needs a token"
    borders = np.concatenate([[0], np.cumsum(lengths_N)])
    tokens_T = np.concatenate([doc.tokens_L for doc in docs]).astype(np.int64)
    learn_T = np.concatenate([doc.learn_L for doc in docs])
    learn_T[borders[:-1]] = False  # the first token of a document is nobody's next token
    targets_T = np.full(len(tokens_T), IGNORED, dtype=np.int64)
    targets_T[:-1] = np.where(learn_T[1:], tokens_T[1:], IGNORED)
    facts, token_facts = docs[0].facts, docs[0].token_facts
    assert all(doc.facts.keys() == facts.keys() and doc.token_facts.keys() == token_facts.keys() for doc in docs)
    positions_T = np.arange(len(tokens_T)) - np.repeat(borders[:-1] - kept_N, lengths_N)
    return MicroBatch(
        tokens_T=torch.from_numpy(tokens_T),
        positions_T=torch.from_numpy(positions_T),
        targets_T=torch.from_numpy(targets_T),
        cu_seqlens=torch.from_numpy(borders.astype(np.int32)),
        max_seqlen=int((lengths_N + kept_N).max()),
        doc_channel_N=torch.tensor([doc.channel for doc in docs], dtype=torch.int64),
        targets_N=torch.from_numpy(np.add.reduceat(learn_T, borders[:-1], dtype=np.int64)),
        doc_facts={name: torch.tensor([doc.facts[name] for doc in docs], dtype=torch.float64) for name in facts},
        token_facts={name: _at_targets([doc.token_facts[name] for doc in docs], learn_T) for name in token_facts},
        branches=branches if kept_N.any() else (),
        pictures=_pictures_of(docs, borders),
        rotary_3T=_rotary_of(docs, kept_N),
    )


def _rotary_of(docs: Sequence[Document], kept_N: np.ndarray) -> torch.Tensor | None:
    """`kept_N`: tokens that stand before those of each document, at another one."""
    if all(doc.rotary_3L is None for doc in docs):
        return None
    plain = [np.tile(n + np.arange(len(doc.tokens_L)), (3, 1)) for doc, n in zip(docs, kept_N, strict=True)]
    own = [each if doc.rotary_3L is None else doc.rotary_3L for doc, each in zip(docs, plain, strict=True)]
    return torch.from_numpy(np.concatenate(own, 1))


def _pictures_of(docs: Sequence[Document], borders: np.ndarray) -> Pictures | None:
    seen = [(doc, int(start)) for doc, start in zip(docs, borders, strict=False) if doc.pictures is not None]
    if not seen:
        return None
    parts = [doc.pictures for doc, _ in seen if doc.pictures is not None]
    return Pictures.join(parts, [start for _, start in seen], [doc.features for doc, _ in seen])


def _side_by_side(docs: Sequence[Document], share: str) -> list[Document]:
    groups: dict[float, list[Document]] = {}
    for doc in docs:
        groups.setdefault(doc.facts[share], []).append(doc)
    return [doc for group in groups.values() for doc in group]


def _beginnings(docs: Sequence[Document], share: str) -> tuple[tuple[int, int], ...]:
    """For each document the first of its group, and how many tokens that one holds of it."""
    found: list[tuple[int, int]] = []
    for number, doc in enumerate(docs):
        first = found[-1][0] if number and docs[number - 1].facts[share] == doc.facts[share] else number
        found.append((first, shared_tokens(docs[first], doc) if first < number else 0))
    return tuple(found)


def shared_tokens(holder: Document, other: Document) -> int:
    """How many tokens of ``other`` need not be there beside ``holder``: what both begin with, up to the token that
    predicts the first learnt one. Pictures there are the same: both belong to one row or one prompt."""
    most = min(len(holder.tokens_L), len(other.tokens_L) - 1)
    differ = np.flatnonzero(holder.tokens_L[:most] != other.tokens_L[:most])
    learnt = np.flatnonzero(other.learn_L[1:])
    return min([most, *(int(where[0]) for where in (differ, learnt) if len(where))])


def _behind(doc: Document, tokens: int) -> Document:
    """The document without its first tokens."""
    rest = {name: fact_L[tokens:] for name, fact_L in doc.token_facts.items()}
    pictures, rotary = doc.pictures, doc.rotary_3L
    if pictures is not None:  # one that the border goes through is looked at by both
        left_F = pictures.slots_F >= tokens
        slots_F, order_F = pictures.slots_F[left_F] - tokens, pictures.order_F[left_F]
        pictures = replace(pictures, slots_F=slots_F, order_F=order_F) if len(slots_F) else None
    return replace(
        doc,
        tokens_L=doc.tokens_L[tokens:],
        learn_L=doc.learn_L[tokens:],
        token_facts=rest,
        pictures=pictures,
        features=doc.features if pictures is not None else 0,
        rotary_3L=None if rotary is None else rotary[:, tokens:],
    )


def _at_targets(parts: Sequence[np.ndarray], learn_T: np.ndarray) -> torch.Tensor:
    """Numbers of tokens where those tokens are targets: one place earlier, fp32 [T]."""
    at_T = np.zeros(len(learn_T), dtype=np.float32)
    at_T[:-1] = np.where(learn_T[1:], np.concatenate(parts)[1:], 0.0)
    return torch.from_numpy(at_T)


def empty_micro_batch(facts: Sequence[str] = (), token_facts: Sequence[str] = ()) -> MicroBatch:
    """One token without a target: keeps a rank in step with others when it has nothing left to do. Facts are 0."""
    token = np.zeros(1, dtype=np.int64)
    nothing = {name: np.zeros(1) for name in token_facts}
    return collate([Document(token, token.astype(bool), 0, dict.fromkeys(facts, 0.0), nothing)])


def _num_bins(rows: int, world: int, micro_batch_rows: int) -> int:
    if rows % (world * micro_batch_rows):
        raise ValueError(
            f"data.global_batch_rows={rows} is not a multiple of ranks x data.micro_batch_rows = "
            f"{world} x {micro_batch_rows} = {world * micro_batch_rows}; "
            f"set data.global_batch_rows={-(-rows // (world * micro_batch_rows)) * world * micro_batch_rows}"
        )
    return rows // micro_batch_rows


def _balance(rows: Sequence[Row], num_bins: int, capacity: int) -> list[list[Row]]:
    costs = [row.cost for row in rows]
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    lightest = [(0.0, index) for index in range(num_bins)]
    for number in sorted(range(len(rows)), key=lambda number: (-costs[number], number)):
        cost, index = heapq.heappop(lightest)
        bins[index].append(number)
        if len(bins[index]) < capacity:
            heapq.heappush(lightest, (cost + costs[number], index))
    by_weight = sorted(bins, key=lambda numbers: (-sum(costs[n] for n in numbers), numbers))
    return [[rows[number] for number in sorted(numbers)] for numbers in by_weight]
