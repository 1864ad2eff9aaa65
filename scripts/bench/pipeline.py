"""Pipeline schedules side by side on the benchmark's model, with data parallel as the yardstick.

    torchrun --nproc_per_node 2 scripts/bench/pipeline.py [--micro-batches 4] [--rounds 9]

All take turns in the same processes, on the same micro-batches: forward and backward of one step, without the update.
Data parallel has the whole model on every process, its share of the micro-batches, and one all-reduce of the gradients.
Printed are medians: wall time, CPU time of all processes, both relative to data parallel; and the share of the step in
which ranks waited, beside the formula's (which knows neither unequal stages nor messages).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.batch import Document, MicroBatch, collate
from models import ModelConfig, Runtime, build
from models.balance import chunks_of
from models.decoder import Chunk
from models.init import InitSource
from parallel.config import ParallelConfig
from parallel.groups import Groups, LauncherRanks, build_groups, leave_groups
from parallel.materialise import materialise
from parallel.pipeline import Pipeline
from parallel.schedules import formula_idle_share
from parallel.sharding import SINGLE, WHOLE
from parallel.step_clock import StepTime, idle_share
from scripts.bench import workload
from trainer.stages.next_token import NextToken

MODEL = ModelConfig(
    family="llama",
    vocab_size=workload.VOCABULARY,
    hidden_size=workload.HIDDEN,
    intermediate_size=workload.FFN,
    num_layers=workload.LAYERS,
    num_heads=workload.HEADS,
    num_kv_heads=workload.KV_HEADS,
    head_dim=workload.HIDDEN // workload.HEADS,
    max_seq_len=workload.SFT_LONGEST,
)
STAGE = NextToken(1)
SCHEDULES: tuple[tuple[Any, int], ...] = (
    ("gpipe", 1),
    ("1f1b", 1),
    ("interleaved", 2),
    ("zero_bubble", 1),
    ("zero_bubble", 2),
    ("zbv", 2),
)


@dataclass
class Contender:
    """One way to compute a step's gradients, and what its rounds took."""

    name: str
    params: Sequence[nn.Parameter]
    step: Callable[[], StepTime | None]
    formula: float = 0.0
    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    idle: list[float] = field(default_factory=list)

    def run(self, groups: Groups) -> None:
        """One round; every rank's numbers come together outside of the time taken."""
        for param in self.params:
            param.grad = None
        groups.barrier()
        wall, cpu = time.perf_counter(), time.process_time()
        times = self.step()
        taken = time.perf_counter() - wall, time.process_time() - cpu
        everyone = groups.all_gather((*taken, times))
        self.wall_s.append(max(wall for wall, _, _ in everyone))
        self.cpu_s.append(sum(cpu for _, cpu, _ in everyone))
        if times is not None:
            self.idle.append(idle_share([times for _, _, times in everyone]))


def micro_batches(count: int) -> list[MicroBatch]:
    """The benchmark's rows, two to a micro-batch."""
    rows = workload.pretrain_rows(count * workload.MICRO_BATCH)
    learn = torch.ones(workload.SEQ_LEN, dtype=torch.bool).numpy()
    size = workload.MICRO_BATCH
    return [collate([Document(row, learn, 0) for row in rows[i * size : (i + 1) * size]]) for i in range(count)]


def _chunk(chunk: Chunk) -> nn.Module:
    model = build(MODEL, SINGLE, Runtime(), chunk)
    materialise(model, InitSource(MODEL, seed=0), WHOLE, torch.device("cpu"))
    return model


def data_parallel(batches: Sequence[MicroBatch], groups: Groups) -> Contender:
    """The whole model on every process."""
    model, mine = _chunk(Chunk.whole(MODEL)), batches[groups.rank :: groups.world]

    def step() -> None:
        for batch in mine:
            STAGE.forward(model, batch, 1.0)[0].backward()
        for param in model.parameters():
            dist.all_reduce(param.grad)

    return Contender("data parallel", list(model.parameters()), step)


def pipelined(schedule: Any, vpp: int, batches: Sequence[MicroBatch], groups: Groups) -> Contender:
    """The layers shared out over the processes."""
    layout = ParallelConfig(pp=groups.world, schedule=schedule, vpp=vpp)
    chunks = [_chunk(chunk) for chunk in chunks_of(MODEL, layout, groups.rank, workload.SEQ_LEN)]
    pipe = Pipeline(chunks, layout, groups.pp, groups.device, MODEL.hidden_size)

    def step() -> StepTime:
        pipe.train(batches, STAGE.forward, 1.0)
        return pipe.last_step()

    params = [param for chunk in chunks for param in chunk.parameters()]
    formula = formula_idle_share(schedule, groups.world, vpp, len(batches))
    return Contender(f"{schedule}, {vpp} a rank", params, step, formula)


def _report(contenders: Sequence[Contender], count: int, world: int) -> None:
    print(f"{count} micro-batches on {world} processes, medians of {len(contenders[0].wall_s)} rounds")
    print(f"{'':22}{'wall ms':>9}{'speed':>7}{'CPU ms':>9}{'CPU use':>9}{'idle':>7}{'formula':>9}")
    first = contenders[0]
    for each in contenders:
        wall, cpu = statistics.median(each.wall_s), statistics.median(each.cpu_s)
        # Rounds are paired: what slows the machine down for a while slows both.
        speed = statistics.median(a / b for a, b in zip(first.wall_s, each.wall_s, strict=True))
        use = statistics.median(b / a for a, b in zip(first.cpu_s, each.cpu_s, strict=True))
        idle = f"{statistics.median(each.idle):7.1%}{each.formula:9.1%}" if each.idle else ""
        print(f"{each.name:22}{wall * 1e3:9.0f}{speed:7.2f}{cpu * 1e3:9.0f}{use:9.2f}{idle}")


def main() -> None:
    """Measure and print, on the first rank."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--micro-batches", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    ranks = LauncherRanks.read()
    groups = build_groups(ranks, 600, ParallelConfig(pp=ranks.world))
    batches = micro_batches(args.micro_batches)
    contenders = [data_parallel(batches, groups)]
    contenders += [pipelined(schedule, vpp, batches, groups) for schedule, vpp in SCHEDULES]
    for number in range(args.rounds + 1):
        for each in contenders:
            each.run(groups)
            if number == 0:  # first steps make schedules and buffers
                for taken in (each.wall_s, each.cpu_s, each.idle):
                    taken.clear()
    if groups.is_main:
        _report(contenders, args.micro_batches, groups.world)
    leave_groups()


if __name__ == "__main__":
    main()
