"""A GRPO step beside TRL's GRPOTrainer: ``python scripts/bench/grpo.py [--quick]``; 3 minutes.

Four prompts of 64 tokens, eight answers of 128 to each, a reward that costs nothing, no reference, one update. TRL
writes with ``transformers.generate``, Loom with its own generator. Tokens are those of all prompts with their answers;
the ratio is to TRL. The plain pretraining loop of ``pretrain.py`` stands beside them, which writes nothing. Every turn
is appended to ``runs/bench/grpo.jsonl``.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.bench import rl_work, workload
from scripts.bench.dpo import PLAIN
from scripts.bench.harness import ROOT, Contender, append_results, compete, table
from scripts.bench.turns import Schedule

CONTENDERS = [
    Contender("trl", "scripts.bench.peers.trl_grpo"),
    Contender("loom", "scripts.bench.loom_grpo"),
    PLAIN,
]


def main() -> None:
    """Write the data, let the contenders take turns, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short round, to see that everything runs")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=1, help="of one turn")
    parser.add_argument("--json", type=Path, default=ROOT / "runs" / "bench" / "grpo.jsonl")
    args = parser.parse_args()
    schedule = Schedule(1, 1, 1) if args.quick else Schedule(1, args.rounds, args.steps)
    with tempfile.TemporaryDirectory(prefix="loom-bench-data-") as folder:
        workload.write(Path(folder), rows=workload.MICRO_BATCH * schedule.total, samples=1)
        rl_work.write(Path(folder), max(rl_work.PROMPTS * schedule.total, 40))
        records = compete(CONTENDERS, Path(folder), schedule)
    print(table(records))
    append_results(args.json, "grpo", schedule, records)


if __name__ == "__main__":
    try:
        main()
    except RuntimeError as failure:
        sys.exit(str(failure))
