"""Learning-rate schedules at their corner steps, worked by hand, and the two decay groups."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from models import build
from tests import cases, fill_cases
from trainer.optim import OptimConfig, decay_groups


def rates(total: int, **settings: Any) -> list[float]:
    cfg = OptimConfig(lr=2.0, **settings)
    return [cfg.lr_at(step, total) for step in range(total)]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "wsd"])
def test_warm_up_ends_at_the_peak_on_its_last_step(schedule: Any) -> None:
    """Four steps of warm-up to 2.0: 0.5, 1.0, 1.5, 2.0; the step after it begins the schedule at the peak."""
    found = rates(20, schedule=schedule, warmup_steps=4, decay_steps=5)
    assert found[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "wsd"])
def test_without_warm_up_step_0_has_the_peak(schedule: Any) -> None:
    assert rates(10, schedule=schedule, decay_steps=3)[0] == 2.0


@pytest.mark.parametrize("schedule", ["linear", "cosine", "wsd"])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("warmup", [0, 3])
def test_the_final_step_has_the_least_rate(schedule: Any, ratio: float, warmup: int) -> None:
    found = rates(20, schedule=schedule, min_lr_ratio=ratio, warmup_steps=warmup, decay_steps=6)
    assert found[-1] == pytest.approx(2.0 * ratio, abs=1e-15)
    assert min(found[warmup:]) == pytest.approx(2.0 * ratio, abs=1e-15)


def test_constant() -> None:
    assert rates(6, schedule="constant") == [2.0] * 6


def test_linear_by_hand() -> None:
    """From 2.0 on step 0 to 0.2 on step 10: 0.18 less each step."""
    assert rates(11, schedule="linear") == pytest.approx([2.0 - 0.18 * n for n in range(11)], rel=1e-12)


def test_cosine_by_hand() -> None:
    """Nine steps, 0 to 8, least rate 0: half-way the half, after a quarter (1 + cos 45°) / 2 of the peak."""
    found = rates(9, schedule="cosine", min_lr_ratio=0.0)
    quarter = 1.0 + math.sqrt(0.5)
    assert [found[n] for n in (0, 2, 4, 6, 8)] == pytest.approx([2.0, quarter, 1.0, 2.0 - quarter, 0.0], abs=1e-12)


def test_wsd_by_hand() -> None:
    """2 steps of warm-up, the peak, and a tail of 4 steps that starts at the peak and ends at the least rate."""
    found = rates(10, schedule="wsd", warmup_steps=2, decay_steps=4, min_lr_ratio=0.1)
    assert found == pytest.approx([1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 1.4, 0.8, 0.2], rel=1e-12)


def test_wsd_tail_of_the_whole_run_and_longer() -> None:
    """A tail longer than what the warm-up leaves (run.epochs is not known to the config's checks) starts after it."""
    expected = [1.0, 2.0, 2.0, 1.0, 0.0]
    for decay_steps in (3, 50):
        assert rates(5, schedule="wsd", warmup_steps=2, decay_steps=decay_steps, min_lr_ratio=0.0) == pytest.approx(
            expected, abs=1e-12
        )


@pytest.mark.parametrize("schedule", ["linear", "cosine", "wsd"])
def test_past_the_end_the_least_rate_stays(schedule: Any) -> None:
    cfg = OptimConfig(lr=2.0, schedule=schedule, decay_steps=3)
    assert [cfg.lr_at(step, 10) for step in (9, 10, 1000)] == pytest.approx([0.2, 0.2, 0.2], rel=1e-12)


def test_a_run_of_one_step_trains_at_the_peak() -> None:
    for schedule in ("constant", "linear", "cosine"):
        assert OptimConfig(lr=2.0, schedule=schedule).lr_at(0, 1) == 2.0


def grouped(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    return [dict(group) for group in decay_groups(model, weight_decay)]


def decayed(groups: list[dict[str, Any]]) -> dict[float, list[tuple[int, ...]]]:
    return {group["weight_decay"]: sorted(tuple(p.shape) for p in group["params"]) for group in groups}


def test_matrices_decay_and_vectors_do_not() -> None:
    """TINY by hand: two layers of qkv, out, gate|up and down, embedding and head; two norms a layer and the last."""
    matrices = [(64, 32), (32, 32), (96, 32), (32, 48)] * 2 + [(97, 32)] * 2
    found = decayed(grouped(build(cases.TINY), 0.1))
    assert found == {0.1: sorted(matrices), 0.0: [(32,)] * 5}


def test_biases_do_not_decay_and_frozen_weights_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 5))
    model[1].requires_grad_(False)
    assert decayed(grouped(model, 0.3)) == {0.3: [(3, 2)], 0.0: [(3,)]}


def test_a_model_without_vectors_has_one_group() -> None:
    """An empty group would be an error in DeepSpeed."""
    assert [len(group["params"]) for group in grouped(nn.Linear(2, 3, bias=False), 0.1)] == [1]


def test_a_tied_weight_decays_once() -> None:
    model = nn.Sequential(nn.Embedding(7, 2), nn.Linear(2, 7, bias=False))
    model[1].weight = model[0].weight
    params = [p for group in grouped(model, 0.1) for p in group["params"]]
    assert [id(p) for p in params] == [id(model[0].weight)]


def test_the_shape_before_partitioning_decides() -> None:
    """ZeRO-3 leaves empty 1-D tensors behind and keeps the shape aside."""
    model = nn.Linear(2, 3)
    for param in model.parameters():
        vars(param)["ds_shape"] = param.shape
        param.data = torch.empty(0)
    (matrices, vectors) = grouped(model, 0.1)
    assert matrices["params"] == [model.weight] and vectors["params"] == [model.bias]


def test_partitioned_by_deepspeed_the_groups_are_the_same(pool) -> None:
    for partition in (False, True):
        for (decay, shapes), (none, vectors) in pool(2).run(fill_cases.decay_shapes, partition):
            assert (decay, none) == (0.1, 0.0)
            assert {len(shape) for shape in shapes} == {2} and len(shapes) == 10
            assert vectors == [(32,)] * 5
