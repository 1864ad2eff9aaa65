"""Where documents may have their beginning in common."""

from __future__ import annotations

from dataclasses import replace

import pytest

from models.config import ModelConfig, MoEConfig, RopeConfig
from parallel.config import ParallelConfig
from tests.tp_cases import CFG
from trainer.sharing import sharing_fault


@pytest.mark.parametrize(
    ("model", "layout", "key"),
    [
        (CFG, ParallelConfig(tp=2, pp=2), None),
        (replace(CFG, rope=RopeConfig(scaling="yarn", factor=2.0)), ParallelConfig(), None),
        (CFG, ParallelConfig(cp=2), "parallel.cp"),
        (replace(CFG, rope=RopeConfig(scaling="dynamic", factor=2.0)), ParallelConfig(), "model.rope.scaling"),
        (replace(CFG, moe=MoEConfig(4, 2, 16)), ParallelConfig(), "model.moe"),
    ],
)
def test_what_keeps_them_apart(model: ModelConfig, layout: ParallelConfig, key: str | None) -> None:
    fault = sharing_fault(model, layout)
    assert (fault and fault[0]) == key
