"""What a Q-Former's first stage needs to know before a step: all pairs of the global batch, how they compare, and which
of them are to be matched.

A first pass without gradients gives what the model says of each picture and text. From all of that every rank makes the
loss of comparing, its exact gradient in what was said (Gao et al. 2021, GradCache), and the hard negatives; the step's
own pass then carries the gradient on. A match is computed where its picture is, and only tokens travel. So nothing
hangs on how the batch is cut over ranks and micro-batches.
Legend: N pairs of the whole global batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from data.batch import IGNORED, MicroBatch, Row
from models.dual.qformer import Matches
from parallel.dropout import mixed
from parallel.engine import Engine
from parallel.features import Shares
from parallel.groups import Groups
from trainer.losses.matching import comparing, found, hard_negatives, picture_keys, same_pairs, similarities
from trainer.retrieval import Candidates, caption_keys
from trainer.stages.clip import pairs_of
from trainer.stages.qformer import Matched, QFormerStage

HELD_OUT = -1
"""In place of a step's number: what is held out is matched with the same negatives in every evaluation."""


@dataclass(frozen=True)
class Said:
    """What the first pass said of pairs."""

    image_NQP: torch.Tensor
    text_NP: torch.Tensor
    caption_N: torch.Tensor
    """int64: the same for the same words."""
    picture_N: torch.Tensor
    """int64: the same for the same picture."""
    tokens: tuple[torch.Tensor, ...]
    """Of each caption."""
    scale: torch.Tensor


@dataclass(frozen=True)
class Matching:
    """Called with the micro-batches of a step (or of all that is held out) before it, by all ranks together: as many
    on each."""

    stage: QFormerStage
    groups: Groups
    engine: Engine
    seed: int

    def __call__(self, batches: Sequence[MicroBatch], rows: Sequence[Row] | None) -> list[Matched]:
        """The micro-batches with what is known of the whole global batch, or of all that is held out (no rows)."""
        reads = self.engine.score(batches, first_pass)
        own = said(batches, reads)
        shares = Shares.of(len(own.tokens), self.groups.data, own.text_NP.device)
        step = HELD_OUT if rows is None else self.engine.optimizer_steps
        learns, smoothing = rows is not None, self.stage.cfg.label_smoothing
        whole = Whole.of(everyones(own, shares), smoothing, self.seed, step, learns)
        words = self.groups.sum([float(sum(batch.num_targets for batch in batches))])[0]
        tower = self.engine.model.get_submodule("vision")
        keeps = not any(param.requires_grad for param in tower.parameters())
        prepared, at = [], shares.first
        for batch, read in zip(batches, reads, strict=True):
            prepared.append(whole.matched(batch, at, read.features_BSD if keeps else None, words))
            at += pairs_of(batch)
        return prepared


def first_pass(model: nn.Module, batch: MicroBatch, weight: float) -> tuple[None, Any]:
    """What the model says of pictures and texts, apart."""
    return None, model(**batch.inputs)


def said(batches: Sequence[MicroBatch], reads: Sequence[Any]) -> Said:
    """What was said of the pairs of this rank."""
    tokens, texts, captions, pictures = [], [], [], []
    for batch, read in zip(batches, reads, strict=True):
        count = pairs_of(batch)
        borders = batch.cu_seqlens.tolist()[: count + 1]
        tokens += [batch.tokens_T[start:stop] for start, stop in pairwise(borders)]
        texts.append(read.text_NP[:count])
        captions.append(caption_keys(batch, count))
        if batch.pictures is not None:
            pictures.append(picture_keys(batch.pictures.patches_PX, count))
    images, caption_N = torch.cat([read.image_NQP for read in reads]), torch.cat(captions)
    picture_N = torch.cat(pictures) if pictures else caption_N
    return Said(images, torch.cat(texts), caption_N, picture_N, tuple(tokens), reads[0].scale)


