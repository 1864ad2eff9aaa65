"""Stages under every schedule compute what the whole model computes in one process, to 1e-6."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from parallel.config import ParallelConfig
from parallel.schedules import fewest_micro_batches
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


def compare(pool: Any, layout: ParallelConfig, cfg: Any, counts: list[int], freeze: int = -1, **more: Any) -> None:
    """Every step: metrics, scores and gradients of the pipeline against the whole model."""
    want = cases.alone(cfg, counts, freeze)
    ranks = pool(layout.pp).run(cases.piped, layout, cfg, counts, freeze=freeze, **more)
    holder = 0 if layout.schedule == "zbv" else layout.pp - 1
    for step, (expected, count) in enumerate(zip(want, counts, strict=True)):
        for kind in ("terms", "scores"):
            assert [len(rank[step][kind]) for rank in ranks] == [count * (r == holder) for r in range(layout.pp)]
            for got, wanted in zip(ranks[holder][step][kind], expected[kind], strict=True):
                torch.testing.assert_close(got, wanted, rtol=1e-6, atol=0)
        assert distance(expected["gradients"], joined(ranks, step)) <= 1e-6
        assert all(0 < rank[step]["time"].busy_s < rank[step]["time"].wall_s for rank in ranks)


@pytest.mark.parametrize(("schedule", "vpp"), SCHEDULES)
@pytest.mark.parametrize("pp", [2, 4])
def test_stages_compute_what_the_whole_model_computes(pool: Any, pp: int, schedule: Any, vpp: int) -> None:
    """Also the second step of a size, one of another size, and the fewest micro-batches the schedule runs with."""
    layout = ParallelConfig(pp=pp, schedule=schedule, vpp=vpp)
    compare(pool, layout, cases.model_config(8), [pp, 2 * pp, fewest_micro_batches(schedule, pp), pp])


@pytest.mark.parametrize(("schedule", "vpp"), [("1f1b", 1), ("zero_bubble", 2), ("zbv", 2)])
def test_tied_embeddings_with_whole_layers_made_again(pool: Any, schedule: Any, vpp: int) -> None:
    """First and last stage each hold the table: its gradient is their sum. A put-off weight gradient of a layer that
    was made again needs the parameter, not the alias that recomputation saves."""
    layout = ParallelConfig(pp=2, schedule=schedule, vpp=vpp)
    compare(pool, layout, cases.model_config(5, tied=True), [4], recompute="full")
    compare(pool, layout, cases.model_config(5, tied=True), [4], recompute="selective")


def test_stages_of_unequal_layers_given_by_hand(pool: Any) -> None:
    layout = ParallelConfig(pp=2, schedule="interleaved", vpp=2, stage_layers=(1, 3, 1, 2))
    compare(pool, layout, cases.model_config(7), [4])


@pytest.mark.parametrize(("schedule", "vpp"), SCHEDULES)
def test_frozen_first_layers(pool: Any, schedule: Any, vpp: int) -> None:
    """Three of four stages' worth of layers are frozen: the trained rest gets the same gradients, nothing else any."""
    compare(pool, ParallelConfig(pp=2, schedule=schedule, vpp=vpp), cases.model_config(8), [4], freeze=5)


def test_no_gradients_are_sent_to_stages_with_nothing_trained_before(pool: Any) -> None:
    layout, cfg = ParallelConfig(pp=2, schedule="interleaved", vpp=2, stage_layers=(2, 2, 2, 2)), cases.model_config(8)
    got = pool(2).run(cases.sent_gradients, layout, cfg, 4)
    assert got == [[False, True], [False, False]]  # stages 0 and 2, 1 and 3; the last has nothing behind it
    assert pool(2).run(cases.sent_gradients, layout, cfg, -1) == [[True, True], [True, False]]


@pytest.mark.parametrize(("schedule", "vpp"), [("gpipe", 1), ("interleaved", 2), ("zbv", 2)])
@pytest.mark.parametrize("count", [1, 35])
def test_forward_only_for_any_number_of_micro_batches(pool: Any, count: int, schedule: Any, vpp: int) -> None:
    layout, cfg = ParallelConfig(pp=2, schedule=schedule, vpp=vpp), cases.model_config(4)
    ranks = pool(2).run(cases.scored, layout, cfg, count)
    model = cases.filled(cases.build(cfg))
    with torch.no_grad():
        want = [cases.STAGE.forward(model, batch, 1.0)[1] for batch in cases.micro_batches(count)]
    got = next(scores for scores in ranks if scores)
    assert sum(map(len, ranks)) == count
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("schedule", "vpp"), [("1f1b", 1), ("interleaved", 2), ("zero_bubble", 2), ("zbv", 2)])
def test_zero_bubble_schedules_put_off_weight_gradients(pool: Any, schedule: Any, vpp: int) -> None:
    """Four linear layers a layer, each product once; which of them wait is the schedule's choice."""
    layers, count = 4, 4
    cfg = cases.model_config(layers)
    ranks = pool(2).run(cases.weight_products, ParallelConfig(pp=2, schedule=schedule, vpp=vpp), cfg, count)
    assert sum(sum(found.values()) for found in ranks) == 4 * layers * count
    waited = sum(found["after"] for found in ranks)
    assert waited > 0 if schedule in ("zero_bubble", "zbv") else waited == 0


def test_a_mistake_of_the_user_stays_a_value_error(pool: Any) -> None:
    got = pool(2).run(cases.failing, ParallelConfig(pp=2), cases.model_config(2))
    assert got == ["this batch is no good"] * 2
