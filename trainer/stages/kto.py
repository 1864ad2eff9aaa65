"""KTO: single answers that were found good or bad. Legend: N documents of a micro-batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from data.batch import MicroBatch
from parallel.sharding import ALONE, Axis
from trainer.channels import Column, by_channel
from trainer.losses.preference import kto
from trainer.stages.dpo import DpoConfig, log_prob_sums


class Kto:
    """The loss of judged answers; see ``trainer.losses.preference.kto``.

    Micro-batches come with `doc_facts`: `label` (1 desirable, 0 not), `reference`, `baseline` (the same everywhere)
    and, with a next-token term, `sft_scale` (answers / desirable tokens of the global batch); see
    ``trainer.preparation``. Arguments as of ``Dpo``.
    """

    columns = (
        Column("loss", over="answers"),
        Column("accuracy", over="answers"),
        Column("kl", over="answers"),
        Column("desirable_reward", over="desirable"),
        Column("undesirable_reward", over="undesirable"),
        Column("desirable_log_prob", over="desirable_tokens"),
        Column("undesirable_log_prob", over="undesirable_tokens"),
        Column("answers"),
        Column("desirable"),
        Column("undesirable"),
        Column("desirable_tokens"),
        Column("undesirable_tokens"),
    )
    """Accuracy: share of answers on the right side of the baseline; kl: the baseline, in nats."""

    def __init__(self, cfg: DpoConfig, num_channels: int, cp: Axis = ALONE):
        self.cfg, self.num_channels, self.cp = cfg, num_channels, cp
        sft = f"+ {cfg.weight_of_sft:g} x next-token loss of desirable answers, " if cfg.weight_of_sft else ""
        self.contract = (
            "loss = sum over answers of weight x (1 - sigmoid(+-beta x (log-ratio to the reference - kl))) / answers\n"
            f"       {sft}+ for desirable answers, beta {cfg.beta:g};\n"
            "       taken over the whole global batch: all ranks, all micro-batches, counted before the backward.\n"
            "       kl: mean log-ratio of answers to the next prompt of the global batch, at least 0, before the step."
        )

    def count(self, micro_batches: Sequence[MicroBatch]) -> float:
        """This rank's share of the answers."""
        return sum(int((batch.targets_N > 0).sum()) for batch in micro_batches) / self.cp.size

    def sft_tokens(self, micro_batches: Sequence[MicroBatch]) -> float:
        """This rank's share of the tokens of the next-token term."""
        return sum(float((b.targets_N * b.doc_facts["label"]).sum()) for b in micro_batches) / self.cp.size

    def forward(self, model: nn.Module, batch: MicroBatch, weight: float) -> tuple[torch.Tensor, torch.Tensor]:
        """``weight`` times the summed loss of one micro-batch, and its columns by channel."""
        cfg, facts = self.cfg, batch.doc_facts
        sums_N = log_prob_sums(model, batch, self.cp)
        answer_N = (batch.targets_N > 0).float()  # what fills up a schedule has no token to learn
        good_N, bad_N = facts["label"].float() * answer_N, (1 - facts["label"].float()) * answer_N
        ratio_N, baseline_N = sums_N - facts["reference"].float(), facts["baseline"].float()
        loss_N = answer_N * kto(ratio_N, good_N > 0, baseline_N, cfg.beta, cfg.desirable_weight, cfg.undesirable_weight)
        if cfg.weight_of_sft:
            loss_N = loss_N - cfg.weight_of_sft * facts["sft_scale"].float() * good_N * sums_N
        reward_N = cfg.beta * ratio_N
        right_N = (ratio_N > baseline_N).float() * good_N + (ratio_N < baseline_N).float() * bad_N
        tokens_N = batch.targets_N.float()
        terms = [loss_N, right_N, baseline_N * answer_N]
        for side_N in (reward_N, sums_N):
            terms += [side_N * good_N, side_N * bad_N]
        terms += [answer_N, good_N, bad_N, tokens_N * good_N, tokens_N * bad_N]
        terms = [term / self.cp.size for term in terms]
        return weight * loss_N.sum(), by_channel(terms, batch.doc_channel_N, self.num_channels)
