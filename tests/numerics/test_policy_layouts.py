"""The update of a policy and of a critic: the same metrics and gradients in every layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from parallel.config import ParallelConfig
from tests import cases, policy_layout_cases
from tests.pool import Pool

LAYOUTS: list[tuple[int, int, int, dict[str, Any]]] = [
    (1, 0, 8, {}),
    (2, 2, 1, {}),
    (2, 1, 2, {"tp": 2, "sequence_parallel": True}),
    (2, 0, 2, {"pp": 2, "schedule": "1f1b"}),
    (2, 3, 2, {"cp": 2}),
    (2, 1, 4, {"cp": 2, "context": "ulysses"}),
]
"""Ranks, ZeRO stage, rows of a micro-batch, axes."""
SETTINGS: dict[str, dict[str, Any]] = {
    "token": {"kl": "loss", "kl_importance": True, "entropy_coef": 0.1, "dual_clip": 1.5},
    "sequence": {
        "ratio": "sequence", "clip_low": 0.05, "clip_high": 0.05, "aggregation": "sequence_mean", "kl": "loss",
        "kl_estimator": "k2", "mismatch": "truncate", "mismatch_level": "sequence",
    },
    "sequence_token": {
        "ratio": "sequence_token", "clip_low": 0.05, "clip_high": 0.05, "aggregation": "constant", "mismatch": "mask",
        "mismatch_max": 1.2,
    },
    "cispo": {"loss": "cispo", "ratio": "sequence", "aggregation": "token_mean", "clip_high": 0.02},
    "critic": {},
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_every_layout_updates_alike(pool: Callable[[int], Pool], name: str) -> None:
    metrics, gradients = pool(1).run(policy_layout_cases.update, SETTINGS[name])[0]
    assert len(metrics) > 12
    for size, zero, micro_rows, axes in LAYOUTS:
        arguments = (SETTINGS[name], zero, ParallelConfig(**axes), micro_rows)
        found, theirs = pool(size).run(policy_layout_cases.update, *arguments)[0]
        assert found == pytest.approx(metrics, rel=2e-5, abs=1e-6), axes
        assert cases.distance(gradients, theirs) < 2e-5, axes
    if name == "critic":
        assert metrics["train/clipped"] > 0
    else:
        assert metrics["train/clip_low"] > 0 and metrics["train/clip_high"] > 0, "bounds hold on both sides"
