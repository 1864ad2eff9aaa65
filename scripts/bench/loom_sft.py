"""Loom on the fine-tuning workload: skewed lengths packed best-fit into rows of the longest length."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from parallel.groups import LauncherRanks
from scripts.bench import loom, workload
from scripts.bench.turns import Turns, parse_args


def main() -> None:
    """Train through Loom's own run; only completions are learnt."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further Hydra overrides")
    args, schedule = parse_args(parser)
    ranks, data = LauncherRanks.read(), Path(args.data)
    command = [
        *loom.overrides(data, str(data / f"loom-sft-{os.getppid()}"), schedule),
        "stage=sft",
        f"data.sources=[{{path: {data / 'sft.jsonl'}, channel: chat, format: prompt_completion}}]",
        f"data.seq_len={workload.SFT_LONGEST}",
        "data.micro_batch_rows=1",
        f"data.global_batch_rows={ranks.world}",
        "engine=zero0",
        *args.set,
    ]
    loom.train(command, Turns(args.address, schedule, ranks.rank))


if __name__ == "__main__":
    main()
