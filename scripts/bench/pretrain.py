"""Pretraining speed against the peers: ``python scripts/bench/pretrain.py [--quick] [--peers | --layouts]``.

Prints tokens per CPU-second as ratios to the plain loop, wall ratios and peak memory, and appends every turn to
``runs/bench/pretrain.jsonl``. ``--peers`` adds the HF Trainer alone and under DeepSpeed (requirements-dev.txt).
``--layouts`` compares layouts of two processes instead; every contender then makes its step of the same four
micro-batches, so that pipelines have something to fill.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.bench import workload
from scripts.bench.harness import ROOT, Contender, append_results, compete, table
from scripts.bench.turns import Schedule

PLAIN = Contender("plain", "scripts.bench.peers.plain_loop")
KEEPING = Contender("plain, memory kept", PLAIN.module, ("--keep-freed-memory",))
LOOM = "scripts.bench.loom_pretrain"
LOOM_1 = Contender("loom 1", LOOM, ("--zero", "0"))
LOOM_ZERO1 = Contender("loom zero1", LOOM, ("--zero", "1"), processes=2)
OURS = [
    LOOM_1,
    LOOM_ZERO1,
    Contender("loom zero2", LOOM, ("--zero", "2"), processes=2),
    Contender("loom zero3", LOOM, ("--zero", "3"), processes=2),
]
DDP = Contender("plain ddp", "scripts.bench.peers.plain_ddp", processes=2)
HF = "scripts.bench.peers.hf_trainer"
PEERS = [
    Contender("hf trainer 1", HF),
    *(Contender(f"hf trainer zero{stage}", HF, ("--zero", str(stage)), processes=2) for stage in (1, 2, 3)),
]

PIPELINE_LOAD = workload.Load(micro_batches=4)
PUBLISHED = """\
Others, as the task names them: tp=2 Megatron-core 0.59 (with sequence parallel 0.57), torchtitan 0.52; pp=2 torchtitan
1F1B 0.89, ZBV 0.87, Megatron-core 0.74; wall time over two-process DDP: torchtitan 1F1B 0.72, ZBV 0.79."""


def layout(name: str, *settings: str, zero: int = 0) -> Contender:
    """Loom on two processes with these settings of the parallel section. Optimizer states have nobody to be shared
    with, so ZeRO is off unless asked for."""
    words = [f"parallel.{setting}" for setting in settings]
    return Contender(f"loom {name}", LOOM, ("--zero", str(zero), "--set", *words), processes=2)


LAYOUTS = [
    layout("tp2", "tp=2"),
    layout("tp2 sp", "tp=2", "sequence_parallel=true"),
    *(
        layout(f"pp2 {schedule}", "pp=2", f"schedule={schedule}")
        for schedule in ("1f1b", "interleaved", "zero_bubble", "zbv")
    ),
    layout("cp2 ring", "cp=2", "context=ring", zero=1),
]


def loaded(contenders: Sequence[Contender], load: workload.Load) -> list[Contender]:
    """The contenders with this work to do."""
    return [replace(c, args=(*load.words(), *c.args)) for c in contenders]


def choose(args: argparse.Namespace) -> list[Contender]:
    """Who takes part beside the plain loop.

    Raises:
        ValueError: ``--only`` names somebody unknown.
    """
    known = [DDP, LOOM_1, LOOM_ZERO1, *LAYOUTS] if args.layouts else [KEEPING, DDP, *OURS, *PEERS]
    if not args.only:
        return known if args.layouts or args.peers else [KEEPING, DDP, *OURS]
    names = {c.name for c in known}
    if not names.issuperset(args.only):
        raise ValueError(f"--only knows: {', '.join(c.name for c in known)}")
    return [c for c in known if c.name in args.only]


def arguments() -> argparse.Namespace:
    """What the command line says, with the chosen contenders in ``chosen``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short round, to see that everything runs")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--peers", action="store_true", help="also the HF Trainer, alone and with ZeRO 1-3")
    which.add_argument("--layouts", action="store_true", help="tensor, pipeline and context parallel")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these contenders (the plain loop is always there)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="steps of one turn; default 2, and 1 for --layouts")
    parser.add_argument("--json", type=Path, default=ROOT / "runs" / "bench" / "pretrain.jsonl")
    args = parser.parse_args()
    try:
        args.chosen = choose(args)
    except ValueError as wrong:
        parser.error(str(wrong))
    return args


def main() -> None:
    """Write the data, let the contenders take turns, print the table."""
    args = arguments()
    contenders = [PLAIN, *args.chosen]
    load = PIPELINE_LOAD if args.layouts else workload.Load()
    # ZeRO-3 records which layer follows which in its first step, so the warm-up is three steps long.
    warmup, steps = (2, args.steps or 1) if args.layouts else (3, args.steps or 2)
    schedule = Schedule(warmup, 1, 1) if args.quick else Schedule(warmup, args.rounds, steps)
    with tempfile.TemporaryDirectory(prefix="loom-bench-data-") as folder:
        workload.write(Path(folder), rows=load.rows * load.of_step(2) * schedule.total, samples=1)
        if args.layouts:
            contenders = loaded(contenders, load)
        records = compete(contenders, Path(folder), schedule)
    over = [c.name for c in (DDP, LOOM_ZERO1) if args.layouts and c in args.chosen]
    print(table(records, over))
    if args.layouts:
        print(PUBLISHED)
    append_results(args.json, "pretrain, layouts" if args.layouts else "pretrain", schedule, records)


if __name__ == "__main__":
    try:
        main()
    except RuntimeError as failure:
        sys.exit(str(failure))