def everyones(own: Said, shares: Shares) -> Said:
    """Those of all ranks, in rank order."""
    device = own.text_NP.device
    lengths_N = torch.tensor([len(each) for each in own.tokens], dtype=torch.int64, device=device)
    flat_T = torch.cat([*own.tokens, lengths_N[:0]])
    tokens_T = Shares.of(len(flat_T), shares.axis, device).gather(flat_T)
    tokens = tokens_T.split(shares.gather(lengths_N).tolist())
    image, text, caption, picture = map(shares.gather, (own.image_NQP, own.text_NP, own.caption_N, own.picture_N))
    return Said(image, text, caption, picture, tokens, own.scale)


@dataclass(frozen=True)
class Whole:
    """The pairs of a global batch, compared with each other; on every rank the same."""

    said: Said
    compared_N: torch.Tensor
    gradient: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None
    found_KN: torch.Tensor
    """The columns `trainer.retrieval.FOUND`."""
    tasks: tuple[tuple[tuple[int, int], ...], ...]
    """For each picture the texts it is matched with: (which, whether it is one of its own)."""

    @staticmethod
    def of(said: Said, smoothing: float, seed: int, step: int, learns: bool) -> Whole:
        """
        Args:
            smoothing: of the loss of comparing.
            step: updates before this one.
            learns: whether the gradient is wanted.
        """
        image, text, scale = (
            x.detach().clone().requires_grad_(learns) for x in (said.image_NQP, said.text_NP, said.scale)
        )
        with torch.set_grad_enabled(learns):
            logits_NN = scale * similarities(image, text)
            compared_N = comparing(logits_NN, smoothing)
        gradient = None
        if learns:
            in_image, in_text, in_scale = torch.autograd.grad(compared_N.sum(), (image, text, scale))
            gradient = in_image, in_text, in_scale
        logits_NN = logits_NN.detach()
        same_NN = same_pairs(said.caption_N, said.picture_N)
        key_N = mixed(said.caption_N ^ mixed(said.picture_N.clone()))
        other_text = hard_negatives(logits_NN, same_NN, key_N, f"{seed}:{step}:text").tolist()
        other_picture = hard_negatives(logits_NN.t(), same_NN, key_N, f"{seed}:{step}:picture").tolist()
        tasks: list[list[tuple[int, int]]] = [[(n, 1)] for n in range(len(key_N))]
        for n, (negative, picture) in enumerate(zip(other_text, other_picture, strict=True)):
            if negative >= 0:
                tasks[n].append((negative, 0))
            if picture >= 0:
                tasks[picture].append((n, 0))
        found_KN = torch.stack(found(logits_NN, Candidates.of(said.caption_N)))
        return Whole(said, compared_N.detach(), gradient, found_KN, tuple(tuple(each) for each in tasks))

    def matched(self, batch: MicroBatch, first: int, features_BSD: torch.Tensor | None, words: float) -> Matched:
        """The micro-batch whose pairs begin at `first`; `words`: to write, in the global batch."""
        count, pairs = pairs_of(batch), len(self.tasks)
        part, device = slice(first, first + count), batch.tokens_T.device
        listed = [(n, text, label) for n, tasks in enumerate(self.tasks[part]) for text, label in tasks]
        texts = [self.said.tokens[text] for _, text, _ in listed]
        if not listed:
            listed, texts = [(0, 0, IGNORED)], [batch.tokens_T]
        image_M, _, label_M = torch.tensor(listed, device=device).unbind(1)
        gradient = None
        if self.gradient is not None:
            image, text, scale = self.gradient
            blank = image.new_zeros(len(batch.doc_channel_N) - count, text.shape[1])
            gradient = image[part], torch.cat([text[part], blank]), scale * (count / pairs)
        return Matched(
            batch,
            Matches(image_M, torch.cat(texts), tuple(len(each) for each in texts)),
            label_M,
            batch.doc_channel_N[image_M],
            features_BSD,
            self.compared_N[part],
            self.found_KN[:, part],
            gradient,
            pairs / sum(len(each) for each in self.tasks),
            pairs / max(words, 1.0),
        )
