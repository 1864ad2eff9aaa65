"""Launcher's ranks, one process by hand, and sums over ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from parallel.groups import LAUNCHER_VARIABLES, Groups, LauncherRanks, build_groups
from parallel.sharding import Axis
from tests import engine_cases

GOOD = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name, value in GOOD.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def test_reads_the_launcher(launched: pytest.MonkeyPatch) -> None:
    assert LauncherRanks.read() == LauncherRanks(rank=3, world=4, local_rank=1)


def test_by_hand_is_rank_0_of_1(launched: pytest.MonkeyPatch) -> None:
    launched.delenv("RANK")
    assert LauncherRanks.read() == LauncherRanks(0, 1, 0)


@pytest.mark.parametrize("missing", [["WORLD_SIZE"], ["LOCAL_RANK"], ["MASTER_ADDR", "MASTER_PORT"]])
def test_missing_variables_are_named(launched: pytest.MonkeyPatch, missing: list[str]) -> None:
    for name in missing:
        launched.delenv(name)
    with pytest.raises(ValueError) as refusal:
        LauncherRanks.read()
    message = str(refusal.value)
    assert ", ".join(missing) in message and "torchrun" in message
    there = set(LAUNCHER_VARIABLES) - set(missing) - {"RANK"}
    assert not [name for name in there if name in message]


def test_one_process_needs_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not dist.is_initialized()
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("LOCAL_RANK", "0")  # set, so that it is taken back after the test
    groups = build_groups(LauncherRanks(), 60)
    try:
        assert dist.get_world_size() == 1
        assert (groups.rank, groups.world, groups.dp.size, groups.dp.rank, groups.tp.size) == (0, 1, 1, 0, 1)
        assert groups.is_main and groups.all_gather({"a": 1}) == [{"a": 1}] and groups.sum([2.5]) == [2.5]
        groups.barrier()
    finally:
        dist.destroy_process_group()


def test_only_rank_0_is_main() -> None:
    axis = Axis(2, 1)
    assert [Groups(rank, 2, torch.device("cpu"), axis).is_main for rank in (0, 1)] == [True, False]


def test_sums_are_float64_and_reach_every_rank(pool) -> None:
    """2^24 + 1 and 2^53 - 1 survive; float32 would lose the first, and both ranks hear the same."""
    mine = [[2.0**24, 2.0**53 - 2, 0.25], [1.0, 1.0, -0.5]]
    assert pool(2).run(engine_cases.summed, mine) == [[2.0**24 + 1, 2.0**53 - 1, -0.25]] * 2
