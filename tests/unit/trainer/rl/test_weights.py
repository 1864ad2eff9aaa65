"""The generator's weights are those that are trained, bit for bit, whatever the two layouts are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from parallel.config import ParallelConfig
from tests import rl_cases
from tests.integration.matrix.rows import model_of
from tests.pool import Pool

SP: dict[str, Any] = {"sequence_parallel": True}
COPIED: list[tuple[str, int, dict[str, Any], int, int]] = [
    # model, processes, layout, ZeRO, the generator's tp
    ("llama_odd_vocab", 2, {"tp": 2, **SP}, 1, 1),
    ("llama_one_kv", 4, {"tp": 2}, 2, 4),
    ("llama_deep", 2, {"pp": 2, "schedule": "zbv"}, 1, 2),
    ("qwen3", 4, {"tp": 2}, 3, 2),
    ("mixtral", 4, {"ep": 2, "tp": 2}, 2, 2),
    ("deepseek_v3", 4, {"ep": 2, "pp": 2}, 1, 1),
]
SHARED: list[tuple[str, int, dict[str, Any], int, int]] = [
    ("deepseek_v3", 2, {"tp": 2, **SP}, 1, 2),
    ("llama", 2, {"cp": 2}, 2, 1),
]


@pytest.mark.parametrize(("model", "size", "layout", "zero", "tp"), [*COPIED, *SHARED])
def test_weights_of_the_generator(
    model: str, size: int, layout: dict[str, Any], zero: int, tp: int, pool: Callable[[int], Pool]
) -> None:
    found = pool(size).run(rl_cases.moved_weights, model_of(model), ParallelConfig(**layout), zero, tp)
    for each in found:
        assert each["differ"] == [] and each["names"] > 10
        assert each["shared"] == ((model, size, layout, zero, tp) in SHARED)


def test_a_copy_is_given_back_and_made_again(pool: Callable[[int], Pool]) -> None:
    layout = ParallelConfig(pp=2)
    for each in pool(2).run(rl_cases.moved_weights, model_of("llama_deep"), layout, 1, 1, drop=True):
        assert each["dropped"] == 0 and each["differ"] == []
