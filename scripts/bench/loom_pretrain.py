"""Loom on the pretraining workload, in any layout."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from parallel.groups import LauncherRanks
from scripts.bench import loom, workload
from scripts.bench.turns import Schedule, Turns, parse_args


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this contender."""
    parser.add_argument("--zero", type=int, default=1)
    workload.Load.add_arguments(parser)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further Hydra overrides")


def command(args: argparse.Namespace, schedule: Schedule, world: int) -> list[str]:
    """The Hydra overrides of this contender on ``world`` processes."""
    data, load = Path(args.data), workload.Load.read(args)
    # One folder for all ranks of this launch and for nobody else: they have the launcher as their parent.
    run_dir = data / f"loom-zero{args.zero}-{os.getppid()}"
    return [
        *loom.overrides(data, str(run_dir), schedule),
        "stage=pretrain",
        f"data.sources=[{{path: {data / 'pretrain.jsonl'}, channel: text}}]",
        f"model.num_layers={load.layers}",
        f"data.seq_len={load.seq_len}",
        f"data.micro_batch_rows={load.rows}",
        f"data.global_batch_rows={load.rows * load.of_step(world)}",
        f"engine=zero{args.zero}",
        *args.set,
    ]


def main() -> None:
    """Train through Loom's own run."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    args, schedule = parse_args(parser)
    ranks = LauncherRanks.read()
    loom.train(command(args, schedule, ranks.world), Turns(args.address, schedule, ranks.rank))


if __name__ == "__main__":
    main()
