"""One process of ``wire_bytes``: trains with Loom and counts the collectives of the step after the warm-up."""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from parallel.engine import Engine
from parallel.groups import LauncherRanks
from scripts.bench import loom, loom_pretrain
from scripts.bench.turns import Schedule, parse_args

# Which argument of a c10d operator holds the whole tensor, and how often the ZeRO paper lets it cross the wire.
OPERATORS = {
    "allreduce_": (0, 2),
    "allreduce_coalesced_": (0, 2),
    "reduce_": (0, 1),
    "broadcast_": (0, 1),
    "allgather_": (0, 1),
    "_allgather_base_": (0, 1),
    "allgather_into_tensor_coalesced_": (0, 1),
    "reduce_scatter_": (1, 1),
    "_reduce_scatter_base_": (1, 1),
    "reduce_scatter_tensor_coalesced_": (1, 1),
}


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
        if kind not in OPERATORS:
            raise ValueError(f"c10d::{kind} is not counted yet; add it to OPERATORS")
        argument, crossings = OPERATORS[kind]
        size = tensor_bytes(args[argument])
        row = self.kinds[kind]
        row[0], row[1], row[2] = row[0] + 1, row[1] + size, row[2] + crossings * size


def tensor_bytes(value: Any) -> int:
    """Bytes of all tensors in a tensor or nested lists of them."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(tensor_bytes(item) for item in value)


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

    def built(self: Engine, model: torch.nn.Module, *rest: Any, **named: Any) -> None:
        nonlocal parameter_bytes
        parameter_bytes = sum(tensor_bytes(parameter) for parameter in model.parameters())
        build(self, model, *rest, **named)

    Engine.__init__ = built
    loom.train(loom_pretrain.command(args, schedule, ranks.world), one)
    if ranks.rank == 0:
        found = {"parameter_bytes": parameter_bytes, "kinds": one.counter.kinds, "loopback_bytes": one.loopback_bytes}
        args.out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
