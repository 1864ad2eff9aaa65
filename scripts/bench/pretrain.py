"""Pretraining speed against the peers: ``python scripts/bench/pretrain.py [--quick] [--peers]``.

Prints tokens per CPU-second as ratios to the plain loop, wall ratios and peak memory, and appends every turn to
``runs/bench/pretrain.jsonl``. ``--peers`` adds the HF Trainer alone and under DeepSpeed (requirements-bench.txt).
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

PLAIN = Contender("plain", "scripts.bench.peers.plain_loop")
KEEPING = Contender("plain, memory kept", PLAIN.module, ("--keep-freed-memory",))
LOOM = "scripts.bench.loom_pretrain"
OURS = [
    Contender("loom 1", LOOM, ("--zero", "0")),
    Contender("loom zero1", LOOM, ("--zero", "1"), processes=2),
    Contender("loom zero2", LOOM, ("--zero", "2"), processes=2),
    Contender("loom zero3", LOOM, ("--zero", "3"), processes=2),
]
DDP = Contender("plain ddp", "scripts.bench.peers.plain_ddp", processes=2)
HF = "scripts.bench.peers.hf_trainer"
PEERS = [
    Contender("hf trainer 1", HF),
    *(Contender(f"hf trainer zero{stage}", HF, ("--zero", str(stage)), processes=2) for stage in (1, 2, 3)),
]


def main() -> None:
    """Write the data, let the contenders take turns, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short round, to see that everything runs")
    parser.add_argument("--peers", action="store_true", help="also the HF Trainer, alone and with ZeRO 1-3")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these contenders (the plain loop is always there)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="steps of one turn")
    parser.add_argument("--json", type=Path, default=ROOT / "runs" / "bench" / "pretrain.jsonl")
    args = parser.parse_args()
    known = [KEEPING, DDP, *OURS, *PEERS]
    chosen = (
        [c for c in known if c.name in args.only]
        if args.only
        else [KEEPING, DDP, *OURS, *(PEERS if args.peers else [])]
    )
    if args.only and len(chosen) < len(args.only):
        parser.error(f"--only knows: {', '.join(c.name for c in known)}")
    # ZeRO-3 records which layer follows which in its first step, so the warm-up is three steps long.
    schedule = Schedule(3, 1, 1) if args.quick else Schedule(3, args.rounds, args.steps)
    with tempfile.TemporaryDirectory(prefix="loom-bench-data-") as folder:
        workload.write(Path(folder), rows=2 * workload.MICRO_BATCH * schedule.total, samples=1)
        records = compete([PLAIN, *chosen], Path(folder), schedule)
    print(table(records))
    append_results(args.json, "pretrain", schedule, records)


if __name__ == "__main__":
    try:
        main()
    except RuntimeError as failure:
        sys.exit(str(failure))
