"""Adapters in every layout train as in one process: losses, norms, first gradients, the adapter after three steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from models.adapters.config import BitfitConfig, Ia3Config, LoraConfig
from models.config import MoEConfig
from parallel.config import ParallelConfig
from tests import adapter_cases, cases
from tests.cases import TINY
from tests.pool import Pool

TOLERANCE = 1e-5
DEEP = dataclasses.replace(TINY, num_layers=4, tied_embeddings=True)
BIASED = dataclasses.replace(DEEP, qkv_bias=True, attention_out_bias=True, mlp_bias=True)
ONE_KV = dataclasses.replace(TINY, num_kv_heads=1)
LORA, SOME = LoraConfig(rank=4, alpha=8), LoraConfig(rank=4, alpha=8, targets=("q_proj", "v_proj", "down_proj"))
DORA, PISSA = dataclasses.replace(LORA, dora=True), dataclasses.replace(LORA, init="pissa")
DROPPED = dataclasses.replace(LORA, dropout=0.3)
WIDE = dataclasses.replace(DEEP, hidden_size=64, intermediate_size=128, head_dim=16)
MOE = dataclasses.replace(DEEP, family="mixtral", moe=MoEConfig(4, 2, 48, capacity=1.25))
EXPERTS = dataclasses.replace(LORA, targets=("v_proj", "experts.gate_up_proj", "experts.down_proj"))
QMOE = dataclasses.replace(WIDE, family="mixtral", num_layers=2, head_dim=32, moe=MoEConfig(4, 2, 128))
QLORA = dataclasses.replace(LORA, base="nf4")
SP: dict[str, Any] = {"sequence_parallel": True}
ROWS: list[tuple[Any, Any, int, dict[str, Any]]] = [
    (DEEP, LORA, 2, {"tp": 2, **SP, "recompute": "full"}),
    (DEEP, LORA, 2, {"zero": 0, "micro_rows": 2, "cp": 2}),
    (DEEP, SOME, 2, {"zero": 2, "micro_rows": 2, "recompute": "selective"}),
    (DEEP, LORA, 2, {"pp": 2, "schedule": "zbv", "micro_rows": 2, "zero": 0}),
    (DEEP, SOME, 2, {"pp": 2, "schedule": "zero_bubble", "micro_rows": 2}),
    (DEEP, DROPPED, 4, {"tp": 2, **SP, "pp": 2, "micro_rows": 2, "recompute": "selective"}),
    (DEEP, DROPPED, 4, {"tp": 2, "cp": 2, "micro_rows": 2, "recompute": "full", "zero": 3}),
    (ONE_KV, dataclasses.replace(DROPPED, dora=True), 2, {"tp": 2, **SP, "recompute": "full"}),
    (ONE_KV, LORA, 4, {"tp": 4, **SP}),
    (DEEP, LORA, 4, {"tp": 2, **SP, "zero": 3, "micro_rows": 2}),
    (ONE_KV, DORA, 2, {"tp": 2, **SP, "recompute": "full"}),
    (BIASED, PISSA, 4, {"tp": 2, "zero": 3, "micro_rows": 2}),
    (BIASED, Ia3Config(), 4, {"tp": 2, **SP, "pp": 2, "micro_rows": 2}),
    (BIASED, BitfitConfig(), 4, {"tp": 2, **SP, "pp": 2, "micro_rows": 2}),
    (ONE_KV, Ia3Config(), 2, {"tp": 2, "zero": 3}),
    (MOE, EXPERTS, 2, {"ep": 2, "zero": 2, "micro_rows": 2, "recompute": "full"}),
    (MOE, EXPERTS, 2, {"pp": 2, "schedule": "zbv", "micro_rows": 2, "zero": 0}),
    (MOE, EXPERTS, 4, {"tp": 2, **SP, "ep": 2, "micro_rows": 2, "recompute": "selective"}),
    (MOE, EXPERTS, 4, {"tp": 2, "cp": 2, "ep": 2, "zero": 2}),
    (MOE, EXPERTS, 2, {"zero": 3, "micro_rows": 2}),
    (MOE, EXPERTS, 4, {"ep": 2, "pp": 2, "micro_rows": 2, "zero": 0}),
    (dataclasses.replace(WIDE, head_dim=32), QLORA, 2, {"tp": 2, **SP, "zero": 2}),
    (QMOE, dataclasses.replace(EXPERTS, base="nf4"), 4, {"tp": 2, **SP, "ep": 2, "zero": 2, "micro_rows": 2}),
]


def name(row: Any) -> str:
    """What a row is called."""
    model, adapter, processes, options = row
    kinds = {DORA: "dora", PISSA: "pissa", SOME: "some", QLORA: "qlora", EXPERTS: "experts", DROPPED: "dropped"}
    kind, shape = kinds.get(adapter, adapter.name), f"{model.num_layers}x{model.hidden_size}"
    return f"{kind}-{shape}-{processes}-{','.join(f'{key}-{value}' for key, value in options.items())}"


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
    for each in found:
        assert each["frozen_gradients"] == 0
    assert found[0]["losses"] == pytest.approx(expected["losses"], rel=TOLERANCE)
    assert found[0]["off"] == pytest.approx(expected["off"], rel=TOLERANCE)
    assert found[0]["norm"] == pytest.approx(expected["norm"], rel=TOLERANCE)
    assert cases.distance(expected["grads"], found[0]["grads"]) < TOLERANCE
    assert cases.distance(expected["weights"], found[0]["weights"]) < TOLERANCE


def test_routers_below_what_is_trained_count(pool: Callable[[int], Pool]) -> None:
    """With adapters on experts alone nothing before the first router has a gradient of its own."""
    adapter = LoraConfig(rank=4, targets=("experts.down_proj",))
    tokens = pool(1).run(adapter_cases.router_tokens, MOE, adapter)[0]
    assert len(set(tokens)) == 1 and tokens[0] > 0
