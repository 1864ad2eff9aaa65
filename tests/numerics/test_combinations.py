"""Features that README's table says go with every layout and that the matrix has no rows for: offload, bf16, fp16."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from models.config import MoEConfig
from parallel.config import ParallelConfig
from tests import cases

DEEP = dataclasses.replace(cases.TINY, num_layers=4)
EXPERTS = dataclasses.replace(DEEP, family="mixtral", moe=MoEConfig(num_experts=4, top_k=2, expert_size=48))
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp with sequence parallel": {"tp": 2, "sequence_parallel": True},
    "pp 1f1b": {"pp": 2},
    "pp zbv": {"pp": 2, "schedule": "zbv"},
    "cp ring": {"cp": 2},
    "cp ulysses": {"cp": 2, "context": "ulysses"},
    "ep": {"ep": 2},
}
SETTINGS = {"offload": {"offload": True}, "bf16": {"precision": "bf16"}, "fp16": {"precision": "fp16"}}
TOLERANCE = {"offload": 1e-5, "bf16": 1e-4, "fp16": 1e-4}
"""Of the losses of two steps, relative; measured 5e-9, 6e-6 and 2e-6. A reduced type rounds otherwise when cut."""


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_trains_as_one_process_does(pool, layout: str, setting: str) -> None:
    model = EXPERTS if layout == "ep" else DEEP
    cut = ParallelConfig(**LAYOUTS[layout])
    one = pool(1).run(cases.train, 1, 1, 2, model=model, **SETTINGS[setting])[0]
    both = pool(2).run(cases.train, 1, 1, 2, model=model, layout=cut, **SETTINGS[setting])
    losses = both[-1 if layout == "pp 1f1b" else 0]["losses"]
    assert cases.relative(one["losses"], losses) <= TOLERANCE[setting]
    if setting == "offload":
        assert cases.distance(one["grads"], both[0]["grads"]) <= 1e-5
        assert cases.distance(one["weights"], both[0]["weights"]) <= 1e-5
