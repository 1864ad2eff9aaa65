"""Virtual tokens in every layout train as in one process: losses, norms, first gradients, what is learnt."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from models.adapters.virtual_config import PrefixConfig, PromptConfig
from parallel.config import ParallelConfig
from tests import adapter_cases, cases
from tests.cases import TINY
from tests.pool import Pool

TOLERANCE = 1e-5
DEEP = dataclasses.replace(TINY, num_layers=4, tied_embeddings=True)
ONE_KV = dataclasses.replace(TINY, num_kv_heads=1)
PROMPT, PREFIX = PromptConfig(tokens=3, tokens_init="text", init_text="ab"), PrefixConfig(tokens=3)
SP: dict[str, Any] = {"sequence_parallel": True}
ROWS: list[tuple[Any, Any, int, dict[str, Any]]] = [
    (DEEP, PROMPT, 4, {"tp": 2, **SP, "pp": 2, "micro_rows": 2}),
    (DEEP, PROMPT, 2, {"pp": 2, "schedule": "zbv", "micro_rows": 2, "zero": 0, "recompute": "full"}),
    (DEEP, PROMPT, 4, {"tp": 2, **SP, "zero": 3, "micro_rows": 2}),
    (DEEP, PROMPT, 2, {"zero": 2, "micro_rows": 2, "recompute": "selective"}),
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
