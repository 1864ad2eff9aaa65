"""The step loop with stand-ins for engine, data and log: what happens at which step, by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from data.batch import Document, MicroBatch, collate
from data.config import DataConfig, SourceConfig
from models.routing import RouterBook
from parallel.config import EngineConfig, ParallelConfig
from parallel.engine import StepResult
from parallel.groups import Groups
from parallel.loss_scale import LossScale
from parallel.sharding import Axis
from tests import cases
from trainer.config import RunConfig, RunSection
from trainer.logging.config import LogConfig
from trainer.loop import Progress, Trainer, on_device
from trainer.optim import OptimConfig
from trainer.stages import NextTokenConfig
from trainer.stages.next_token import NextToken


class OneOfTwo(Groups):
    """Rank 1 of two whose peer brings nothing of its own but doubles every sum."""

    def sum(self, values: list[float]) -> list[float]:
        """As if the other rank had the same numbers."""
        return [2 * value for value in values]

    def all_gather(self, value: Any) -> list[Any]:
        """Both ranks' values: the same."""
        return [value, value]


class Data:
    """Rows are numbers: the row at position p is p; its document has p + 2 tokens, all but the first learnt."""

    channels = ("a", "b")
    look = None

    def __init__(self, held_out: int):
        self.held_out, self.asked = held_out, []

    def global_batch(self, position: int, rows: int) -> list[int]:
        """The rows of one step."""
        self.asked.append((position, rows))
        return list(range(position, position + rows))

    def micro_batches(self, rows: list[int], rank: int, world: int, micro_batch_rows: int) -> list[MicroBatch]:
        """This rank's."""
        mine = rows[rank::world]
        parts = [mine[i : i + micro_batch_rows] for i in range(0, len(mine), micro_batch_rows)]
        return [collate([document(row) for row in part]) for part in parts]

    def eval_batches(self, rank: int, world: int, micro_batch_rows: int) -> list[MicroBatch]:
        """As many as were held out."""
        assert (rank, world, micro_batch_rows) == (1, 2, 2)
        return [collate([document(3)])] * self.held_out


def document(row: int) -> Document:
    return Document(np.full(row + 2, row), np.ones(row + 2, dtype=bool), row % 2)


class Engine:
    """Writes down what it is asked to do."""

    def __init__(self) -> None:
        self.steps: list[tuple[list[int], float, float]] = []
        self.evaluations: list[int] = []
        self.loss_scale = LossScale(dynamic=False)

    def train_step(self, batches: list[MicroBatch], forward: Any, count: float, lr: float) -> StepResult:
        """One step."""
        self.steps.append(([int(batch.tokens_T.numel()) for batch in batches], count, lr))
        terms = torch.tensor([[3.0, 2.0], [0.0, 0.0]], dtype=torch.float64)
        return StepResult([terms], grad_norm=7.0, skipped=True, loss_scale=512.0)

    def evaluate(self, batches: list[MicroBatch], forward: Any) -> list[torch.Tensor]:
        """One evaluation."""
        self.evaluations.append(len(self.steps))
        return [torch.tensor([[1.0, 2.0], [4.0, 2.0]], dtype=torch.float64)] * len(batches)


class Log:
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int]] = []
        self.metrics: dict[tuple[str, int], dict[str, float]] = {}

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """A logged step."""
        self.told.append(("step", step))
        self.metrics["step", step] = metrics

    def advance(self, step: int) -> None:
        """A step that is not logged."""
        self.told.append(("advance", step))

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """An evaluation."""
        self.told.append(("eval", step))
        self.metrics["eval", step] = metrics


@dataclasses.dataclass
class World:
    """A trainer and its stand-ins."""

    trainer: Trainer
    engine: Engine
    data: Data
    log: Log
    saved: list[tuple[int, int]]


def world(total: int, held_out: int = 0, precision: Any = "fp32", every: int = 1, **run: Any) -> World:
    data_cfg = DataConfig(sources=(SourceConfig("x"),), seq_len=64, micro_batch_rows=2, global_batch_rows=8)
    cfg = RunConfig(
        model=cases.TINY,
        stage=NextTokenConfig(),
        data=data_cfg,
        parallel=ParallelConfig(),
        engine=EngineConfig(precision=precision),
        optim=OptimConfig(lr=1.0, schedule="linear", warmup_steps=2, min_lr_ratio=0.0),
        log=LogConfig(every=every),
        run=RunSection(steps=total, **run),
    )
    engine, data, log, saved = Engine(), Data(held_out), Log(), []
    groups = OneOfTwo(rank=1, world=2, device=torch.device("cpu"), dp=Axis(2, 1))
    parts: dict[str, Any] = {"engine": engine, "data": data, "log": log}
    trainer = Trainer(
        cfg=cfg,
        groups=groups,
        stage=NextToken(2),
        routers=RouterBook([], 2),
        flops=lambda batch: 1e9 * batch.tokens_T.numel(),
        save=lambda progress: saved.append((progress.step, progress.position)),
        total_steps=total,
        **parts,
    )
    return World(trainer, engine, data, log, saved)


