"""Runs Loom's own training command as a contender: ``train.py``'s path, with a count after every step."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from parallel.engine import Engine, StepResult
from scripts.bench import workload
from scripts.bench.harness import ROOT
from scripts.bench.turns import Schedule
from trainer.logging.log import NullLog, RunLog


class Counter(Protocol):
    """Hears of every finished step: ``scripts.bench.turns.Turns``, or a count of something else."""

    def step(self, tokens: int, loss: float) -> None:
        """One optimizer step on ``tokens`` tokens of this process has been logged."""
        ...


def overrides(data: Path, run_dir: str, schedule: Schedule, learning_rate: float = workload.LEARNING_RATE) -> list[str]:
    """What every Loom contender sets: the benchmark's model, optimizer and a run folder that is thrown away.

    The optimizer's numbers are the peers'; logging stays on as a user has it, wandb alone is off, as it is for them.
    """
    return [
        "model=bench_256",
        f"data.tokenizer={data / 'tokenizer'}",
        f"data.cache_dir={data / 'cache'}",
        f"optim.lr={learning_rate}",
        f"optim.betas=[{workload.BETAS[0]},{workload.BETAS[1]}]",
        f"optim.weight_decay={workload.WEIGHT_DECAY}",
        f"optim.clip={workload.CLIP}",
        "optim.schedule=constant",
        "log.wandb=disabled",
        f"run.dir={run_dir}",
        "run.name=bench",
        "run.threads=1",
        f"run.steps={schedule.total}",
    ]


def train(command: Sequence[str], turns: Counter) -> None:
    """Run ``train.py`` in this process, reporting to ``turns`` after each step has been logged.

    Args:
        command: Hydra overrides, as on ``train.py``'s command line.
        turns: hears of every step.
    """
    _count_steps(turns)
    sys.argv = [str(ROOT / "train.py"), *command]
    runpy.run_path(sys.argv[0], run_name="__main__")


def _count_steps(turns: Counter) -> None:
    """Hang the counter on two public seams: the engine knows this rank's tokens, the log's line ends the step."""
    tokens = 0
    train_step = Engine.train_step

    def counted(self: Engine, micro_batches: Sequence[Any], *args: Any, **kwargs: Any) -> StepResult:
        nonlocal tokens
        shared_by = self.groups.tp.size * self.groups.pp.size  # they have the same tokens, each counts its share
        # What answers have in common is computed once and useful to each of them.
        useful = (batch.tokens_T.numel() + sum(kept for _, kept in batch.branches) for batch in micro_batches)
        tokens = sum(useful) // shared_by
        return train_step(self, micro_batches, *args, **kwargs)

    Engine.train_step = counted
    for log in (RunLog, NullLog):
        log.step = _then_tell(log.step, lambda metrics: turns.step(tokens, metrics["train/loss"]))


def _then_tell(step: Callable[..., None], tell: Callable[[Mapping[str, float]], None]) -> Callable[..., None]:
    def logged(self: Any, number: int, metrics: Mapping[str, float]) -> None:
        step(self, number, metrics)
        tell(metrics)

    return logged
