"""Rules and formulas of the schedules against torch's own schedules, run on paper."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.pipelining.schedules import _ComputationType

from parallel.schedules import (
    fewest_micro_batches,
    formula_idle_share,
    forward_order,
    next_micro_batches,
    stage_ids,
)
from parallel.torch_schedules import training_schedule

SCHEDULES = [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("interleaved", 3), ("zero_bubble", 1), ("zero_bubble", 2)]
SCHEDULES += [("zbv", 2)]


def on_paper(schedule: Any, pp: int, vpp: int, micro_batches: int) -> Any:
    """torch's schedule over stages that only say where they are."""
    ids = stage_ids(schedule, pp, vpp, 0)
    stages = [
        SimpleNamespace(
            stage_index=i, num_stages=pp * vpp, group_size=pp, group_rank=0, is_first=i == 0, submod=torch.nn.Identity()
        )
        for i in ids
    ]
    return training_schedule(schedule, stages, micro_batches, lambda loss, _: loss)


Work = tuple[int, str, int]
"""Stage, kind (F forward, B backward, or its halves I and W) and micro-batch."""
LENGTH = {"F": 1, "I": 1, "W": 1, "B": 2}


def order_of(schedule: Any, pp: int, vpp: int, micro_batches: int) -> dict[int, list[Work]]:
    """What each rank does, in order."""
    if schedule == "1f1b":  # torch's list for its last rank begins with micro-batch 1; this is what its loop does
        return {rank: one_forward_one_backward(pp, rank, micro_batches) for rank in range(pp)}
    orders = on_paper(schedule, pp, vpp, micro_batches).pipeline_order
    found = {
        rank: [(a.stage_index, a.computation_type.value, a.microbatch_index) for a in actions if a is not None]
        for rank, actions in orders.items()
    }
    return {rank: [work for work in actions if work[1] in LENGTH] for rank, actions in found.items()}


def one_forward_one_backward(pp: int, rank: int, micro_batches: int) -> list[Work]:
    ahead = min(micro_batches, pp - rank)
    forwards: list[Work] = [(rank, "F", i) for i in range(micro_batches)]
    backwards: list[Work] = [(rank, "B", i) for i in range(micro_batches)]
    later = forwards[ahead:]
    steady = [work for pair in zip(backwards, later, strict=False) for work in pair]
    return forwards[:ahead] + steady + backwards[len(later) :]


def needs(work: Work, last: int) -> list[Work]:
    """Any one of these comes before; empty if nothing."""
    stage, kind, number = work
    if kind == "W":
        return [(stage, "I", number)]
    if kind == "F":
        return [] if stage == 0 else [(stage - 1, "F", number)]
    return [(stage, "F", number)] if stage == last else [(stage + 1, "I", number), (stage + 1, "B", number)]


def simulated_idle_share(schedule: Any, pp: int, vpp: int, micro_batches: int) -> float:
    """Each rank does its list in order, each piece of work as soon as what it needs is there."""
    todo = order_of(schedule, pp, vpp, micro_batches)
    done: dict[Work, int] = {}
    clock, busy = dict.fromkeys(todo, 0), dict.fromkeys(todo, 0)
    while any(todo.values()):
        progress = False
        for rank, actions in todo.items():
            while actions:
                before = needs(actions[0], pp * vpp - 1)
                there = [done[work] for work in before if work in done]
                if before and not there:
                    break
                work = actions.pop(0)
                clock[rank] = done[work] = max([clock[rank], *there]) + LENGTH[work[1]]
                busy[rank] += LENGTH[work[1]]
                progress = True
        assert progress, "the lists wait for each other"
    return 1 - sum(busy.values()) / (pp * max(clock.values()))


@pytest.mark.parametrize(("schedule", "vpp"), SCHEDULES)
@pytest.mark.parametrize("pp", [2, 4, 8])
def test_formula_is_what_the_lists_give(pp: int, schedule: Any, vpp: int) -> None:
    for micro_batches in (2 * pp, 4 * pp):
        want = simulated_idle_share(schedule, pp, vpp, micro_batches)
        assert formula_idle_share(schedule, pp, vpp, micro_batches) == pytest.approx(want, abs=1e-9)


@pytest.mark.parametrize(("schedule", "vpp"), SCHEDULES)
@pytest.mark.parametrize("pp", [2, 3, 4])
def test_rules_for_micro_batches_are_those_of_torch(pp: int, schedule: Any, vpp: int) -> None:
    assert next_micro_batches(schedule, pp, 1) == fewest_micro_batches(schedule, pp)
    for count in range(1, 4 * pp + 2):
        if next_micro_batches(schedule, pp, count) == count:
            on_paper(schedule, pp, vpp, count)
        else:
            with pytest.raises(ValueError):
                on_paper(schedule, pp, vpp, count)


@pytest.mark.parametrize(("schedule", "vpp"), SCHEDULES)
@pytest.mark.parametrize("pp", [2, 3, 4])
def test_stages_lie_where_torch_expects_them(pp: int, schedule: Any, vpp: int) -> None:
    made = on_paper(schedule, pp, vpp, 2 * pp)
    order = made.pipeline_order
    for rank in range(pp):
        ids = stage_ids(schedule, pp, vpp, rank)
        assert {a.stage_index for a in order[rank] if a is not None} == set(ids)
    assert sorted(s for r in range(pp) for s in stage_ids(schedule, pp, vpp, r)) == list(range(pp * vpp))


@pytest.mark.parametrize(("schedule", "vpp"), SCHEDULES)
@pytest.mark.parametrize("micro_batches", [1, 3, 8])
@pytest.mark.parametrize("pp", [2, 4])
def test_forward_order_runs_everything_once_and_never_waits_in_a_circle(
    pp: int, micro_batches: int, schedule: Any, vpp: int
) -> None:
    todo = {rank: forward_order(schedule, pp, vpp, rank, micro_batches) for rank in range(pp)}
    everything = {(s, i) for s in range(pp * vpp) for i in range(micro_batches)}
    done: set[tuple[int, int]] = set()
    assert sum(map(len, todo.values())) == len(everything)
    ticks = 0
    while done != everything:
        ready = [order.pop(0) for order in todo.values() if order and (order[0][0] == 0 or _before(order[0]) in done)]
        assert ready, "the ranks wait for each other"
        done |= set(ready)
        ticks += 1
    # What one rank computes, the way through the pipeline once, and what an incomplete round leaves open.
    assert ticks <= vpp * micro_batches + pp * vpp + 2 * pp


def _before(work: tuple[int, int]) -> tuple[int, int]:
    return work[0] - 1, work[1]


def test_kinds_of_work_are_still_called_so() -> None:
    assert [_ComputationType.FORWARD.value, _ComputationType.FULL_BACKWARD.value] == ["F", "B"]
