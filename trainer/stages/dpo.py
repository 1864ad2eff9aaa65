"""Learning from preferences without a reward model: DPO and its kin, on pairs of answers.

Legend: N documents of a micro-batch, P its pairs, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from data.batch import MicroBatch
from parallel.sharding import ALONE, Axis
from trainer.channels import Column, by_channel
from trainer.losses.preference import (
    PAIR_LOSSES,
    Pairs,
    Settings,
    implicit_rewards,
    negative_log_likelihood,
)
from trainer.sequences import document_sums
from trainer.stages.pairs import PAIR_COLUMNS, num_pairs, pair_documents, pair_terms

Problem = tuple[str, object, str, str]


@dataclass(frozen=True)
class DpoConfig:
    """Direct preference optimisation and its kin: pairs of answers, for loss=kto single judged answers."""

    name: Literal["dpo"] = "dpo"
    """Which training stage to run."""
    loss: Literal[
        "sigmoid", "ipo", "hinge", "robust", "sppo", "apo_zero", "apo_down", "kto", "orpo", "simpo", "cpo"
    ] = "sigmoid"
    """sigmoid (DPO), ipo, hinge, robust (label noise), sppo, apo_zero, apo_down; kto for unpaired answers; without a
    reference: orpo, simpo, cpo."""
    beta: float = 0.1
    """Strength of the preference: the reward of an answer is beta x its log-ratio to the reference. SimPO wants 2 to
    2.5."""
    label_smoothing: float = 0.0
    """Share of pairs whose labels are believed to be swapped (sigmoid, robust, simpo, cpo)."""
    sft_weight: float | None = None
    """Weight of the next-token loss of the chosen answers, over all their tokens; null = as published: 1 for orpo and
    cpo, else 0. Of kto of the desirable ones."""
    gamma: float = 0.5
    """By how much the rewards of a pair shall differ (simpo)."""
    desirable_weight: float = 1.0
    """Weight of desirable answers (kto)."""
    undesirable_weight: float = 1.0
    """Weight of undesirable answers (kto)."""
    reference: str | None = None
    """Weights of the reference: a folder as for init_from; null = what the run starts from: with an adapter the model
    without it, or with that of adapter.start. Losses without a reference load none."""
    precompute_reference: bool = False
    """Compute the reference's log-probabilities once, before the first step, and keep them beside the token cache:
    then the reference's weights are not in memory while training."""
    share_prompt: bool = False
    """Compute what both answers of a pair begin with once: less work for long prompts and short answers. Not with
    context parallel, routers or dynamic rope."""

    @property
    def learns_from(self) -> Literal["preference", "unpaired"]:
        """The kind of data."""
        return "unpaired" if self.loss == "kto" else "preference"

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares with a reference."""
        return self.loss == "kto" or PAIR_LOSSES[self.loss].needs_reference

    @property
    def weight_of_sft(self) -> float:
        """``sft_weight``, or what the loss was published with."""
        if self.sft_weight is not None:
            return self.sft_weight
        return 0.0 if self.loss == "kto" else PAIR_LOSSES[self.loss].sft_weight

    def problems(self) -> list[Problem]:
        """Values wrong in themselves, as (key, value, reason, way out)."""
        share = "is a share of swapped labels: at least 0 and below 0.5"
        rules = [
            ("beta", self.beta > 0, "must be above 0", "stage.beta=0.1"),
            ("label_smoothing", 0 <= self.label_smoothing < 0.5, share, "stage.label_smoothing=0.1"),
            ("sft_weight", (self.sft_weight or 0) >= 0, "cannot be negative", "stage.sft_weight=0"),
            ("gamma", self.gamma >= 0, "cannot be negative", "stage.gamma=0.5"),
            ("desirable_weight", self.desirable_weight > 0, "must be above 0", "stage.desirable_weight=1"),
            ("undesirable_weight", self.undesirable_weight > 0, "must be above 0", "stage.undesirable_weight=1"),
            (
                "precompute_reference",
                not (self.precompute_reference and self.loss == "kto"),
                "stage.loss=kto also scores each prompt with an answer to another one, which changes with every step",
                "stage.precompute_reference=false",
            ),
        ]
        return [(f"stage.{key}", getattr(self, key), why, way) for key, good, why, way in rules if not good]

    def ignored(self) -> list[str]:
        """Settings that were given but belong to another loss; one sentence each."""
        smooths = self.loss != "kto" and PAIR_LOSSES[self.loss].smooths
        readers = {
            "label_smoothing": smooths,
            "gamma": self.loss == "simpo",
            "desirable_weight": self.loss == "kto",
            "undesirable_weight": self.loss == "kto",
            "reference": self.needs_reference,
            "precompute_reference": self.needs_reference,
            "share_prompt": self.learns_from == "preference",
        }
        given = [name for name, read in readers.items() if not read and getattr(self, name) != getattr(DpoConfig, name)]
        shown = {True: "true", False: "false"}
        return [
            f"stage.{name}={shown.get(value, value) if isinstance(value, bool) else value} is ignored: "
            f"stage.loss={self.loss} {'has no reference' if 'reference' in name else 'does not read it'}"
            for name, value in ((name, getattr(self, name)) for name in given)
        ]


class Dpo:
    """A loss of pairs of log-probabilities.

    Accuracy compares rewards, all of them 0 before the first step of a policy that is its own reference. The share of
    pairs whose chosen answer the policy itself finds more probable, ``preferred``, can be compared over time.

    Micro-batches come with `doc_facts["reference"]`, where the loss has a reference, and `doc_facts["sft_scale"]`
    (pairs / chosen tokens of the global batch), where it has a next-token term; see ``trainer.preparation``.

    Args:
        cfg: the stage section.
        num_channels: number of channels of the run.
        cp: ranks that share the tokens of a document.
    """

    columns = (
        *PAIR_COLUMNS,
        Column("preferred", over="pairs"),
        Column("chosen_log_prob", over="chosen_tokens"),
        Column("rejected_log_prob", over="rejected_tokens"),
        Column("chosen_tokens"),
        Column("rejected_tokens"),
    )

    def __init__(self, cfg: DpoConfig, num_channels: int, cp: Axis = ALONE):
        self.cfg, self.num_channels, self.cp = cfg, num_channels, cp
        self.loss = PAIR_LOSSES[cfg.loss]
        self.settings = Settings(cfg.beta, cfg.label_smoothing, cfg.gamma)
        sft = f" + {cfg.weight_of_sft:g} x next-token loss of the chosen answers" if cfg.weight_of_sft else ""
        reference = (
            "log-probabilities are the policy's and the reference's"
            if self.loss.needs_reference
            else ("there is no reference")
        )
        self.contract = (
            f"loss = sum over pairs of the {cfg.loss} loss (beta {cfg.beta:g}) / number of pairs{sft},\n"
            "       taken over the whole global batch: all ranks, all micro-batches, counted before the backward.\n"
            f"       Of each answer the learnt tokens count; {reference}. A document never sees another one."
        )  # fmt: skip

    def count(self, micro_batches: Sequence[MicroBatch]) -> float:
        """This rank's share of the pairs."""
        return sum(num_pairs(batch) for batch in micro_batches) / self.cp.size

    def sft_tokens(self, micro_batches: Sequence[MicroBatch]) -> float:
        """This rank's share of the tokens of the next-token term."""
        return sum(float(b.targets_N[pair_documents(b)[:, 0]].sum()) for b in micro_batches) / self.cp.size

    def forward(self, model: nn.Module, batch: MicroBatch, weight: float) -> tuple[torch.Tensor, torch.Tensor]:
        """``weight`` times the summed loss of the pairs of one micro-batch, and its columns by channel."""
        documents_P2 = pair_documents(batch)
        pairs = self._pairs(log_prob_sums(model, batch, self.cp), batch, documents_P2)
        loss_P = self.loss.function(pairs, self.settings)
        if self.cfg.weight_of_sft:
            scale_P = batch.doc_facts["sft_scale"][documents_P2[:, 0]].float()
            loss_P = loss_P + self.cfg.weight_of_sft * scale_P * negative_log_likelihood(pairs)
        rewards = implicit_rewards(pairs, self.cfg.loss, self.cfg.beta)
        counts = pairs.chosen_tokens_P, pairs.rejected_tokens_P
        preferred_P = pairs.chosen_P > pairs.rejected_P
        terms = pair_terms(loss_P, *rewards, preferred_P, pairs.chosen_P, pairs.rejected_P, *counts)
        channel_P = batch.doc_channel_N[documents_P2[:, 0]]
        return weight * loss_P.sum(), by_channel([t / self.cp.size for t in terms], channel_P, self.num_channels)

    def _pairs(self, sums_N: torch.Tensor, batch: MicroBatch, documents_P2: torch.Tensor) -> Pairs:
        sums = sums_N[documents_P2].unbind(1)
        counts = batch.targets_N[documents_P2].float().unbind(1)
        if not self.loss.needs_reference:
            return Pairs(*sums, *counts)
        return Pairs(*sums, *counts, *batch.doc_facts["reference"][documents_P2].float().unbind(1))


def log_prob_sums(model: nn.Module, batch: MicroBatch, cp: Axis) -> torch.Tensor:
    """The log-probability of each document's learnt tokens, fp32 [N]; differentiable."""
    log_prob_T, _ = model(**batch.inputs, targets_T=batch.targets_T, output="log_probs")
    return document_sums(log_prob_T, batch, cp)
