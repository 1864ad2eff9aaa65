"""Rows of texts and pictures, packed against padded: ``python scripts/bench/pictures.py [--quick]``.

Texts alone, with one picture and with several, of very different lengths, from files of JPEGs on. Prints useful tokens
(padding is none) per CPU-second of a plain loop over transformers' LLaVA, which pads each batch to its longest sample,
at several batch sizes, and of Loom as a ratio to the best of them; and which share of Loom's steps waited for pictures.
All decode their pictures in every step. Results: ``runs/bench/pictures.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.bench import picture_load
from scripts.bench.harness import ROOT, Contender, Record, append_results, compete, median_ratio, table
from scripts.bench.turns import Schedule

SAMPLES, ROWS = 8, 2
"""A step of the padded loops, and packed rows of one of Loom's: about equally many tokens."""
BATCHES = (8, 4, 2)


def contenders(batches: Sequence[int], workers: int) -> list[Contender]:
    """The padded loops, and Loom as the last."""
    padded = "scripts.bench.peers.hf_llava"
    peers = [Contender(f"padded, {n} at once", padded, ("--batch", str(n), "--samples", str(SAMPLES))) for n in batches]
    words = ("--seq-len", str(picture_load.LONGEST), "--rows", str(ROWS), "--set", f"data.picture_workers={workers}")
    return [*peers, Contender("loom packed", "scripts.bench.loom_pictures", words)]


def best(records: Sequence[Record]) -> Record:
    """Who has most tokens per CPU-second."""
    return max(records, key=lambda record: median(record.tokens_per_cpu_s()))


def waited(metrics: Sequence[dict[str, float]], schedule: Schedule) -> float:
    """Share of the time of Loom's steps in which it waited for pictures.

    Left out are the warm-up and each turn's first step, for which there was time while others had their turn.
    """
    counted = [
        step
        for number, step in enumerate(metrics)
        if number >= schedule.warmup and (number - schedule.warmup) % schedule.steps
    ]
    seconds = sum(step["perf/step_time"] for step in counted)
    return sum(step["perf/data_wait"] * step["perf/step_time"] for step in counted) / seconds if seconds else 0.0


def main() -> None:
    """Write the data, let the contenders take turns, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short round, to see that everything runs")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3, help="steps of one turn; lengths differ, so take several")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES, help="samples that are padded together")
    parser.add_argument("--workers", type=int, default=2, help="Loom's threads that decode pictures")
    parser.add_argument("--json", type=Path, default=ROOT / "runs" / "bench" / "pictures.jsonl")
    args = parser.parse_args()
    schedule = Schedule(1, 1, 2) if args.quick else Schedule(2, args.rounds, args.steps)
    with tempfile.TemporaryDirectory(prefix="loom-bench-data-") as name:
        folder = Path(name)
        picture_load.write(folder, picture_load.mixed_samples(folder, max(100, 12 * schedule.total)))
        records = compete(contenders(args.batches, args.workers), folder, schedule)
        (log,) = folder.glob("loom-*/bench/metrics.jsonl")
        metrics = [step for line in log.read_text().splitlines() if "perf/data_wait" in (step := json.loads(line))]
    print(table(records))
    loom, peer = records[-1], best(records[:-1])
    ratio = median_ratio(loom.tokens_per_cpu_s(), peer.tokens_per_cpu_s())
    wall = median_ratio(loom.tokens_per_wall_s(), peer.tokens_per_wall_s())
    print(f"over '{peer.contender.name}': {ratio:.2f} times the useful tokens per CPU-second, {wall:.2f} per second")
    share = waited(metrics, schedule)
    print(f"loom's steps waited for pictures {share:.1%} of their time ({args.workers} threads decode)")
    append_results(args.json, "pictures", schedule, records)


if __name__ == "__main__":
    try:
        main()
    except RuntimeError as failure:
        sys.exit(str(failure))
