"""Loom on the pairs: both answers packed best-fit into rows that hold the longest pair."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from parallel.groups import LauncherRanks
from scripts.bench import loom, preference_work
from scripts.bench.turns import Turns, parse_args


def main() -> None:
    """Train through Loom's own run."""
    parser = argparse.ArgumentParser()
    preference_work.add_arguments(parser)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further Hydra overrides")
    args, schedule = parse_args(parser)
    ranks, data = LauncherRanks.read(), Path(args.data)
    run_dir = str(data / f"loom-{args.stage}-{os.getppid()}-{os.getpid()}")
    command = [
        *loom.overrides(data, run_dir, schedule, preference_work.LEARNING_RATE),
        f"stage={args.stage}",
        f"data.sources=[{{path: {preference_work.pairs_file(data, args.lengths)}, channel: pairs}}]",
        f"data.seq_len={preference_work.ROW[args.lengths]}",
        "data.micro_batch_rows=1",
        f"data.global_batch_rows={ranks.world}",
        "engine=zero0",
        *(["stage.precompute_reference=true"] if args.precompute else []),
        *args.set,
    ]
    loom.train(command, Turns(args.address, schedule, ranks.rank))


if __name__ == "__main__":
    main()