def test_every_step_has_its_own_rows_rate_and_count() -> None:
    """Rows 0-7, 8-15, ...; rank 1 of two has the odd ones, two a micro-batch; each row p has p + 1 targets."""
    w = world(4)
    progress = Progress()
    w.trainer.run(progress)
    assert w.data.asked == [(0, 8), (8, 8), (16, 8), (24, 8)]
    tokens, counts, rates = zip(*w.engine.steps, strict=True)
    assert tokens[0] == [3 + 5, 7 + 9] and tokens[1] == [11 + 13, 15 + 17]
    # The denominator is that of both ranks: the stand-in's peer has as much again.
    assert counts == (2 * (2 + 4 + 6 + 8), 2 * (10 + 12 + 14 + 16), 2 * (18 + 20 + 22 + 24), 2 * (26 + 28 + 30 + 32))
    assert rates == (0.5, 1.0, 1.0, 0.0)
    assert progress == Progress(step=4, position=32)


def test_a_resumed_run_goes_on_where_it_stood() -> None:
    """Position is its own number: a run whose batch size changed does not stand at step x batch."""
    w = world(4)
    w.trainer.run(Progress(step=2, position=100))
    assert w.data.asked == [(100, 8), (108, 8)]
    assert [rate for _, _, rate in w.engine.steps] == [1.0, 0.0]
    assert w.saved == [(4, 116)] and w.log.told == [("step", 3), ("step", 4)]


@pytest.mark.parametrize(
    ("save_every", "expected"),
    [(0, [5]), (1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (5, [5]), (9, [5])],
)
def test_saves_at_its_interval_and_once_at_the_end(save_every: int, expected: list[int]) -> None:
    w = world(5, save_every=save_every)
    w.trainer.run(Progress())
    assert w.saved == [(step, 8 * step) for step in expected]


@pytest.mark.parametrize(("eval_every", "expected"), [(0, [0, 5]), (2, [0, 2, 4, 5]), (5, [0, 5])])
def test_evaluates_before_the_first_step_at_its_interval_and_at_the_end(eval_every: int, expected: list[int]) -> None:
    w = world(5, held_out=2, eval_every=eval_every)
    w.trainer.run(Progress())
    assert w.engine.evaluations == expected
    assert [step for kind, step in w.log.told if kind == "eval"] == expected
    # Two batches on each of two ranks, each (1 + 4) over 4 tokens.
    assert w.log.metrics["eval", 5]["eval/loss"] == 1.25 and w.log.metrics["eval", 5]["eval/tokens"] == 16
    assert w.log.metrics["eval", 5]["eval/b/loss"] == 2.0


def test_a_resumed_run_does_not_evaluate_before_it_trains() -> None:
    w = world(5, held_out=1)
    w.trainer.run(Progress(step=3, position=24))
    assert w.engine.evaluations == [2]


def test_nothing_held_out_is_never_evaluated() -> None:
    w = world(3, eval_every=1)
    w.trainer.run(Progress())
    assert w.engine.evaluations == []


def test_an_evaluation_comes_before_the_save_of_its_step() -> None:
    """A run killed while saving has told its numbers."""
    w = world(2, held_out=1)
    order: list[str] = []
    evaluate = w.engine.evaluate

    def noted(batches: list[MicroBatch], forward: Any) -> list[torch.Tensor]:
        order.append("eval")
        return evaluate(batches, forward)

    w.engine.evaluate = noted
    trainer = dataclasses.replace(w.trainer, save=lambda progress: order.append("save"))
    trainer.run(Progress())
    assert order == ["eval", "eval", "save"]


def test_logs_at_its_interval_and_always_the_last_step() -> None:
    w = world(5, every=2)
    w.trainer.run(Progress())
    assert w.log.told == [("advance", 1), ("step", 2), ("advance", 3), ("step", 4), ("step", 5)]


def test_what_a_logged_step_says() -> None:
    w = world(3)
    w.trainer.run(Progress())
    row = w.log.metrics["step", 1]
    assert (row["train/loss"], row["train/tokens"], row["train/grad_norm"], row["train/lr"]) == (1.5, 4.0, 7.0, 0.5)
    assert row["channel/a/loss"] == 1.5 and "channel/b/loss" not in row
    assert row["perf/tokens_per_s"] > 0 and row["perf/step_time"] > 0
    assert not [key for key in row if key in ("train/loss_scale", "train/skipped")]


def test_fp16_tells_its_scale_and_skipped_steps() -> None:
    w = world(1, precision="fp16")
    w.trainer.run(Progress())
    row = w.log.metrics["step", 1]
    assert (row["train/loss_scale"], row["train/skipped"]) == (512.0, 1.0)


def test_on_a_device_the_borders_stay_on_the_host() -> None:
    """The meta device stands for a GPU."""
    batch = collate([document(3), document(4)])
    assert on_device(batch, torch.device("cpu")) is batch
    moved = on_device(batch, torch.device("meta"))
    assert moved.cu_seqlens is batch.cu_seqlens and moved.max_seqlen == batch.max_seqlen
    there = {f.name for f in dataclasses.fields(moved) if getattr(getattr(moved, f.name), "is_meta", False)}
    assert there == {"tokens_T", "positions_T", "targets_T", "doc_channel_N", "targets_N"}
