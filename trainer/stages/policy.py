"""The update of a policy from its own samples: what GRPO and PPO share (settings: `trainer/stages/policy_config.py`).

Legend: T tokens of a micro-batch, N documents (samples), C channels, K columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from parallel.sharding import ALONE, Axis
from trainer.channels import Column, by_channel, extremes
from trainer.rl.kl import estimate, on_older_samples
from trainer.rl.mismatch import measure
from trainer.rl.policy_loss import policy_loss, token_scale
from trainer.stages.policy_config import PolicyConfig


class Policy:
    """The update of a policy from sampled tokens and their advantages.

    A micro-batch's `token_facts`: ``advantage``; ``generated``, the generator's log-probability; ``old``, the policy's
    at the rollout (absent while it has not moved since); ``reference`` where `kl=loss`.

    Args:
        cfg: the stage section.
        num_channels: number of channels of the run.
        max_new_tokens: most tokens of a sample, for aggregation=constant.
        temperature: that of the rollouts; probabilities are taken at it.
        cp: ranks that share the tokens of a document.
    """

    def __init__(
        self, cfg: PolicyConfig, num_channels: int, max_new_tokens: int, temperature: float = 1.0, cp: Axis = ALONE
    ):
        self.cfg, self.num_channels, self.cp = cfg, num_channels, cp
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        self.contract = contract(cfg, max_new_tokens)
        self.columns = columns(cfg)

    def count(self, micro_batches: Sequence[Any]) -> float:
        """This rank's share of the loss's denominator: learnt tokens, or samples with a learnt token."""
        if self.cfg.aggregation == "token_mean":
            return float(sum(batch.num_targets for batch in micro_batches))
        return sum(int((batch.targets_N > 0).sum()) for batch in micro_batches) / self.cp.size

    def forward(self, model: nn.Module, batch: Any, weight: float) -> tuple[torch.Tensor, torch.Tensor]:
        """``weight`` times the loss of one micro-batch, and its terms.

        Returns:
            (loss, terms_CK): a differentiable scalar; float64 by channel, see `columns`.
        """
        log_prob_T, entropy_T = model(
            **batch.inputs, targets_T=batch.targets_T, output="log_probs", temperature=self.temperature
        )
        loss, terms = self.loss(batch, log_prob_T, entropy_T)
        return weight * loss, terms

    def loss(self, batch: Any, log_prob_T: torch.Tensor, entropy_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The summed loss and its terms from what the model says of the targets."""
        cfg, facts = self.cfg, batch.token_facts
        old_T = facts.get("old", log_prob_T.detach())
        off = measure(
            old_T,
            facts["generated"],
            batch,
            self.cp,
            cfg.mismatch,
            cfg.mismatch_level,
            cfg.mismatch_min,
            cfg.mismatch_max,
        )
        scale_T = token_scale(cfg.aggregation, batch, self.max_new_tokens)
        advantage_T = facts["advantage"] * off.weight_T
        policy = policy_loss(log_prob_T, old_T, advantage_T, scale_T, batch, self.cp, cfg.loss, cfg.ratio, cfg.clip)
        extra_T = -cfg.entropy_coef * entropy_T
        shown: dict[str, torch.Tensor] = {}
        if cfg.kl == "loss":
            if cfg.kl_importance:
                kl_T = on_older_samples(cfg.kl_estimator, log_prob_T, facts["reference"], old_T)
            else:
                kl_T = estimate(cfg.kl_estimator, log_prob_T, facts["reference"])
            extra_T = extra_T + cfg.kl_coef * kl_T
            shown["kl"] = kl_T
        shown |= {
            "loss": (policy.loss_T + extra_T.detach()) * scale_T,
            "entropy": entropy_T,
            "moved_kl": estimate("k3", old_T, log_prob_T.detach()),
            "ratio_min": policy.ratio_T,
            "ratio_max": policy.ratio_T,
            "mismatch_k1": off.k1_T,
            "mismatch_kl": off.k3_T,
            "mismatch_max": off.ratio_T,
            "mismatch_cut": off.cut_T,
            **self._clipped(policy.ratio_T, advantage_T),
        }
        return policy.total + (extra_T * scale_T).sum(), self._terms(batch, shown)

    def _clipped(self, ratio_T: torch.Tensor, advantage_T: torch.Tensor) -> dict[str, torch.Tensor]:
        """Tokens whose ratio a bound holds; of the clipped surrogate only where that stops the gradient."""
        clip, all_signs = self.cfg.clip, self.cfg.loss == "cispo"
        shown = {
            "clip_low": (ratio_T < 1 - clip.low) & (all_signs | (advantage_T < 0)),
            "clip_high": (ratio_T > 1 + clip.high) & (all_signs | (advantage_T > 0)),
        }
        if clip.dual is not None:
            shown["dual_clip"] = (ratio_T > clip.dual) & (advantage_T < 0)
        return shown

    def _terms(self, batch: Any, shown: dict[str, torch.Tensor]) -> torch.Tensor:
        """The columns of a micro-batch; every rank's own tokens, so that cp ranks count nothing twice."""
        learnt_T = batch.targets_T >= 0
        channel_X = batch.channel_T[learnt_T]
        shown["tokens"] = learnt_T
        shown["samples"] = learnt_T / batch.targets_N.clamp(min=1)[batch.doc_T]
        values = [shown[each.name][learnt_T] for each in self.columns]
        sums_CK = by_channel(values, channel_X, self.num_channels)
        for k, each in enumerate(self.columns):
            if each.reduce != "sum":
                sums_CK[:, k] = extremes(values[k], channel_X, self.num_channels, each)
        return sums_CK


