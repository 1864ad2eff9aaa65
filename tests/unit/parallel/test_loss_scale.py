"""The loss scale: growth, halving, the floor, and what a checkpoint keeps of it."""

from __future__ import annotations

import pytest

from parallel.loss_scale import LossScale


def test_grows_after_every_interval_of_good_steps() -> None:
    scale = LossScale(dynamic=True, start=8.0, growth_interval=3)
    seen = []
    for _ in range(7):
        scale.update(overflow=False)
        seen.append(scale.value)
    assert seen == [8.0, 8.0, 16.0, 16.0, 16.0, 32.0, 32.0]


def test_an_overflow_halves_and_the_count_of_good_steps_starts_again() -> None:
    scale = LossScale(dynamic=True, start=8.0, growth_interval=3)
    for overflow in (False, False, True, False, False):
        scale.update(overflow)
    assert scale.value == 4.0
    scale.update(overflow=False)
    assert scale.value == 8.0


def test_at_the_floor_it_is_an_error_with_a_way_out() -> None:
    scale = LossScale(dynamic=True, start=2.0)
    scale.update(overflow=True)
    assert scale.value == 1.0
    with pytest.raises(ValueError, match=r"not finite \(loss scale 1\).*not applied.*engine\.precision=fp32"):
        scale.update(overflow=True)


def test_without_dynamic_scaling_the_first_overflow_is_an_error() -> None:
    scale = LossScale(dynamic=False)
    for _ in range(2000):
        scale.update(overflow=False)
    assert scale.value == 1.0
    with pytest.raises(ValueError, match=r"optim\.lr"):
        scale.update(overflow=True)


def test_starts_at_2_to_the_16() -> None:
    assert LossScale(dynamic=True).value == 65536.0


def test_a_restored_scale_grows_when_the_saved_one_would_have() -> None:
    saved = LossScale(dynamic=True, start=8.0, growth_interval=3)
    saved.update(overflow=False)
    saved.update(overflow=False)
    resumed = LossScale(dynamic=True, start=64.0, growth_interval=3)
    resumed.restore(saved.state())
    assert resumed.value == 8.0
    resumed.update(overflow=False)
    assert resumed.value == 16.0


@pytest.mark.parametrize(("dynamic", "saved", "expected"), [(False, 512.0, 1.0), (True, 1.0, 64.0)])
def test_another_precision_keeps_its_own_scale(dynamic: bool, saved: float, expected: float) -> None:
    resumed = LossScale(dynamic, start=64.0)
    resumed.restore({"value": saved, "good_steps": 5})
    assert (resumed.value, resumed.good_steps) == (expected, 0)
