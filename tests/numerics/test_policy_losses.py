"""Losses and advantages of GRPO's family against TRL's own trainers, on the same samples, in fp32.

TRL's trainers are made without their constructors and asked for what a training step asks of them: advantages and
importance weights from samples and rewards, then the loss. The gradient is taken of the logits on both sides.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

from tests.policy_cases import LENGTHS, Samples, model_of, samples, trl_trainer
from trainer.rl.credit import compared
from trainer.rl.kl import estimate
from trainer.stages.grpo import GrpoConfig
from trainer.stages.policy import Policy

MOST = 12


def theirs(given: Samples, moved: bool, **settings: Any) -> tuple[torch.Tensor, torch.Tensor, dict[str, list[float]]]:
    """TRL's loss, its gradient and what it logged."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    logits = given.logits_BWV.clone().requires_grad_()
    trainer = trl_trainer(GRPOTrainer, given, logits, num_iterations=2 if moved else 1, **settings)
    inputs = trainer._generate_and_score_completions([{"prompt": "say"}] * len(LENGTHS))
    inputs["advantages"] = given.advantage_B
    loss = trainer._compute_loss(None, inputs)
    (gradient,) = torch.autograd.grad(loss, logits)
    return loss.detach(), gradient, trainer._metrics["train"]


def ours(given: Samples, moved: bool, **settings: Any) -> tuple[torch.Tensor, torch.Tensor, dict[str, float]]:
    """Our loss, its gradient and the sums of the columns over channels."""
    logits = given.logits_BWV.clone().requires_grad_()
    batch = given.batch(moved=moved)
    stage = Policy(GrpoConfig(**settings), num_channels=2, max_new_tokens=MOST)
    loss, terms_CK = stage.forward(model_of(given, batch, logits), batch, 1 / stage.count([batch]))
    (gradient,) = torch.autograd.grad(loss, logits)
    sums = dict(zip([each.name for each in stage.columns], terms_CK.sum(0).tolist(), strict=True))
    over = {each.name: sums[each.over] for each in stage.columns if each.over}
    return loss.detach(), gradient, {name: value / over.get(name, 1.0) for name, value in sums.items()}


def same(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


IS: dict[str, Any] = {"use_vllm": True, "vllm_importance_sampling_correction": True}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "grpo": ({}, {"loss_type": "grpo"}),
    "kl": ({"kl": "loss", "kl_coef": 0.3}, {"beta": 0.3}),
    "kl_importance": ({"kl": "loss", "kl_coef": 0.3, "kl_importance": True},
                      {"beta": 0.3, "use_bias_correction_kl": True}),
    "dapo": (
        {"aggregation": "token_mean", "clip_high": 0.28},
        {"loss_type": "dapo", "epsilon_high": 0.28},
    ),
    "bnpo": ({"aggregation": "token_mean", "clip_low": 0.1}, {"loss_type": "bnpo", "epsilon_low": 0.1}),
    "dr_grpo": ({"aggregation": "constant"}, {"loss_type": "dr_grpo", "max_completion_length": MOST}),
    "gspo": ({"ratio": "sequence", "clip_low": 0.02, "clip_high": 0.03},
             {"importance_sampling_level": "sequence", "epsilon_low": 0.02, "epsilon_high": 0.03}),
    "gspo_token_mean": (
        {"ratio": "sequence", "clip_low": 0.02, "clip_high": 0.03, "aggregation": "token_mean"},
        {"loss_type": "dapo", "importance_sampling_level": "sequence", "epsilon_low": 0.02, "epsilon_high": 0.03},
    ),
    "cispo": (
        {"loss": "cispo", "clip_low": 1.0, "clip_high": 0.1, "aggregation": "token_mean"},
        {"loss_type": "cispo", "epsilon_high": 1.1},
    ),
    "cispo_sequence": (
        {"loss": "cispo", "ratio": "sequence", "clip_low": 1.0, "clip_high": 0.02, "aggregation": "token_mean"},
        {"loss_type": "cispo", "importance_sampling_level": "sequence", "epsilon_high": 1.02},
    ),
    "dual_clip": ({"dual_clip": 1.3}, {"delta": 1.3}),
    "dual_clip_sequence": ({"ratio": "sequence", "clip_high": 0.01, "dual_clip": 1.03},
                           {"importance_sampling_level": "sequence", "epsilon_high": 0.01, "delta": 1.03}),
    "entropy": (
        {"aggregation": "token_mean", "entropy_coef": 0.2},
        {"loss_type": "dapo", "_entropy_bonus_enabled": True, "entropy_coef": 0.2},
    ),
    **{
        f"{level}_{how}_{ratio}": (
            {"mismatch": how, "mismatch_level": level, "mismatch_min": 0.8, "mismatch_max": 1.4, "ratio": ratio,
             "kl": "loss", "kl_coef": 0.1},
            {**IS, "vllm_importance_sampling_mode": f"{level}_{how}", "vllm_importance_sampling_clip_min": 0.8,
             "vllm_importance_sampling_clip_max": 1.4, "importance_sampling_level": ratio, "beta": 0.1},
        )
        for level in ("token", "sequence")
        for how in ("truncate", "mask")
        for ratio in ("token", "sequence")
    },
}  # fmt: skip


