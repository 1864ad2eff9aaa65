"""Divergence estimators: by hand, and what their gradients really are, in exact expectation over all tokens."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from trainer.rl.kl import estimate, on_older_samples

NOW = torch.tensor([0.9, -0.3, 0.1, 1.2], dtype=torch.float64)
REFERENCE = torch.tensor([-0.4, 0.6, 0.0, 0.3], dtype=torch.float64).log_softmax(0)
OLD = torch.tensor([0.2, 0.1, -0.6, 0.9], dtype=torch.float64).log_softmax(0)


def reverse_kl(logits: torch.Tensor) -> torch.Tensor:
    log_p = logits.log_softmax(0)
    return (log_p.exp() * (log_p - REFERENCE)).sum()


def forward_kl(logits: torch.Tensor) -> torch.Tensor:
    return (REFERENCE.exp() * (REFERENCE - logits.log_softmax(0))).sum()


def gradient(of: Any) -> torch.Tensor:
    logits = NOW.clone().requires_grad_()
    return torch.autograd.grad(of(logits), logits)[0]


def as_loss(kind: Any, logits: torch.Tensor) -> torch.Tensor:
    """Expectation of the differentiated estimator over tokens of the policy, which are drawn, so without gradient."""
    log_p = logits.log_softmax(0)
    return (log_p.detach().exp() * estimate(kind, log_p, REFERENCE)).sum()


def in_reward(kind: Any, logits: torch.Tensor) -> torch.Tensor:
    """Expectation of the policy gradient of the detached estimator."""
    log_p = logits.log_softmax(0)
    return (log_p.detach().exp() * estimate(kind, log_p.detach(), REFERENCE) * log_p).sum()


def test_estimators_by_hand() -> None:
    now, reference = np.array([math.log(0.5), math.log(0.25)]), np.array([math.log(0.25), math.log(0.5)])
    two = math.log(2)
    assert estimate("k1", now, reference) == pytest.approx([two, -two])
    assert estimate("k2", now, reference) == pytest.approx([two**2 / 2] * 2)
    assert estimate("k3", now, reference) == pytest.approx([0.5 - 1 + two, 2 - 1 - two])


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_two_of_them_average_to_the_divergence(kind: Any) -> None:
    log_p = NOW.log_softmax(0)
    assert float((log_p.exp() * estimate(kind, log_p, REFERENCE)).sum()) == pytest.approx(float(reverse_kl(NOW)))
    assert float((log_p.exp() * estimate("k2", log_p, REFERENCE)).sum()) != pytest.approx(
        float(reverse_kl(NOW)), rel=1e-2
    )


def test_gradients_of_the_estimators_are_what_the_docstring_says() -> None:
    wanted, other = gradient(reverse_kl), gradient(forward_kl)
    assert float((wanted - other).abs().max()) > 0.01
    torch.testing.assert_close(gradient(lambda x: as_loss("k1", x)), torch.zeros_like(NOW))
    torch.testing.assert_close(gradient(lambda x: as_loss("k2", x)), wanted)
    torch.testing.assert_close(gradient(lambda x: as_loss("k3", x)), other)
    torch.testing.assert_close(gradient(lambda x: in_reward("k1", x)), wanted)
    for kind in ("k2", "k3"):
        assert float((gradient(lambda x, kind=kind: in_reward(kind, x)) - wanted).abs().max()) > 0.01


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_weighted_estimators_have_the_right_gradient_on_older_samples(kind: Any) -> None:
    def expected(logits: torch.Tensor) -> torch.Tensor:
        return (OLD.exp() * on_older_samples(kind, logits.log_softmax(0), REFERENCE, OLD)).sum()

    torch.testing.assert_close(gradient(expected), gradient(reverse_kl))


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_a_hopeless_token_gives_a_number(kind: Any) -> None:
    log_p = torch.tensor([-500.0, 0.0], requires_grad=True)
    loss = estimate(kind, log_p, torch.tensor([-1.0, 0.0])).sum()
    loss.backward()
    assert torch.isfinite(loss) and log_p.grad is not None and torch.isfinite(log_p.grad).all()
