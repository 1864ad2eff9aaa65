"""The step loop: batch, step, log, evaluate, save. It knows steps, not models."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from data.batch import MicroBatch, Row
from data.pictures.types import Pictures
from data.pipeline import TrainingData
from models.routing import RouterBook, RouterReport
from parallel.engine import Engine, StepResult
from parallel.groups import Groups
from parallel.step_clock import idle_share
from trainer import channels
from trainer.config import RunConfig
from trainer.context import local_part
from trainer.feed import Feed
from trainer.logging.log import Log
from trainer.logging.perf import PerfMeter
from trainer.stages import Stage


@dataclass
class Progress:
    """Where the run stands: finished optimizer steps, and rows of the sample order consumed so far."""

    step: int = 0
    position: int = 0


@dataclass(frozen=True)
class Trainer:
    """Everything a step needs.

    ``flops`` gives the model FLOPs of one micro-batch; ``save`` writes a checkpoint of the given progress. ``prepare``
    adds what a stage needs to know of micro-batches (a reference's log-probabilities), all of a step's together; it is
    given the rows of the step as well, None for those that are held out. The stage's forward takes what it gives.
    """

    cfg: RunConfig
    groups: Groups
    engine: Engine
    stage: Stage
    routers: RouterBook
    data: TrainingData
    log: Log
    flops: Callable[[MicroBatch], float]
    save: Callable[[Progress], None]
    total_steps: int
    prepare: Callable[[list[MicroBatch], Sequence[Row] | None], list[Any]] = lambda batches, rows: batches

    def run(self, progress: Progress) -> None:
        """Train from ``progress`` to the last step; evaluates and saves at the end whatever the intervals say."""
        every = self.cfg.run
        meter = PerfMeter(self.groups.device, self.cfg.engine.precision, self.groups.world)
        held_out = [on_device(batch, self.groups.device) for batch in self._eval_batches()]
        if held_out and progress.step == 0:
            with meter.paused():
                self._evaluate(held_out, 0)
        feed = Feed(self._batches_at, self.cfg.data.global_batch_rows, ahead=self.data.look is not None)
        while progress.step < self.total_steps:
            lr = self.cfg.optim.lr_at(progress.step, self.total_steps)
            result, loads, tokens, flops = self._step(progress, lr, feed)
            meter.add(tokens, flops, feed.waited())
            last = progress.step == self.total_steps
            self._report(progress.step, result, loads, lr, meter, last)
            with meter.paused():
                if held_out and (last or (every.eval_every and progress.step % every.eval_every == 0)):
                    self._evaluate(held_out, progress.step)
                if last or (every.save_every and progress.step % every.save_every == 0):
                    self.save(progress)

    def _batches_at(self, position: int) -> tuple[list[Row], list[MicroBatch]]:
        """The rows of the step that begins at a position, and this rank's micro-batches of them."""
        data, dp = self.cfg.data, self.groups.dp
        rows = self.data.global_batch(position, data.global_batch_rows)
        return rows, self.data.micro_batches(rows, dp.rank, dp.size, data.micro_batch_rows)

    def _step(
        self, progress: Progress, lr: float, feed: Feed[tuple[list[Row], list[MicroBatch]]]
    ) -> tuple[StepResult, RouterReport, int, float]:
        """One optimizer step on the next global batch. Returns its result, how this rank's routers chose, and tokens
        and FLOPs over all ranks."""
        rows, whole = feed.take(progress.position, more=progress.step + 1 < self.total_steps)
        batches = [self._part_here(batch) for batch in whole]
        tokens = float(sum(batch.tokens_T.numel() for batch in batches))
        flops = sum(self.flops(batch) for batch in whole) / self.groups.cp.size
        count, tokens, flops = self.groups.sum([self.stage.count(batches), tokens, flops])
        batches = self.prepare([on_device(batch, self.groups.device) for batch in batches], rows)
        self.routers.begin(self.groups.data.size * self.engine.loss_scale.value / tokens)
        result = self.engine.train_step(batches, self.stage.forward, count, lr)
        loads = self.routers.finish(self.groups.sum_tensor)
        progress.step += 1
        progress.position += self.cfg.data.global_batch_rows
        return result, loads, int(tokens), flops

    def _report(
        self, step: int, result: StepResult, loads: RouterReport, lr: float, meter: PerfMeter, last: bool
    ) -> None:
        if step % self.cfg.log.every and not last:
            self.log.advance(step)
            return
        metrics = self._metrics(result.metrics, "train")
        metrics |= {"train/grad_norm": result.grad_norm, "train/lr": lr}
        if self.cfg.engine.precision == "fp16":
            metrics |= {"train/loss_scale": result.loss_scale, "train/skipped": float(result.skipped)}
        if self.cfg.model.moe is not None:
            everywhere = RouterReport.joined(self.groups.gather_stages(loads))
            metrics |= everywhere.metrics(self.data.channels)
        if self.groups.pp.size > 1:
            times = self.groups.gather_stages(self.engine.pipeline.last_step())
            metrics |= {"perf/pipeline_idle": idle_share(times)}
        self.log.step(step, metrics | meter.read())

    def _eval_batches(self) -> list[MicroBatch]:
        dp = self.groups.dp
        whole = self.data.eval_batches(dp.rank, dp.size, self.cfg.data.micro_batch_rows)
        return [self._part_here(batch) for batch in whole]

    def _part_here(self, batch: MicroBatch) -> MicroBatch:
        return local_part(batch, self.groups.cp, self.cfg.parallel.context)

    def _evaluate(self, batches: list[MicroBatch], step: int) -> None:
        terms = self.engine.evaluate(self.prepare(batches, None), self.stage.forward)
        self.log.evaluation(step, self._metrics(terms, "eval"))

    def _metrics(self, terms: list[torch.Tensor], prefix: str) -> dict[str, float]:
        return channels.metrics(terms, self.data.channels, self.groups.all_gather, prefix, self.stage.columns)


def on_device(batch: MicroBatch, device: torch.device) -> MicroBatch:
    """The micro-batch with its token tensors on ``device``; document borders stay on the host, where they are read."""
    if device.type == "cpu":
        return batch
    moved: dict[str, Any] = {}
    for field in dataclasses.fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, torch.Tensor) and field.name != "cu_seqlens":
            moved[field.name] = value.to(device, non_blocking=True)
        elif isinstance(value, Mapping):
            moved[field.name] = {name: each.to(device, non_blocking=True) for name, each in value.items()}
        elif isinstance(value, Pictures):
            moved[field.name] = value.to(device)
    return dataclasses.replace(batch, **moved)