def columns(cfg: PolicyConfig) -> tuple[Column, ...]:
    """What an update reports: the loss; divergence from the reference (in the loss only), from the policy at the
    rollout, and of the generator; entropy; shares of tokens at a bound; the extremes of the ratios."""
    per_token = ["kl"] if cfg.kl == "loss" else []
    per_token += ["entropy", "moved_kl", "clip_low", "clip_high"]
    per_token += ["dual_clip"] if cfg.dual_clip is not None else []
    per_token += ["mismatch_k1", "mismatch_kl", "mismatch_cut"]
    return (
        Column("loss", over="tokens" if cfg.aggregation == "token_mean" else "samples"),
        *(Column(name, over="tokens") for name in per_token),
        Column("ratio_min", reduce="min"),
        Column("ratio_max", reduce="max"),
        Column("mismatch_max", reduce="max"),
        Column("tokens"),
        Column("samples"),
    )


def contract(cfg: PolicyConfig, max_new_tokens: int) -> str:
    """The loss in words."""
    each = {
        "clipped": "-min(ratio x A, clip(ratio) x A)",
        "cispo": "-clip(ratio) x A x log p(token), the ratio without gradient",
    }[cfg.loss]
    kind = {"token": "of the token", "sequence": "of the sample", "sequence_token": "of the sample"}[cfg.ratio]
    mean = {
        "sequence_mean": "the mean over all samples of each one's mean over its tokens",
        "token_mean": "the mean over all learnt tokens",
        "constant": f"the sum over all learnt tokens / (samples x {max_new_tokens})",
    }[cfg.aggregation]
    lines = [
        f"loss = {each};",
        f"       ratio = p(now) / p(at the rollout) {kind}, held in {1 - cfg.clip_low:g} .. {1 + cfg.clip_high:g};",
        f"       over one update's samples, all ranks and micro-batches: {mean}.",
    ]
    if cfg.kl != "none":
        lines.append(f"       {cfg.kl_coef:g} x {cfg.kl_estimator} of KL(policy || reference) is in the {cfg.kl}.")
    return "\n".join(lines)
