"""Experts shared out over processes compute what one process computes: loss, every gradient, every count."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from parallel.config import ParallelConfig
from parallel.experts import Dispatch, grouped_products, grouped_weight_gradient, pieces
from parallel.sharding import ALONE
from tests import moe_cases
from tests.moe_cases import KINDS, merged_gradients, step
from tests.pool import Pool

LAYOUTS = {
    "ep2": (2, ParallelConfig(ep=2)),
    "tp2": (2, ParallelConfig(tp=2)),
    "tp2_rows": (2, ParallelConfig(tp=2, sequence_parallel=True)),
    "cp2_ep2": (2, ParallelConfig(cp=2, ep=2)),
    "ep4": (4, ParallelConfig(ep=4)),
    "tp2_ep2": (4, ParallelConfig(tp=2, ep=2)),
    "tp2_ep2_rows": (4, ParallelConfig(tp=2, ep=2, sequence_parallel=True)),
    "cp2_ep4_ulysses": (4, ParallelConfig(cp=2, ep=4, context="ulysses")),
    "cp2_tp2_ep2_rows": (4, ParallelConfig(cp=2, tp=2, ep=2, sequence_parallel=True)),
}


def compare(moe: Any, ranks: list[dict[str, Any]], whole: dict[str, Any]) -> None:
    """Loss and gradients within 1e-6 and 3e-6 of the largest value (fp32 sums in another order); counts exact."""
    torch.testing.assert_close(ranks[0]["loss"], whole["loss"], rtol=1e-6, atol=0)
    for name, grad in merged_gradients(moe, ranks).items():
        expected = whole["grads"][name]
        torch.testing.assert_close(grad, expected, rtol=0, atol=3e-6 * expected.abs().max().item(), msg=name)
    for rank in ranks:
        assert rank["report"].layers.keys() == whole["report"].layers.keys()
        for layer, report in whole["report"].layers.items():
            got = rank["report"].layers[layer]
            for field in ("load_CE", "tokens_C", "dropped_C"):
                torch.testing.assert_close(getattr(got, field), getattr(report, field), rtol=0, atol=0)
            torch.testing.assert_close(got.entropy_C, report.entropy_C, rtol=1e-6, atol=0)
            assert got.balance == pytest.approx(report.balance, rel=1e-6)
            assert got.z == pytest.approx(report.z, rel=1e-6)
        for name, bias in whole["biases"].items():
            torch.testing.assert_close(rank["biases"][name], bias, rtol=0, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_layouts_equal_one_process(pool: Callable[[int], Pool], kind: str, layout: str) -> None:
    """Two steps, so that the loads of the first weigh in the balancing loss of the second."""
    size, cut = LAYOUTS[layout]
    compare(KINDS[kind], pool(size).run(step, KINDS[kind], cut, steps=2), step(KINDS[kind], steps=2))


@pytest.mark.parametrize(
    ("layout", "recompute"),
    [("ep2", "none"), ("ep2", "selective"), ("ep2", "full"), ("ep4", "full"), ("tp2_ep2", "none")],
)
def test_experts_and_ranks_without_a_token(pool: Callable[[int], Pool], layout: str, recompute: str) -> None:
    """All tokens go to experts 0 and 1: the other ranks get no row, and zero gradients."""
    moe, bias = moe_cases.FULL, [9.0, 9.0, 0, 0, 0, 0, 0, 0]
    size, cut = LAYOUTS[layout]
    ranks = pool(size).run(step, moe, cut, recompute, bias)
    whole = step(moe, None, "none", bias)
    compare(moe, ranks, whole)
    for name, grad in whole["grads"].items():
        if "experts" in name:
            assert grad[:2].abs().max() > 0 and grad[2:].abs().max() == 0
    load_E = whole["report"].layers[0].load_CE.sum(0)
    assert load_E[:2].tolist() == [sum(moe_cases.LENGTHS)] * 2 and load_E[2:].sum() == 0


def test_grouped_kernel_equals_the_loop() -> None:
    """torch's grouped product (on a CPU its own fallback) against one product an expert; bf16, 2e-2 of the largest."""
    draw = torch.Generator().manual_seed(0)
    choice_Tk = torch.randint(0, 3, (40, 2), generator=draw)  # of four experts the last gets nothing
    plan = Dispatch.plan(choice_Tk, None, 4, 40, ALONE)
    rows = torch.randn(80, 16, generator=draw).bfloat16()
    weight = torch.randn(4, 24, 16, generator=draw).bfloat16()
    grads = torch.randn(80, 24, generator=draw).bfloat16()
    one_by_one = torch.cat(grouped_products(pieces(rows, plan, False), weight, plan, False))
    (together,) = grouped_products(pieces(rows, plan, True), weight, plan, True)
    torch.testing.assert_close(together, one_by_one, rtol=2e-2, atol=2e-2)
    both = [
        grouped_weight_gradient(weight, pieces(grads, plan, g), pieces(rows, plan, g), plan, g) for g in (False, True)
    ]
    torch.testing.assert_close(both[1], both[0], rtol=2e-2, atol=2e-1)
    assert both[0][3].abs().max() == 0 == both[1][3].abs().max()


def test_plan_brings_every_row_back() -> None:
    """Some choices are dropped, padding follows the tokens: each token gets the sum over its kept choices."""
    choice_Tk = torch.tensor([[2, 0], [1, 2], [0, 1]])
    kept_Tk = torch.tensor([[True, True], [False, False], [True, False]])
    plan = Dispatch.plan(choice_Tk, kept_Tk, 3, 5, ALONE)
    assert plan.counts == [2, 0, 1] and plan.token_M.tolist() == [0, 2, 0]
    x = torch.tensor([[1.0], [10.0], [100.0], [7.0], [7.0]])
    assert plan.sum_of_tokens(x[plan.token_M]).flatten().tolist() == [2.0, 0.0, 100.0, 0.0, 0.0]
