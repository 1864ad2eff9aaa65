"""DPO beside TRL's DPOTrainer: ``python scripts/bench/dpo.py [--quick] [--only equal | skewed]``; 2 minutes each.

First pairs whose documents all have 512 tokens, so that nobody pads: ratios are to the plain pretraining loop of
``pretrain.py`` on as many tokens. Then pairs of skewed lengths (log-normal, median 120, longest 1,024): ratios are to
the better of TRL's two ways, four pairs padded together or one by one. The tokens of both answers count, prompts
included, padding and the reference's pass not. Every turn is appended to ``runs/bench/dpo.jsonl``.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.bench import preference_work, workload
from scripts.bench.harness import ROOT, Contender, Record, append_results, compete, table
from scripts.bench.turns import Schedule

PLAIN = Contender("plain", "scripts.bench.peers.plain_loop")
TRL, LOOM = "scripts.bench.peers.trl_preference", "scripts.bench.loom_preference"


def contender(name: str, module: str, stage: str, lengths: preference_work.Lengths, *more: str) -> Contender:
    """One way of learning from the pairs."""
    return Contender(name, module, ("--stage", stage, "--lengths", lengths, *more))


def equal(stage: str, *more: tuple[str, str, str]) -> list[Contender]:
    """The plain loop, and both on documents of one length. `more`: (name, module, option)."""
    both = [contender("trl", TRL, stage, "equal"), contender("loom", LOOM, stage, "equal")]
    return [PLAIN, *both, *(contender(name, module, stage, "equal", option) for name, module, option in more)]


def skewed(stage: str, *more: tuple[str, str, str, str]) -> list[Contender]:
    """TRL with all pairs of a step padded together and with one at a time, and Loom."""
    together = ("--rows", str(preference_work.STEP_PAIRS["skewed"]))
    return [
        contender("trl", TRL, stage, "skewed", *together),
        contender("trl, pair by pair", TRL, stage, "skewed"),
        contender("loom", LOOM, stage, "skewed"),
        *(contender(name, module, stage, "skewed", *words) for name, module, *words in more),
    ]


EQUAL = equal("dpo", ("trl, precomputed", TRL, "--precompute"), ("loom, precomputed", LOOM, "--precompute"))
SKEWED = skewed("dpo")


def measure(lengths: preference_work.Lengths, contenders: Sequence[Contender], args: argparse.Namespace) -> None:
    """One table, and its turns in the file."""
    schedule = Schedule(1, 1, 1) if args.quick else Schedule(2, args.rounds, args.steps)
    with tempfile.TemporaryDirectory(prefix="loom-bench-data-") as folder:
        workload.write(Path(folder), rows=workload.MICRO_BATCH * schedule.total, samples=1)
        # A packed row holds more pairs than a step of TRL where they are short, and nobody shall see one twice.
        pairs = 3 * preference_work.STEP_PAIRS[lengths] * schedule.total
        preference_work.write(Path(folder), lengths, max(pairs, 40))
        records = compete(contenders, Path(folder), schedule)
    print(f"\n{lengths} lengths\n{table(best_of_trl_first(records))}", flush=True)
    append_results(args.json, f"{args.json.stem}, {lengths} lengths", schedule, records)


def best_of_trl_first(records: Sequence[Record]) -> list[Record]:
    """So that ratios are to it, where there is no plain loop."""
    if records[0].contender == PLAIN:
        return list(records)
    ways = [record for record in records if record.contender.name in ("trl", "trl, pair by pair")]
    best = max(ways, key=lambda record: median(record.tokens_per_cpu_s()))
    return [best, *(record for record in records if record is not best)]


def arguments(what: str, name: str) -> argparse.Namespace:
    """The command line of this benchmark and of ``reward.py``."""
    parser = argparse.ArgumentParser(description=what, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short round, to see that everything runs")
    parser.add_argument("--only", choices=("equal", "skewed"))
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2, help="of one turn")
    parser.add_argument("--json", type=Path, default=ROOT / "runs" / "bench" / f"{name}.jsonl")
    return parser.parse_args()


def run(what: str | None, name: str, of_equal: Sequence[Contender], of_skewed: Sequence[Contender]) -> None:
    """The tables that were asked for."""
    args = arguments(what or "", name)
    try:
        if args.only != "skewed":
            measure("equal", of_equal, args)
        if args.only != "equal":
            measure("skewed", of_skewed, args)
    except RuntimeError as failure:
        sys.exit(str(failure))


if __name__ == "__main__":
    run(__doc__, "dpo", EQUAL, SKEWED)
