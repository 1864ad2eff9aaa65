"""Virtual tokens in every layout train as in one process: losses, norms, first gradients, what is learnt."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from models.adapters.virtual_config import PrefixConfig, PromptConfig
from parallel.config import ParallelConfig
from tests import adapter_cases, cases, rl_cases
from tests.cases import TINY
from tests.pool import Pool
from trainer.stages.grpo import GrpoConfig

TOLERANCE = 1e-5
DEEP = dataclasses.replace(TINY, num_layers=4, tied_embeddings=True)
ONE_KV = dataclasses.replace(TINY, num_kv_heads=1)
PROMPT = PromptConfig(tokens=3, tokens_init="text", init_text="ab")
PREFIX = PrefixConfig(tokens=3, tokens_init="random")
SP: dict[str, Any] = {"sequence_parallel": True}
ROWS: list[tuple[Any, Any, int, dict[str, Any]]] = [
    (DEEP, PROMPT, 4, {"tp": 2, **SP, "pp": 2, "micro_rows": 2}),
    (DEEP, PROMPT, 2, {"pp": 2, "schedule": "zbv", "micro_rows": 2, "zero": 0, "recompute": "full"}),
    (DEEP, PROMPT, 4, {"tp": 2, **SP, "zero": 3, "micro_rows": 2, "recompute": "selective"}),
    (DEEP, PREFIX, 4, {"tp": 2, **SP, "pp": 2, "micro_rows": 2, "recompute": "full"}),
    (DEEP, PREFIX, 4, {"tp": 2, "zero": 3, "micro_rows": 2}),
    (ONE_KV, PREFIX, 4, {"tp": 4, **SP, "zero": 0}),
]


def name(row: Any) -> str:
    """What a row is called."""
    model, adapter, processes, options = row
    shape = f"{model.num_layers}x{model.num_kv_heads}"
    return f"{adapter.name}-{shape}-{processes}-{','.join(f'{key}-{value}' for key, value in options.items())}"


@pytest.fixture(scope="module")
def references() -> dict[Any, dict[str, Any]]:
    """Trainings of one process, made once."""
    return {}


@pytest.mark.parametrize("row", ROWS, ids=name)
def test_a_layout_is_one_process(row: Any, pool: Callable[[int], Pool], references: dict[Any, dict[str, Any]]) -> None:
    model, adapter, processes, options = row
    key = (model, adapter)
    if key not in references:
        references[key] = pool(1).run(adapter_cases.train, model, adapter)[0]
    expected = references[key]
    options = dict(options)
    of_step = {key: options.pop(key) for key in ("zero", "recompute", "micro_rows") if key in options}
    found = pool(processes).run(adapter_cases.train, model, adapter, layout=ParallelConfig(**options), **of_step)
    assert found[0]["losses"] == pytest.approx(expected["losses"], rel=TOLERANCE)
    assert found[0]["off"] == pytest.approx(expected["off"], rel=TOLERANCE)
    assert found[0]["norm"] == pytest.approx(expected["norm"], rel=TOLERANCE)
    assert found[0]["grads"].keys() == expected["grads"].keys()
    assert cases.distance(expected["grads"], found[0]["grads"]) < TOLERANCE
    assert cases.distance(expected["weights"], found[0]["weights"]) < TOLERANCE


@pytest.mark.parametrize(
    ("adapter", "layout", "zero"),
    [(PromptConfig(tokens=3), {"pp": 2}, 1), (PREFIX, {"tp": 2, **SP}, 3)],
    ids=["prompt", "prefix"],
)
def test_a_generator_has_them_too(adapter: Any, layout: dict[str, Any], zero: Any, pool: Callable[[int], Pool]) -> None:
    """Steps of GRPO: weights that had to be moved write the same texts, and the probabilities are the policy's."""
    given = {"adapter": adapter, "steps": 2}
    stage = GrpoConfig(kl="loss")
    expected = pool(1).run(rl_cases.rl_steps, stage, DEEP, ParallelConfig(), **given)[0]
    found = pool(2).run(rl_cases.rl_steps, stage, DEEP, ParallelConfig(**layout), zero, **given)[0]
    assert found["texts"] == expected["texts"]
    for ours, theirs in zip(expected["metrics"], found["metrics"], strict=True):
        assert theirs["train/mismatch_kl"] < 1e-9 and ours["train/kl"] > 1e-6
        for name in ("train/loss", "train/kl", "train/grad_norm"):
            assert theirs[name] == pytest.approx(ours[name], rel=1e-4, abs=1e-6), name
    assert cases.distance(expected["weights"]["policy"], found["weights"]["policy"]) < TOLERANCE
