"""What a preference loss needs to know before a step: a reference's log-probabilities, KTO's baseline, a denominator.

All of it is of the global batch or of a document, so that it hangs on no layout. It is written into the facts of the
micro-batches, where the stage reads it. Legend: N documents of a micro-batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from data.batch import MicroBatch, Row
from parallel.engine import Engine, Forward
from parallel.groups import Groups
from parallel.sharding import Axis
from trainer.losses.preference import kl_baseline
from trainer.stages.dpo import Dpo, log_prob_sums
from trainer.stages.kto import Kto


class Scorer(Protocol):
    """A model that is asked and not trained: a frozen one, or a trained one between two steps."""

    def score(self, micro_batches: Sequence[MicroBatch], forward: Forward) -> list[Any]:
        """See ``parallel.engine.Engine.score``."""
        ...


@dataclass(frozen=True)
class Preparation:
    """Called with the micro-batches of a step (this rank's tokens, on the device) before the step.

    ``reference`` is None for a loss that has none, or whose log-probabilities come with the data. ``others`` gives this
    rank's share of the answers to other prompts of the rows of a step (None: of what is held out).
    """

    stage: Dpo | Kto
    groups: Groups
    engine: Engine
    reference: Scorer | None
    others: Callable[[Sequence[Row] | None], list[MicroBatch]]
    held_out: list[MicroBatch] = field(default_factory=list)
    """What is held out is the same in every evaluation, and so is what the reference says of it."""

    def __call__(self, batches: list[MicroBatch], rows: Sequence[Row] | None) -> list[MicroBatch]:
        """The micro-batches with ``reference``, ``baseline`` and ``sft_scale`` among their facts, as far as the loss
        reads them and this rank computes it."""
        if self.reference is not None and rows is not None:
            batches = with_reference(batches, self.reference, self.groups.cp)
        elif self.reference is not None:
            if not self.held_out:
                self.held_out.extend(with_reference(batches, self.reference, self.groups.cp))
            batches = list(self.held_out)
        if isinstance(self.stage, Kto):
            baseline = self._baseline(rows)
            batches = [_with_fact(batch, "baseline", baseline) for batch in batches]
        if self.stage.cfg.weight_of_sft:
            sums = [self.stage.count(batches), self.stage.sft_tokens(batches)]
            count, tokens = self.groups.sum(sums)
            batches = [_with_fact(batch, "sft_scale", count / max(tokens, 1.0)) for batch in batches]
        return batches

    def _baseline(self, rows: Sequence[Row] | None) -> float:
        """KTO's reference point: the mean log-ratio of answers to other prompts over the whole global batch."""
        assert self.reference is not None
        others, forward = self.others(rows), reference_forward(self.groups.cp)
        ours, theirs = self.engine.score(others, forward), self.reference.score(others, forward)
        ratio = sum(float((a_N - b_N).sum()) for a_N, b_N in zip(ours, theirs, strict=True))
        count = sum(float((batch.targets_N > 0).sum()) for batch in others)
        ratio, count = self.groups.sum([ratio, count])  # cp ranks have the same, which cancels
        return kl_baseline(ratio, max(count, 1.0))


def with_reference(batches: list[MicroBatch], reference: Scorer, cp: Axis) -> list[MicroBatch]:
    """The micro-batches with the reference's log-probability of each document, on ranks that have the head."""
    scores = reference.score(batches, reference_forward(cp))
    if not scores:
        return batches
    return [_with_fact(batch, "reference", sums_N) for batch, sums_N in zip(batches, scores, strict=True)]


def reference_forward(cp: Axis) -> Forward:
    """The log-probability of each document's learnt tokens, float64 [N], as the second of what a forward gives."""

    def forward(model: nn.Module, batch: MicroBatch, weight: float) -> tuple[None, torch.Tensor]:
        return None, log_prob_sums(model, batch, cp).detach().double()

    return forward


def _with_fact(batch: MicroBatch, name: str, value: torch.Tensor | float) -> MicroBatch:
    value_N = value
    if not isinstance(value_N, torch.Tensor):
        value_N = torch.full_like(batch.targets_N, value_N, dtype=torch.float64)  # pyright: ignore
    return dataclasses.replace(batch, doc_facts={**batch.doc_facts, name: value_N})