# TRL weighs against the mismatch only with old log-probabilities at hand.
RUNS = [(name, moved) for name, (_, trl) in CASES.items() for moved in (True, False) if moved or "use_vllm" not in trl]


@pytest.mark.parametrize(("name", "moved"), RUNS)
def test_loss_and_gradient_are_those_of_trl(name: str, moved: bool) -> None:
    mine, trl = CASES[name]
    given = samples()
    loss, gradient, shown = ours(given, moved, **mine)
    their_loss, their_gradient, logged = theirs(given, moved, **trl)
    same(loss, their_loss)
    same(gradient, their_gradient)
    assert float(gradient.abs().max()) > 1e-3
    assert shown["loss"] == pytest.approx(float(loss), rel=1e-5, abs=1e-6)
    assert shown["entropy"] == pytest.approx(logged["entropy"][0], rel=1e-5)
    assert shown["tokens"] == int(given.mask_BW.sum()) and shown["samples"] == pytest.approx(len(LENGTHS))
    if "kl" in shown and "kl_importance" not in mine:
        assert shown["kl"] == pytest.approx(logged["kl"][0], rel=1e-5)
    if mine.get("ratio") != "sequence" and "loss" not in mine and "mismatch" not in mine:  # they count sequences there
        assert shown["clip_low"] == pytest.approx(logged["clip_ratio/low_mean"][0], rel=1e-6)
        assert shown["clip_high"] == pytest.approx(logged["clip_ratio/high_mean"][0], rel=1e-6)
        assert not moved or (shown["clip_low"] > 0 and shown["clip_high"] > 0), "the samples clip on both sides"
        assert "dual_clip" not in shown or moved == (shown["dual_clip"] > 0)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("bad", [None, 1])
def test_group_advantages_are_those_of_trl(scale: Any, bad: int | None) -> None:
    from trl.trainer.grpo_trainer import GRPOTrainer

    given = samples()
    if bad is not None:
        given.reward_B[bad] = math.nan
    trainer = trl_trainer(GRPOTrainer, given, scale_rewards=scale)
    expected = trainer._generate_and_score_completions([{"prompt": "say"}] * len(LENGTHS))["advantages"]
    assert expected.count_nonzero() == 5, "one is at its group's mean, or has no reward"
    found = compared(GrpoConfig(scale=scale), given.reward_B.numpy(), np.repeat([0, 1], 3), np.ones(6, dtype=int))
    assert found.advantage_L == pytest.approx(expected.numpy(), rel=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("bad", [None, 4])
def test_leave_one_out_advantages_are_those_of_trl(beta: float, bad: int | None) -> None:
    from trl.trainer.rloo_trainer import RLOOTrainer

    given = samples(alone=True)
    if bad is not None:
        given.reward_B[bad] = math.nan
    trainer = trl_trainer(RLOOTrainer, given, beta=beta)
    expected = trainer._generate_and_score_completions([{"prompt": "say"}] * len(LENGTHS))["advantages"]
    cfg = GrpoConfig(advantage="rloo", scale="none", kl="reward", kl_estimator="k1", kl_coef=beta)
    divergence = estimate("k1", given.old_BW, given.reference_BW)[given.mask_BW].numpy()
    found = compared(cfg, given.reward_B.numpy(), np.repeat([0, 1], 3), np.array(LENGTHS), divergence)
    last_of_each = found.advantage_L[np.cumsum(LENGTHS) - 1]
    assert last_of_each == pytest.approx(expected.numpy(), rel=2e-6, abs=1e-6)


def test_tokens_of_sequence_token_have_the_gradient_of_their_own_ratio() -> None:
    """GSPO-token with one advantage a sample is GSPO in value and gradient (section 4.3 of the paper)."""
    given = samples(spread=0.05)
    bounds = {"clip_low": 0.02, "clip_high": 0.02}
    loss, gradient, _ = ours(given, True, ratio="sequence", **bounds)
    token_loss, token_gradient, _ = ours(given, True, ratio="sequence_token", **bounds)
    same(token_loss, loss)
    same(token_gradient, gradient)


def test_a_policy_that_has_not_moved_needs_no_old_log_probabilities() -> None:
    given = samples()
    still = dataclasses.replace(given, old_BW=given.scores(given.logits_BWV)[0])
    settings: dict[str, Any] = {"mismatch": "truncate", "mismatch_max": 1.2, "kl": "loss", "kl_importance": True}
    loss, gradient, shown = ours(still, True, **settings)
    other_loss, other_gradient, other_shown = ours(still, False, **settings)
    same(other_loss, loss)
    same(other_gradient, gradient)
    assert other_shown == pytest.approx(shown, rel=1e-6, abs=1e-9)
