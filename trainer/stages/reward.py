"""A reward model: one score of an answer, learnt from pairs of which one is better.

The score is what the scalar head says at the last token of the document. Legend: N documents, P pairs, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from data.batch import MicroBatch
from parallel.sharding import ALONE, Axis
from trainer.channels import by_channel
from trainer.losses.preference import bradley_terry
from trainer.sequences import document_sums
from trainer.stages.pairs import PAIR_COLUMNS, num_pairs, pair_documents, pair_terms

Problem = tuple[str, object, str, str]


@dataclass(frozen=True)
class RewardConfig:
    """A reward model from preference pairs; needs model.head=scalar, which the group sets."""

    name: Literal["reward"] = "reward"
    """Which training stage to run."""
    margin: float = 0.0
    """By how much the scores of a pair shall differ; added to what a row says itself in its field `margin`."""
    label_smoothing: float = 0.0
    """Share of pairs whose labels are believed to be swapped."""
    centring: float = 0.0
    """Weight of (chosen + rejected score) squared, which keeps scores around 0; 0.01 is usual."""
    share_prompt: bool = False
    """Compute what both answers of a pair begin with once: less work for long prompts and short answers. Not with
    context parallel, routers or dynamic rope."""

    @property
    def learns_from(self) -> Literal["preference"]:
        """The kind of data."""
        return "preference"

    def problems(self) -> list[Problem]:
        """Values wrong in themselves, as (key, value, reason, way out)."""
        rules = [
            (
                "label_smoothing",
                0 <= self.label_smoothing < 0.5,
                "is a share of swapped labels: at least 0 and below 0.5",
                "stage.label_smoothing=0.1",
            ),
            ("centring", self.centring >= 0, "cannot be negative", "stage.centring=0.01"),
        ]
        return [(f"stage.{key}", getattr(self, key), why, way) for key, good, why, way in rules if not good]


class Reward:
    """Bradley-Terry loss of pairs of scores.

    Args:
        cfg: the stage section.
        num_channels: number of channels of the run.
        cp: ranks that share the tokens of a document.
    """

    contract = (
        "loss = sum over pairs of -log sigmoid(score of chosen - score of rejected - margin) / number of pairs,\n"
        "       both taken over the whole global batch: all ranks, all micro-batches, counted before the backward.\n"
        "       A score is the scalar head's value at the last token of a document, which never sees another one."
    )
    columns = PAIR_COLUMNS

    def __init__(self, cfg: RewardConfig, num_channels: int, cp: Axis = ALONE):
        self.cfg, self.num_channels, self.cp = cfg, num_channels, cp

    def count(self, micro_batches: Sequence[MicroBatch]) -> float:
        """This rank's share of the pairs."""
        return sum(num_pairs(batch) for batch in micro_batches) / self.cp.size

    def forward(self, model: nn.Module, batch: MicroBatch, weight: float) -> tuple[torch.Tensor, torch.Tensor]:
        """``weight`` times the summed loss of the pairs of one micro-batch, and its columns by channel."""
        scores_N = document_scores(model, batch, self.cp)
        documents_P2 = pair_documents(batch)
        chosen_P, rejected_P = scores_N[documents_P2].unbind(1)
        margin_P = self.cfg.margin
        if "margin" in batch.doc_facts:
            margin_P = margin_P + batch.doc_facts["margin"][documents_P2[:, 0]].float()
        loss_P = bradley_terry(chosen_P, rejected_P, margin_P, self.cfg.label_smoothing, self.cfg.centring)
        terms = [term / self.cp.size for term in pair_terms(loss_P, chosen_P, rejected_P)]
        channel_P = batch.doc_channel_N[documents_P2[:, 0]]
        return weight * loss_P.sum(), by_channel(terms, channel_P, self.num_channels)


def document_scores(model: nn.Module, batch: MicroBatch, cp: Axis) -> torch.Tensor:
    """What a model with a scalar head says at the last token of each document, fp32 [N]; differentiable."""
    values_T = model(**batch.inputs, output="head")
    ends_N = batch.cu_seqlens[1:].to(values_T.device) - 1
    place_T = batch.place_T if batch.place_T is not None else torch.arange(len(values_T), device=values_T.device)
    return document_sums(torch.where(place_T == ends_N[batch.doc_T], values_T, 0.0), batch, cp)
