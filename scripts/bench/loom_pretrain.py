"""Loom on the pretraining workload: two rows a process and step, as the plain loop has them."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from parallel.groups import LauncherRanks
from scripts.bench import loom, workload
from scripts.bench.turns import Turns, parse_args


def main() -> None:
    """Train through Loom's own run."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--zero", type=int, default=1)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further Hydra overrides")
    args, schedule = parse_args(parser)
    ranks, data = LauncherRanks.read(), Path(args.data)
    # One folder for all ranks, apart from other contenders': the launcher is the same parent process for all of them.
    run_dir = data / f"loom-zero{args.zero}-{os.getppid()}"
    command = [
        *loom.overrides(data, str(run_dir), schedule),
        "stage=pretrain",
        f"data.sources=[{{path: {data / 'pretrain.jsonl'}, channel: text}}]",
        f"data.seq_len={workload.SEQ_LEN}",
        f"data.micro_batch_rows={workload.MICRO_BATCH}",
        f"data.global_batch_rows={workload.MICRO_BATCH * ranks.world}",
        f"engine=zero{args.zero}",
        *args.set,
    ]
    loom.train(command, Turns(args.address, schedule, ranks.rank))


if __name__ == "__main__":
    main()
