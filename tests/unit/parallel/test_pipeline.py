"""Stages under every schedule compute what the whole model computes in one process, to 1e-6."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from parallel.config import ParallelConfig
from tests import pipeline_cases as cases
from tests.cases import distance

SCHEDULES = [("gpipe", 1), ("1f1b", 1), ("interleaved", 1), ("interleaved", 2), ("zero_bubble", 1), ("zero_bubble", 2)]
SCHEDULES += [("zbv", 2)]


def joined(ranks: list[list[dict[str, Any]]], step: int) -> dict[str, torch.Tensor]:
    """All gradients by their global names; both ends of a tied embedding are summed, as the engine does."""
    whole: dict[str, torch.Tensor] = {}
    for rank in ranks:
        for name, grad in rank[step]["gradients"].items():
            assert name not in whole or name == "embed.weight", f"{name} is on two stages"
            whole[name] = whole[name] + grad if name in whole else grad
    return whole


def compare(pool: Any, layout: ParallelConfig, cfg: Any, counts: list[int], **more: Any) -> list[list[dict[str, Any]]]:
    """Every step: metrics, scores and gradients of the pipeline against the whole model."""
    want = cases.alone(cfg, counts)
    ranks = pool(layout.pp).run(cases.piped, layout, cfg, counts, **more)
    holder = layout.pp - 1 if layout.schedule != "zbv" else 0
    for step, expected in enumerate(want):
        for kind in ("terms", "scores"):
            assert [len(rank[step][kind]) for rank in ranks] == [
                counts[step] if r == holder else 0 for r in range(layout.pp)
            ]
            for got, wanted in zip(ranks[holder][step][kind], expected[kind], strict=True):
                torch.testing.assert_close(got, wanted, rtol=1e-6, atol=0)
        assert distance(expected["gradients"], joined(ranks, step)) <= 1e-6
    return ranks


@pytest.mark.parametrize(("schedule", "vpp"), SCHEDULES)
@pytest.mark.parametrize("pp", [2, 4])
def test_stages_compute_what_the_whole_model_computes(pool: Any, pp: int, schedule: Any, vpp: int) -> None:
    layout = ParallelConfig(pp=pp, schedule=schedule, vpp=vpp)
    compare(pool, layout, cases.model_config(8), [8, pp, 8])
