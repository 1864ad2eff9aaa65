"""Loom on rows of texts and pictures: its whole pipeline from the files on, packed."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from parallel.groups import LauncherRanks
from scripts.bench import loom
from scripts.bench.turns import Turns, parse_args


def main() -> None:
    """Train through Loom's own run; only completions are learnt."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seq-len", type=int, required=True)
    parser.add_argument("--rows", type=int, default=1, help="of a step")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further Hydra overrides")
    args, schedule = parse_args(parser)
    ranks, data = LauncherRanks.read(), Path(args.data)
    usual = loom.overrides(data, str(data / f"loom-{os.getppid()}"), schedule)
    command = [
        *(word for word in usual if not word.startswith(("model=", "data.tokenizer=", "optim.weight_decay="))),
        "optim.weight_decay=0.0",  # what is decayed differs; without it losses agree with the peer's
        "model=hf",
        f"init_from={data / 'start'}",
        f"data.tokenizer={data / 'start'}",
        "stage=sft",
        f"data.sources=[{{path: {data / 'rows.jsonl'}, channel: pictures, format: prompt_completion}}]",
        f"data.seq_len={args.seq_len}",
        f"data.micro_batch_rows={args.rows}",
        f"data.global_batch_rows={args.rows}",
        "engine=zero0",
        *args.set,
    ]
    loom.train(command, Turns(args.address, schedule, ranks.rank))


if __name__ == "__main__":
    main()
