"""One process of ``wire_bytes``: trains with Loom and counts the collectives of the step after the warm-up."""

from __future__ import annotations

import argparse
import functools
import inspect
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from data.batch import MicroBatch
from parallel.config import ParallelConfig
from parallel.engine import Engine
from parallel.group_names import name_of_axis
from parallel.groups import Groups, LauncherRanks
from parallel.traffic import Traffic, operator_of, tensor_bytes
from parallel.traffic_formula import Term, expected
from scripts.bench import loom, loom_pretrain
from scripts.bench.turns import Schedule, parse_args
from scripts.bench.wire_sizes import micro_of, part_of, step_of

ZERO_PAPER = {"all_reduce": 2}
"""How often the ZeRO paper lets a tensor cross the wire; once where nothing is said."""


class CountCollectives(TorchDispatchMode):
    """Adds up the collectives called while it is entered.

    Raises:
        ValueError: an operator moves data that this bench does not know how to count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kinds: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
        """kind -> [calls, bytes of the whole tensors, bytes moved in the ZeRO paper's units]"""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Count, then go on."""
        if func.namespace == "c10d":
            self._count(func.name().split("::")[1].split(".")[0], args)
        return func(*args, **(kwargs or {}))

    def _count(self, kind: str, args: tuple) -> None:
        if kind == "barrier":
            self.kinds[kind][0] += 1
            return
        operator = operator_of(kind)
        size, crossings = tensor_bytes(args[operator.argument]), ZERO_PAPER.get(operator.kind, 1)
        row = self.kinds[kind]
        row[0], row[1], row[2] = row[0] + 1, row[1] + size, row[2] + crossings * size


@dataclass
class Compared:
    """What one step of the engine sent, and what the formula of its layout wants."""

    layout: ParallelConfig | None = None
    lines: list[str] = field(default_factory=list)

    def step(self, engine: Engine, micro_batches: Sequence[MicroBatch], train_step: Callable[[], Any]) -> Any:
        """Run the step, and keep a table of it."""
        assert self.layout is not None, "the engine is made before it steps"
        with Traffic(engine.groups) as traffic:
            result = train_step()
        part = part_of(engine.chunks[0].cfg, self.layout, engine, engine.groups)
        micros = [micro_of(batch, self.layout, engine.groups) for batch in micro_batches]
        terms = expected(part, micros, step_of(self.layout, engine.cfg, engine.groups))
        self.lines = [traffic.table(), "", "formula", *(_line(term, engine.groups) for term in terms)]
        wanted: dict[tuple[str, str], float] = defaultdict(float)
        for term in terms:
            wanted[term.kind, name_of_axis(engine.groups, term.axis)] += term.bytes
        sent = {key: row.bytes for key, row in traffic.rows.items() if key[0] not in ("recv", "barrier")}
        for kind, group in sorted(sent.keys() | wanted.keys()):
            counted, formula = sent.get((kind, group), 0), wanted.get((kind, group), 0.0)
            verdict = "equal" if round(formula) == counted else f"formula {formula:,.0f}, {counted / formula - 1:+.4%}"
            self.lines.append(f"counted {kind} of {group}: {counted:,} bytes, {verdict}")
        return result


def _line(term: Term, groups: Groups) -> str:
    group = name_of_axis(groups, term.axis)
    return f"{term.kind:<16}{group:<24}{term.bytes:>16,.0f} bytes  {term.why}"


def loopback_sent() -> int:
    """Bytes that have left through the loopback device; in a network namespace of its own, those of this job."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == "lo":
            return int(counters.split()[8])
    return 0


class OneStep:
    """Stands where the harness's turns stand: opens the count when the warm-up is over, and closes it a step later."""

    def __init__(self, warmup: int):
        self.warmup, self.done, self.counter = warmup, 0, CountCollectives()
        self.loopback_bytes = 0

    def step(self, tokens: int, loss: float) -> None:
        """One optimizer step has just been logged."""
        self.done += 1
        if self.done == self.warmup:
            self.loopback_bytes = -loopback_sent()
            self.counter.__enter__()
        elif self.done == self.warmup + 1:
            self.counter.__exit__(None, None, None)
            self.loopback_bytes += loopback_sent()


def main() -> None:
    """Train for warm-up and one step more; rank 0 writes the counts."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    loom_pretrain.add_arguments(parser)
    args, schedule = parse_args(parser)
    assert schedule == Schedule(schedule.warmup, 1, 1)
    ranks, one = LauncherRanks.read(), OneStep(schedule.warmup)
    parameter_bytes = 0
    build = Engine.__init__

    compared, train_step = Compared(), Engine.train_step

    def built(self: Engine, chunks: Sequence[torch.nn.Module], *rest: Any, **named: Any) -> None:
        nonlocal parameter_bytes
        parameter_bytes = sum(tensor_bytes(parameter) for chunk in chunks for parameter in chunk.parameters())
        given = inspect.signature(build).bind(self, chunks, *rest, **named)
        given.apply_defaults()
        compared.layout = given.arguments["layout"]
        build(self, chunks, *rest, **named)

    def stepped(self: Engine, micro_batches: Sequence[Any], *rest: Any, **named: Any) -> Any:
        run = functools.partial(train_step, self, micro_batches, *rest, **named)
        return compared.step(self, micro_batches, run) if one.done == one.warmup else run()

    Engine.__init__, Engine.train_step = built, stepped
    loom.train(loom_pretrain.command(args, schedule, ranks.world), one)
    if ranks.rank == 0:
        found = {"parameter_bytes": parameter_bytes, "kinds": one.counter.kinds, "loopback_bytes": one.loopback_bytes}
        args.out.write_text(json.dumps(found | {"lines": compared.lines}))


if __name__ == "__main__":
    main()
