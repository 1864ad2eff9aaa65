"""Estimators of KL(policy || reference) from tokens the policy sampled (Schulman 2020, "Approximating KL divergence").

With d = log policy(token) - log reference(token), each averages to the divergence over the policy's own samples:

    k1 = d                 unbiased, of either sign, wide
    k2 = d^2 / 2           slightly biased, never negative
    k3 = exp(-d) - 1 + d   unbiased, never negative

An estimator's gradient does not estimate the divergence's gradient (Tang & Munos 2025, "On a few pitfalls in KL
divergence gradient estimation for RL", arXiv:2506.09477). Let s be the gradient of log policy(token); E is taken over
samples of the policy being trained, and E[s] = 0. Of the divergence the gradient is E[d s].

    differentiated as a loss     k1: E[s] = 0, pulls nowhere on average
                                 k2: E[d s], right
                                 k3: E[(1 - exp(-d)) s] = -E_reference[s], that of KL(reference || policy)
    detached, in the reward      k1: E[d s], right
                                 k2: E[d^2 s / 2] and k3: E[(d + exp(-d)) s], both of something else
    times policy / old policy, which makes it hold for samples of the older policy (`on_older_samples`)
                                 k1 and k3, with the gradient of both factors: E[d s], right
                                 k2, with its own gradient only: E[d s], right

Near the reference k2 and k3 as losses agree to first order in d. As a loss each token is taken by itself: what a token
does to the divergence of the tokens after it counts only in the reward.
"""

from __future__ import annotations

from typing import Literal, TypeVar

import numpy as np
import torch

Estimator = Literal["k1", "k2", "k3"]
Numbers = TypeVar("Numbers", np.ndarray, torch.Tensor)

LARGEST_LOG_RATIO = 20.0
"""Above it exp() is not believed: fp32 would overflow at 88, and infinity times an advantage of 0 is no number."""


def estimate(kind: Estimator, log_prob: Numbers, reference: Numbers) -> Numbers:
    """One of the three estimators for each token, in nats; differentiable in ``log_prob`` when that is a tensor.

    Tokens that both give probability 1 (or no token at all: 0 and 0) have 0.
    """
    if kind == "k1":
        return log_prob - reference
    if kind == "k2":
        return (log_prob - reference) ** 2 / 2
    back = clamp_above(reference - log_prob)
    return exp(back) - 1 - back


def on_older_samples(
    kind: Estimator, log_prob: torch.Tensor, reference: torch.Tensor, old: torch.Tensor
) -> torch.Tensor:
    """The estimator as a loss on samples of the policy ``old``: weighted so that its gradient is the divergence's."""
    ratio = torch.exp(clamp_above(log_prob - old))
    return (ratio.detach() if kind == "k2" else ratio) * estimate(kind, log_prob, reference)


def exp(x: Numbers) -> Numbers:
    """e^x of either kind of array."""
    return torch.exp(x) if isinstance(x, torch.Tensor) else np.exp(x)


def clamp_above(log_ratio: Numbers) -> Numbers:
    """A log-ratio of which exp() stays finite."""
    if isinstance(log_ratio, torch.Tensor):
        return log_ratio.clamp(max=LARGEST_LOG_RATIO)
    return np.minimum(log_ratio, LARGEST_LOG_RATIO)
