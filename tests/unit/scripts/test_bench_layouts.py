"""The benchmarks of layouts: equal work for every contender, tokens counted once, growth held against the formula."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from parallel.engine import Engine
from parallel.sharding import Axis
from scripts.bench import growth, loom, pretrain, workload
from scripts.bench.harness import Contender, Record, table
from scripts.bench.peers import plain
from scripts.bench.turns import Schedule, Turn
from trainer.logging.log import NullLog, RunLog


def a_record(name: str, cpu_s: float, wall_s: float) -> Record:
    return Record(Contender(name, "m"), [[Turn(0, 100, cpu_s, wall_s, 10.0, 1.0)]])


def test_wall_is_also_told_over_those_asked_for() -> None:
    records = [a_record("base", 1.0, 1.0), a_record("ddp", 2.0, 2.0), a_record("pp", 2.0, 2.5)]
    lines = table(records, over=["ddp"]).splitlines()
    assert "wall / ddp" in lines[0]
    assert [float(line.split("]")[1].split()[2]) for line in lines[1:]] == [2.0, 1.0, 0.8]
    assert len({len(line) for line in lines}) == 1
    assert "wall /" not in table(records)


@pytest.mark.parametrize("load", [workload.Load(), workload.Load(2, 128, 16, 4)])
def test_a_contender_reads_the_load_that_it_was_given(load: workload.Load) -> None:
    parser = argparse.ArgumentParser()
    workload.Load.add_arguments(parser)
    assert workload.Load.read(parser.parse_args(load.words())) == load
    assert (load.of_step(1), load.of_step(2)) == ((4, 4) if load.micro_batches else (1, 2))


@pytest.mark.parametrize("tp, pp, share", [(1, 1, 32), (2, 1, 16), (1, 2, 16), (2, 2, 8)])
def test_ranks_with_the_same_tokens_share_the_count(
    monkeypatch: pytest.MonkeyPatch, tp: int, pp: int, share: int
) -> None:
    monkeypatch.setattr(Engine, "train_step", lambda self, batches: None)
    for log in (RunLog, NullLog):  # replaced once more by what is under test, and put back from here
        monkeypatch.setattr(log, "step", lambda self, number, metrics: None)
    told: list[tuple[int, float]] = []
    counter: Any = SimpleNamespace(step=lambda tokens, loss: told.append((tokens, loss)))
    loom._count_steps(counter)
    rank = SimpleNamespace(groups=SimpleNamespace(tp=Axis(tp), pp=Axis(pp)))
    batches = [
        SimpleNamespace(tokens_T=torch.zeros(16), branches=()),
        SimpleNamespace(tokens_T=torch.zeros(8), branches=((0, 0), (0, 8))),  # 8 tokens are useful to both documents
    ]
    Engine.train_step(rank, batches)  # pyright: ignore
    NullLog.step(None, 1, {"train/loss": 2.5})  # pyright: ignore
    assert told == [(share, 2.5)]


def test_micro_batches_of_all_processes_are_those_of_one(tmp_path: Path) -> None:
    np.save(tmp_path / "pretrain.npy", np.arange(12)[:, None])
    load = workload.Load(rows=1, micro_batches=4)

    def rows(rank: int, world: int) -> list[list[int]]:
        feed = plain.steps(tmp_path, load, rank, world)
        return [[int(batch) for batch in next(feed)] for _ in range(3)]

    assert rows(0, 1) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert [sorted(a + b) for a, b in zip(rows(0, 2), rows(1, 2), strict=True)] == rows(0, 1)


def test_the_plain_loop_accumulates_to_the_whole_batch(tmp_path: Path) -> None:
    workload.write(tmp_path, rows=12, samples=1, seq_len=16)
    losses = []
    for rows, micro_batches in ((4, 1), (1, 4)):
        load = workload.Load(1, 16, rows, micro_batches)
        told: list[tuple[int, float]] = []
        turns = SimpleNamespace(
            rank=0, schedule=Schedule(1, 2, 1), step=lambda tokens, loss, told=told: told.append((tokens, loss))
        )
        plain.train(plain.model(load), tmp_path, load, turns, 1)  # pyright: ignore
        assert [tokens for tokens, _ in told] == [64, 64, 64]
        losses.append([loss for _, loss in told])
    # fp32; the first update turns rounding noise of vanishing gradients into steps of the learning rate
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][2] < losses[0][0] - 0.05  # it learns


def test_who_takes_part() -> None:
    def names(layouts: bool = False, peers: bool = False, only: tuple[str, ...] = ()) -> list[str]:
        args = argparse.Namespace(layouts=layouts, peers=peers, only=only)
        return [c.name for c in pretrain.choose(args)]

    assert names() == ["plain, memory kept", "plain ddp", "loom 1", "loom zero1", "loom zero2", "loom zero3"]
    assert names(peers=True)[-1] == "hf trainer zero3"
    assert {"loom tp2", "loom tp2 sp", "loom pp2 1f1b", "loom pp2 zbv", "loom cp2 ring"} < set(names(layouts=True))
    assert names(layouts=True, only=("loom tp2",)) == ["loom tp2"]
    with pytest.raises(ValueError, match="--only knows: plain ddp, loom 1"):
        names(layouts=True, only=("loom zero3",))


def test_flops_of_a_token_by_hand() -> None:
    flops = growth.Flops.of_token(workload.Load(layers=2, seq_len=4))
    assert flops.layers == 6 * 2 * (256 * 512 + 256 * 256 + 3 * 256 * 704)
    assert flops.attention == 6 * 2 * 8 * (32 + 32) * (1 + 2 + 3 + 4) / 4
    assert flops.head == 6 * 4096 * 256 * 3 / 4


def test_growth_by_the_formula_is_one_and_more_is_marked() -> None:
    middle, other = growth.MIDDLE, growth.load(512, 2)
    per_flop = 1e-11
    costs = [
        {"even": growth.Flops.of_token(load).whole * per_flop, "dear": growth.Flops.of_token(load).whole * factor}
        for load, factor in ((middle, per_flop), (other, 1.3 * per_flop))
    ]
    rows = growth.growth_table([middle, other], costs).splitlines()[1:]
    assert [row.split()[5] for row in rows] == ["1.00", "1.00"]
    assert [row.split()[7] for row in rows] == ["1.00", "1.30!"]
    assert growth.growth_cell(0.86, 1e-3) == "0.86  1000us"
    assert growth.growth_cell(0.84, 1e-3) == "0.84! 1000us"
