"""Made-up training rows that a layout cannot treat evenly: documents of 1 token to a whole row, few targets in some,
channels that most rows do not have. For preferences pairs or judged answers, for a policy samples with advantages. A
model that sees is shown pictures of noise, none in most documents, several tiles in others; one that compares them with
texts one for each, and some texts come twice."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from data.batch import Document, MicroBatch, Row, collate, empty_micro_batch, split_ragged, split_rows
from data.config import DataConfig
from data.mismatched import dealt, mismatched
from data.pictures.geometry import plan
from data.pictures.loader import gathered
from data.pictures.positions import rotary_positions
from data.pictures.types import PictureConfig
from trainer.config import shares_prompts
from trainer.stages import NextTokenConfig, PolicyConfig, StageConfig

CHANNELS = ("most", "some", "rare")
EVAL_ROWS = 3
_EVAL_SEED = 2**20
_MOST = 8
"""More documents, or pairs, than a row has."""


class MadeUpRows:
    """Stands in for ``data.pipeline.TrainingData``.

    Args:
        cfg: the data section; its sources are not read.
        vocab: ids are below it.
        stage: says what is learnt, and what has to be known of tokens and documents besides.
        pictures: how a model that sees is shown them; None for others.
    """

    channels = CHANNELS
    look = None

    def __init__(self, cfg: DataConfig, vocab: int, stage: StageConfig, pictures: PictureConfig | None = None) -> None:
        self.cfg, self.vocab, self.stage = cfg, vocab, stage
        self.share = "pair" if shares_prompts(stage) else None
        self.pictures = pictures if self.share is None and stage.learns_from != "unpaired" else None

    def global_batch(self, position: int, rows: int) -> list[Row]:
        """The rows of one step, the same at every layout."""
        numbers = range(position, position + rows)
        return [Row((n,), tuple(len(doc.tokens_L) for doc in self.row(n))) for n in numbers]

    def micro_batches(self, rows: Sequence[Row], rank: int, world: int, micro_batch_rows: int) -> list[MicroBatch]:
        """A rank's micro-batches, dealt out by the rule of training."""
        return [self._micro_batch(part) for part in split_rows(rows, rank, world, micro_batch_rows)]

    def eval_batches(self, rank: int, world: int, micro_batch_rows: int) -> list[MicroBatch]:
        """A rank's share of the held-out rows; they do not divide evenly."""
        mine = split_ragged(self.global_batch(_EVAL_SEED, EVAL_ROWS), rank, world, micro_batch_rows)
        return [self._micro_batch(part) for part in mine]

    def mismatched_batches(
        self, rows: Sequence[Row] | None, rank: int, world: int, micro_batch_rows: int
    ) -> list[MicroBatch]:
        """A rank's share of the answers to other prompts of some rows, None: of those held out."""
        rows = self.global_batch(_EVAL_SEED, EVAL_ROWS) if rows is None else rows
        documents = [doc for row in rows for doc in self.row(row.pieces[0])]
        return dealt(mismatched(documents, self.cfg.seq_len), self.cfg.seq_len, rank, world, micro_batch_rows)

    def _micro_batch(self, rows: Sequence[Row]) -> MicroBatch:
        if not rows:
            like = self.row(0)[0]
            return empty_micro_batch(tuple(like.facts), tuple(like.token_facts))
        return collate([doc for row in rows for doc in self.row(row.pieces[0])], self.share)

    def row(self, number: int) -> list[Document]:
        """Row ``number`` of the run, as long as data.seq_len or shorter."""
        random = np.random.default_rng([11, number])
        found = self._row(number, random)
        seen = self.pictures
        if seen is None:
            return found
        return [_shown(doc, seen, random) if number % 3 or seen.placeless else doc for doc in found]

    def _row(self, number: int, random: np.random.Generator) -> list[Document]:
        if self.stage.learns_from == "preference":
            return self._pairs(number, random)
        if self.stage.learns_from == "captions":
            random = np.random.default_rng([11, number, 1]) if number % 5 < 4 else np.random.default_rng([11, 0, 1])
            tokens = random.integers(0, self.vocab, size=random.integers(2, self.cfg.seq_len + 1))
            return [Document(tokens, np.ones(len(tokens), dtype=bool), self._channel(number))]
        if isinstance(self.stage, NextTokenConfig):
            return [
                Document(random.integers(0, self.vocab, size=n), self._learns(n, random), self._channel(number))
                for n in self._lengths(number, random)
            ]
        return [self._answer(number, i, max(n, 2), random) for i, n in enumerate(self._lengths(number, random))]

    def _lengths(self, number: int, random: np.random.Generator) -> list[int]:
        space = self.cfg.seq_len
        if self.cfg.packing == "none" or number % 4 == 1:
            return [space if number % 4 == 1 else int(random.integers(2, space + 1))]
        lengths = []
        while space > 2 and len(lengths) < 6:
            lengths.append(int(random.integers(1, space)))
            space -= lengths[-1]
        return lengths

    def _learns(self, length: int, random: np.random.Generator) -> np.ndarray:
        learn = np.ones(length, dtype=bool)
        if not (isinstance(self.stage, NextTokenConfig) and self.stage.loss_on == "all"):
            learn[: random.integers(1, max(length - 1, 2))] = False
            learn[random.random(length) < 0.2] = False
            learn[-1] = True
        return learn

    def _answer(self, number: int, which: int, length: int, random: np.random.Generator) -> Document:
        """A judged answer, or a sample of a policy; the log-probabilities are those of an even guess, more or less."""
        tokens, learn = random.integers(0, self.vocab, size=length), self._learns(length, random)
        if not isinstance(self.stage, PolicyConfig):
            return Document(tokens, learn, self._channel(number), {"label": float((number + which) % 2)})
        facts = {"advantage": np.full(length, random.normal())}
        names = [
            "generated",
            *(["old"] if self.stage.moves else []),
            *(["reference"] if self.stage.kl == "loss" else []),
        ]
        for name in names:
            facts[name] = random.normal(-np.log(self.vocab), 0.3, size=length)
        return Document(tokens, learn, self._channel(number), {}, facts)

    def _pairs(self, number: int, random: np.random.Generator) -> list[Document]:
        """Pairs that fill the row or leave some of it, the prompt at least a token, and so each answer."""
        found: list[Document] = []
        space, channel = self.cfg.seq_len, self._channel(number)
        while space >= 4 and len(found) < 2 * 3:
            each = space // 2 if number % 4 == 1 else int(random.integers(2, space // 2 + 1))
            prompt = random.integers(0, self.vocab, size=random.integers(1, each))
            facts = {"pair": float(_MOST * number + len(found) // 2), "margin": float(random.random())}
            for side in (0, 1):
                length = each if side == 0 else int(random.integers(len(prompt) + 1, each + 1))
                answer = random.integers(0, self.vocab, size=length - len(prompt))
                learn = np.arange(length) >= len(prompt)
                found.append(Document(np.concatenate([prompt, answer]), learn, channel, {"side": float(side), **facts}))
                space -= length
        return found

    def _channel(self, number: int) -> int:
        return 2 if number % 7 == 3 else 1 if number % 3 == 2 else 0


def _shown(doc: Document, cfg: PictureConfig, random: np.random.Generator) -> Document:
    """The document with a picture somewhere among its tokens, if it is long enough for one."""
    side = cfg.tile or 4 * cfg.patch * cfg.block
    width, height = (int(side * random.uniform(0.5, 2.0)) for _ in range(2))
    planned, length = plan(width, height, cfg), len(doc.tokens_L)
    if length < planned.tokens + 2:
        return doc
    start = int(random.integers(0, length - planned.tokens - 1))
    patches = sum(rows * cols for rows, cols in planned.grids)
    numbers = random.standard_normal((patches, 3 * cfg.frames * cfg.patch**2), dtype=np.float32)
    pictures, features = gathered([planned], [torch.from_numpy(numbers)], [start], cfg)
    learn_L = doc.learn_L.copy()
    learn_L[start : start + planned.tokens] = False
    rotary_3L = rotary_positions(length, [(start, planned.shape)]) if cfg.rotary else None
    return dataclasses.replace(doc, learn_L=learn_L, pictures=pictures, features=features, rotary_3L=rotary_3L)
