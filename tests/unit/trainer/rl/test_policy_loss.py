"""The policy's and the critic's losses by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from data.batch import Document, MicroBatch, collate
from parallel.sharding import ALONE
from trainer.rl.mismatch import measure
from trainer.rl.policy_loss import Clip, cispo, policy_loss, surrogate, token_scale
from trainer.rl.value_loss import explained_variance, value_loss
from trainer.stages.ppo import Critic, PpoConfig


def two_samples(**facts: list[float]) -> MicroBatch:
    """Samples of 3 and 1 learnt tokens behind one prompt token each; facts of those four tokens."""
    parts = [slice(0, 3), slice(3, 4)]
    given = {name: [np.array([0.0, *values[part]]) for part in parts] for name, values in facts.items()}
    lengths = (4, 2)
    return collate(
        [
            Document(np.ones(n), np.arange(n) > 0, i, {}, {name: values[i] for name, values in given.items()})
            for i, n in enumerate(lengths)
        ]
    )


def at_targets(values: list[float]) -> torch.Tensor:
    """Numbers of the four learnt tokens of `two_samples` where they are predicted."""
    return torch.tensor([*values[:3], 0.0, values[3], 0.0])


def test_surrogate_by_hand() -> None:
    ratio = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1, 9.0])
    advantage = torch.tensor([2.0, -2.0, 2.0, -2.0, 1.0, -1.0])
    # Above the upper bound only a positive advantage is held, below the lower one only a negative one.
    assert surrogate(ratio, advantage, Clip(0.2, 0.28)).tolist() == pytest.approx([2.56, -3, 1, -1.6, 1.1, -9])
    assert surrogate(ratio, advantage, Clip(0.2, 0.28, 3.0)).tolist() == pytest.approx([2.56, -3, 1, -1.6, 1.1, -3])


def test_surrogate_stops_the_gradient_where_it_holds() -> None:
    ratio = torch.tensor([1.5, 1.5, 0.5, 0.5, 9.0], requires_grad=True)
    advantage = torch.tensor([2.0, -2.0, 2.0, -2.0, -1.0])
    (gradient,) = torch.autograd.grad(surrogate(ratio, advantage, Clip(0.2, 0.2, 3.0)).sum(), ratio)
    assert gradient.tolist() == [0, -2, 2, 0, 0]


def test_cispo_keeps_the_gradient_everywhere() -> None:
    log_prob = torch.tensor([-1.0, -2.0], requires_grad=True)
    value = cispo(torch.tensor([9.0, 0.1]), torch.tensor([1.0, -2.0]), log_prob, Clip(1.0, 1.5))
    assert value.tolist() == pytest.approx([2.5 * -1, 0.1 * -2 * -2])
    (gradient,) = torch.autograd.grad(value.sum(), log_prob)
    assert gradient.tolist() == pytest.approx([2.5, -0.2])


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("sequence_mean", ((1 + 2 + 6) / 3 + 4) / 2),
        ("token_mean", (1 + 2 + 6 + 4) / 4),
        ("constant", (1 + 2 + 6 + 4) / (2 * 10)),
    ],
)
def test_aggregation_by_hand(aggregation: Any, expected: float) -> None:
    batch = two_samples()
    count = 4 if aggregation == "token_mean" else 2
    scale = token_scale(aggregation, batch, 10)
    assert float((at_targets([1.0, 2.0, 6.0, 4.0]) * scale).sum() / count) == pytest.approx(expected)


def loss_of(ratios: list[float], advantages: list[float], ratio: Any, clip: Clip) -> tuple[float, list[float]]:
    batch = two_samples()
    log_prob = at_targets([math.log(r) for r in ratios]).requires_grad_()
    found = policy_loss(
        log_prob, torch.zeros(6), at_targets(advantages), torch.ones(6), batch, ALONE, "clipped", ratio, clip
    )
    (gradient,) = torch.autograd.grad(found.total, log_prob)
    return float(found.total.detach()), gradient[batch.targets_T >= 0].tolist()


def test_the_ratio_of_a_sequence_by_hand() -> None:
    """The geometric mean of 2, 4 and 1/8 is 1, that of a token alone its own; advantages of both signs."""
    loss, gradient = loss_of([2, 4, 0.125, 3], [1, 2, -6, -1], "sequence", Clip())
    assert loss == pytest.approx(-(1 + 2 - 6) + 3)
    assert gradient == pytest.approx([1, 1, 1, 3])  # 3 tokens share s x (-sum A) / 3
    # Within GSPO-token each token has its own advantage times the ratio of the sequence.
    loss, gradient = loss_of([2, 4, 0.125, 3], [1, 2, -6, -1], "sequence_token", Clip())
    assert loss == pytest.approx(-(1 + 2 - 6) + 3)
    assert gradient == pytest.approx([-1, -2, 6, 3])


def test_a_held_sequence_keeps_the_gradient_of_the_other_sign() -> None:
    """Ratio 2 everywhere: positive advantages are held at 1.2, negative ones are not."""
    loss, gradient = loss_of([2, 2, 2, 2], [1, 1, -3, 1], "sequence", Clip())
    assert loss == pytest.approx(-1.2 * 2 + 2 * 3 - 1.2)
    assert gradient == pytest.approx([2, 2, 2, 0])


@pytest.mark.parametrize("dual", [None, 1.5])
@pytest.mark.parametrize("seed", range(5))
def test_a_sequence_is_the_sum_of_its_tokens_with_one_ratio(seed: int, dual: float | None) -> None:
    """Summing advantages by sign before clipping gives what each token by itself gives."""
    torch.manual_seed(seed)
    batch, clip = two_samples(), Clip(0.1, 0.2, dual)
    log_prob = at_targets((0.6 * torch.randn(4)).tolist()).requires_grad_()
    advantage = at_targets(torch.randn(4).tolist())
    found = policy_loss(log_prob, torch.zeros(6), advantage, torch.ones(6), batch, ALONE, "clipped", "sequence", clip)
    ratio = torch.stack([log_prob[:3].mean(), log_prob[4]]).exp()[torch.tensor([0, 0, 0, 0, 1, 1])]
    plain = -surrogate(ratio, advantage, clip).sum()
    torch.testing.assert_close(found.total, plain)
    ours, theirs = torch.autograd.grad(found.total, log_prob)[0], torch.autograd.grad(plain, log_prob)[0]
    learnt = batch.targets_T >= 0  # elsewhere the model has no log-probability that could be moved
    torch.testing.assert_close(ours[learnt], theirs[learnt])
    torch.testing.assert_close(found.loss_T.sum(), plain.detach())


def test_ratios_beyond_reason_give_numbers() -> None:
    batch = two_samples()
    for ratio in ("token", "sequence", "sequence_token"):
        log_prob = at_targets([0.0, 0.0, 0.0, 0.0]).requires_grad_()
        old, advantage = at_targets([-200.0] * 4), at_targets([0.0, -1.0, 1.0, 0.0])
        kind: Any = ratio
        found = policy_loss(log_prob, old, advantage, torch.ones(6), batch, ALONE, "clipped", kind, Clip())
        (gradient,) = torch.autograd.grad(found.total, log_prob)
        assert torch.isfinite(found.total) and torch.isfinite(gradient).all()


def test_mismatch_by_hand() -> None:
    """trainer / generator is 2, 1, 1/4 in one sample (1/2 as a whole) and 3 in the other."""
    batch = two_samples()
    trainer = at_targets([math.log(p) for p in (0.8, 0.3, 0.1, 0.6)])
    generator = at_targets([math.log(p) for p in (0.4, 0.3, 0.4, 0.2)])
    learnt = batch.targets_T >= 0

    def weights(how: Any, level: Any) -> list[float]:
        return measure(trainer, generator, batch, ALONE, how, level, 0.3, 2.5).weight_T[learnt].tolist()

    assert weights("none", "token") == [1, 1, 1, 1]
    assert weights("truncate", "token") == pytest.approx([2, 1, 0.3, 2.5])
    assert weights("mask", "token") == pytest.approx([2, 1, 0, 0])
    assert weights("truncate", "sequence") == pytest.approx([0.5, 0.5, 0.5, 2.5])
    assert weights("mask", "sequence") == pytest.approx([0.5, 0.5, 0.5, 0])
    found = measure(trainer, generator, batch, ALONE, "none", "token", 0.3, 2.5)
    assert found.cut_T[learnt].tolist() == [False, False, True, True]
    assert found.k1_T[learnt].tolist() == pytest.approx([-math.log(2), 0, math.log(4), -math.log(3)])
    assert found.k3_T[learnt].tolist() == pytest.approx(
        [2 - 1 - math.log(2), 0, 0.25 - 1 + math.log(4), 2 - math.log(3)]
    )


def test_a_generator_without_a_number_counts_as_the_trainer() -> None:
    batch = two_samples()
    trainer = at_targets([-1.0, -2.0, -3.0, -4.0])
    found = measure(trainer, at_targets([math.nan, -math.inf, -3.0, -4.0]), batch, ALONE, "mask", "sequence")
    assert found.weight_T.tolist() == [1.0] * 6
    assert found.k3_T.tolist() == [0.0] * 6


def test_value_loss_by_hand() -> None:
    value, old = torch.tensor([1.0, 1.0, 0.1, 3.0], requires_grad=True), torch.tensor([0.0, 0.9, 0.0, 0.0])
    target = torch.tensor([0.0, 2.0, 0.5, 3.5])
    loss, held = value_loss(value, old, target, 0.5)
    # The held values: 0.5, 1.0, 0.1, 0.5; only the last one's error is the larger.
    assert loss.tolist() == pytest.approx([0.5, 0.5, 0.08, 4.5])
    assert held.tolist() == [False, False, False, True]
    (gradient,) = torch.autograd.grad(loss.sum(), value)
    assert gradient.tolist() == pytest.approx([1.0, -1.0, -0.4, 0.0])
    assert value_loss(value, old, target, None)[0].tolist() == pytest.approx([0.5, 0.5, 0.08, 0.125])


def test_explained_variance_by_hand() -> None:
    returns = np.array([0.0, 2.0, 4.0])
    assert explained_variance(returns, returns + 7) == pytest.approx(1.0)  # a constant is no variance
    assert explained_variance(returns, np.full(3, 9.0)) == pytest.approx(0.0)
    assert explained_variance(returns, -returns) == pytest.approx(1 - 4.0)
    assert explained_variance(np.ones(3), returns) == 0.0
    assert explained_variance(np.zeros(0), np.zeros(0)) == 0.0


def test_the_critic_learns_where_a_token_is_learnt() -> None:
    batch = two_samples(value=[0.0, 0.9, 0.0, 0.0], **{"return": [0.0, 2.0, 0.5, 3.5]})
    values = torch.tensor([1.0, 1.0, 0.1, 50.0, 3.0, 50.0, 50.0], requires_grad=True)  # one row of padding
    stage = Critic(PpoConfig(value_clip=0.5), num_channels=2)

    def model(**asked: Any) -> torch.Tensor:
        assert asked["output"] == "head"
        return values

    loss, terms_CK = stage.forward(model, batch, 0.5)  # pyright: ignore[reportArgumentType]
    assert stage.count([batch]) == 4
    assert float(loss.detach()) == pytest.approx(0.5 * (0.5 + 0.5 + 0.08 + 4.5))
    assert torch.autograd.grad(loss, values)[0].tolist() == pytest.approx([0.5, -0.5, -0.2, 0, 0, 0, 0])
    assert terms_CK.tolist() == [pytest.approx([1.08, 2.1, 2.5, 0, 3]), pytest.approx([4.5, 3, 3.5, 1, 1])]
