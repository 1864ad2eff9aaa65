"""Loom's GRPO on the prompts, with answers of its own generator."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from parallel.groups import LauncherRanks
from scripts.bench import loom, rl_work
from scripts.bench.turns import Turns, parse_args


def main() -> None:
    """Train through Loom's own run: no reference, one update a rollout."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further Hydra overrides")
    args, schedule = parse_args(parser)
    ranks, data = LauncherRanks.read(), Path(args.data)
    run_dir = str(data / f"loom-grpo-{os.getppid()}-{os.getpid()}")
    command = [
        *loom.overrides(data, run_dir, schedule, rl_work.LEARNING_RATE),
        "stage=grpo",
        f"data.sources=[{{path: {rl_work.prompts_file(data)}, channel: prompts}}]",
        f"data.seq_len={rl_work.ROWS * (rl_work.PROMPT_TOKENS + rl_work.NEW_TOKENS)}",
        "data.micro_batch_rows=1",
        f"rollout.prompts_per_step={rl_work.PROMPTS}",
        f"rollout.samples={rl_work.GROUP}",
        f"rollout.max_prompt_tokens={rl_work.PROMPT_TOKENS}",
        f"rollout.max_new_tokens={rl_work.NEW_TOKENS}",
        f"rollout.rewards=[{{function: {Path(rl_work.__file__)}:even_words}}]",
        "engine=zero0",
        *args.set,
    ]
    loom.train(command, Turns(args.address, schedule, ranks.rank))


if __name__ == "__main__":
    main()
