"""Losses of the tiny families are what they were: a change of numerics shows as a change of a committed file.

After a wanted change: ``python -m tests.numerics.test_golden`` writes the file anew; say why in the commit.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from models import ModelConfig
from parallel.config import EngineConfig
from tests import cases
from trainer import typed
from trainer.build import make_engine
from trainer.optim import OptimConfig
from trainer.stages.next_token import NextToken

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "losses.json"
FAMILIES = ("tiny_llama", "tiny_qwen2", "tiny_qwen3")


def losses(model: str, steps: int = 5) -> list[float]:
    """Training losses of fresh weights (seed 3) on the uneven rows, one process, ZeRO-1, lr 1e-2."""
    torch.set_num_threads(1)
    tree = OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / "model" / f"{model}.yaml"))
    cfg = typed.build(ModelConfig, tree, "model", [], {})
    assert cfg is not None
    groups = cases.here()
    engine = make_engine(cfg, EngineConfig(), OptimConfig(lr=1e-2), groups, cases.InitSource(cfg, seed=3))
    stage = NextToken(len(cases.NAMES))
    found = []
    for step in range(steps):
        batches = cases.my_micro_batches(step, groups, 4)
        count = stage.count(batches)
        result = engine.train_step(batches, stage.forward, count, 1e-2)
        found.append(float(sum(terms[:, 0].sum() for terms in result.metrics)) / count)
    return found


@pytest.mark.parametrize("model", FAMILIES)
def test_losses_are_what_they_were(pool, model: str) -> None:
    """1e-6 relative: room for another processor's order of summation, not for another computation."""
    golden = json.loads(GOLDEN.read_text())[model]
    assert cases.relative(golden, pool(1).run(losses, model)[0]) <= 1e-6


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps({model: losses(model) for model in FAMILIES}, indent=2) + "\n")
