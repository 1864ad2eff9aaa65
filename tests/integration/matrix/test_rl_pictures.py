"""Rollouts of prompts with pictures: in a layout the same texts, advantages and weights as in one process, and the
generator sees what scores and updates see."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from models.parts import ALL, PartsConfig
from parallel.config import ParallelConfig
from tests import rl_cases, sight_cases
from tests.integration.matrix.rows import FROZEN, SP
from tests.integration.matrix.test_rl import GRPO, GSPO, PPO, same_step_facts, same_training
from tests.pool import Pool
from trainer.stages.policy_config import PolicyConfig

MODELS = {name: replace(model, init_std=0.15) for name, model in sight_cases.MODELS.items()}
ROWS: list[tuple[str, PolicyConfig, int, dict[str, Any], int]] = [
    # model, stage, processes, layout, ZeRO
    ("llava_frozen", GRPO, 2, {}, 3),
    ("llava", GRPO, 2, {"tp": 2, **SP}, 1),
    ("llava", GRPO, 2, {"pp": 2}, 0),
    ("qwen2_vl", PPO, 2, {}, 2),
    ("qwen2_vl", PPO, 4, {"tp": 2, **SP, "pp": 2}, 1),
    ("qwen2_vl", GSPO, 2, {"pp": 2}, 1),
]


def steps_of(model: str, stage: Any, layout: ParallelConfig, zero: Any = 1) -> dict[str, Any]:
    """Two steps; of a frozen model the tower learns nothing."""
    parts = PartsConfig(vision=FROZEN) if model.endswith("_frozen") else ALL
    return rl_cases.rl_steps(stage, MODELS[model.removesuffix("_frozen")], layout, zero, parts=parts)


def _name(row: tuple[str, PolicyConfig, int, dict[str, Any], int]) -> str:
    model, stage, size, layout, zero = row
    return f"{stage.name}-{model}-{size}-{','.join(f'{k}={v}' for k, v in layout.items())}-zero{zero}"


@pytest.fixture(scope="module")
def reference(pool: Callable[[int], Pool]) -> Callable[[str, PolicyConfig], dict[str, Any]]:
    """The same steps in one process, each once."""
    found: dict[tuple[str, PolicyConfig], dict[str, Any]] = {}

    def of(model: str, stage: PolicyConfig) -> dict[str, Any]:
        if (model, stage) not in found:
            found[model, stage] = pool(1).run(steps_of, model, stage, ParallelConfig())[0]
        return found[model, stage]

    return of


@pytest.mark.parametrize("row", ROWS, ids=_name)
def test_a_layout_learns_as_one_process(
    row: tuple[str, PolicyConfig, int, dict[str, Any], int],
    pool: Callable[[int], Pool],
    reference: Callable[[str, PolicyConfig], dict[str, Any]],
) -> None:
    model, stage, size, layout, zero = row
    expected = reference(model, stage)
    found = pool(size).run(steps_of, model, stage, ParallelConfig(**layout), zero)
    for each in found:
        assert each["texts"] == expected["texts"]
        same_step_facts(expected["facts"], each["facts"])
    same_training(expected, found[0])


@pytest.mark.parametrize("model", ["llava", "qwen2_vl"])
def test_texts_are_written_by_what_is_learnt(model: str, reference: Any) -> None:
    """What the generator says of its tokens is what the trained model says of them, pictures and positions included;
    the tower learns."""
    found = reference(model, GRPO if model == "llava" else PPO)
    assert max(metrics["train/mismatch_kl"] for metrics in found["metrics"]) < 1e-9
    moved = found["grads"]["policy"]
    assert max(float(g.abs().max()) for name, g in moved.items() if name.startswith("vision.")) > 1e-5
