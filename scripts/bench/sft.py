"""Fine-tuning speed on skewed lengths: ``python scripts/bench/sft.py [--quick]``.

Lengths are log-normal with median 120, the longest 2,048. Prints useful (unpadded) tokens per CPU-second of TRL's
SFTTrainer with padding (the first line, ratio 1) and with packing, and of Loom. Results: ``runs/bench/sft.jsonl``.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.bench import workload
from scripts.bench.harness import ROOT, Contender, append_results, compete, table
from scripts.bench.turns import Schedule

TRL = "scripts.bench.peers.trl_sft"
CONTENDERS = [
    Contender("trl padded", TRL),
    Contender("trl packed", TRL, ("--packing",)),
    Contender("loom packed", "scripts.bench.loom_sft"),
]


def main() -> None:
    """Write the data, let the contenders take turns, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short round, to see that everything runs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="steps of one turn; lengths differ, so take several")
    parser.add_argument("--json", type=Path, default=ROOT / "runs" / "bench" / "sft.jsonl")
    args = parser.parse_args()
    schedule = Schedule(1, 1, 1) if args.quick else Schedule(2, args.rounds, args.steps)
    with tempfile.TemporaryDirectory(prefix="loom-bench-data-") as folder:
        # A packed row of 2,048 tokens holds about 11 samples; enough that nobody starts a second epoch.
        workload.write(Path(folder), rows=1, samples=max(100, 16 * schedule.total))
        records = compete(CONTENDERS, Path(folder), schedule)
    print(table(records))
    append_results(args.json, "sft", schedule, records)


if __name__ == "__main__":
    try:
        main()
    except RuntimeError as failure:
        sys.exit(str(failure))
