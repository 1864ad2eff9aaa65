"""Speed of generation: ``python scripts/bench/generation.py [--rounds 1]``; a round takes 5 to 6 minutes.

Real SmolLM2-135M, fp32, on a CPU. First one text for each of 64 prompts of 16 to 512 tokens (greedy, up to 128 new
tokens), then 8 samples (temperature 1) for each of 6 prompts, both beside `transformers.generate` with left padding at
several batch sizes. Its prompts are sorted by length, so that padding is least. Ratios are to its best batch size,
round by round; new tokens count. Then what a step costs while the cache of its rows grows, beside a floor. Every turn
is appended to ``runs/bench/generation.jsonl``.
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

from scripts.bench import generation_growth
from scripts.bench.generation_work import kept, make_work
from scripts.bench.harness import ROOT, Contender, Record, append_results, compete, median_ratio
from scripts.bench.turns import Schedule

MODEL, DATA = ROOT / "assets" / "smollm2-135m-instruct", ROOT / "assets" / "data"
HF, LOOM = "scripts.bench.peers.hf_generate", "scripts.bench.loom_generate"


def contender(kind: str, rows: int, args: argparse.Namespace) -> Contender:
    """`kind` is hf or loom."""
    name = f"{kind} {rows}"
    words = ("--name", name, "--model", str(args.model), "--rows", str(rows), "--threads", str(args.threads))
    return Contender(name, HF if kind == "hf" else LOOM, words)


def best(records: Sequence[Record]) -> Record:
    """The one with most tokens a second."""
    return max(records, key=lambda record: median(record.tokens_per_wall_s()))


def alike(folder: Path, name: str, base: str) -> str:
    """How many of the texts are the base's, token for token."""
    ours, theirs = kept(folder, name), kept(folder, base)
    return f"{sum(a == b for a, b in zip(ours, theirs, strict=True))}/{len(theirs)}"


def table(records: Sequence[Record], same: Sequence[str]) -> str:
    """A line for each contender; ratios are to the best of transformers."""
    base = best([record for record in records if record.contender.module == HF])
    lines = [
        f"{'contender':<12}{'tokens':>8}{'tokens/s':>10}{'ratio':>8}{'tokens/CPU-s':>14}{'ratio':>8}"
        f"{'peak MiB':>10}{'same texts':>12}"
    ]
    for record, texts in zip(records, same, strict=True):
        wall, cpu = record.tokens_per_wall_s(), record.tokens_per_cpu_s()
        tokens = sum(turn.tokens for turn in record.rounds[0])
        lines.append(
            f"{record.contender.name:<12}{tokens:>8}{median(wall):>10.0f}"
            f"{median_ratio(wall, base.tokens_per_wall_s()):>8.2f}{median(cpu):>14.0f}"
            f"{median_ratio(cpu, base.tokens_per_cpu_s()):>8.2f}{record.peak_mib():>10.0f}{texts:>12}"
        )
    return "\n".join(lines)


def measure(args: argparse.Namespace, samples: int, hf_rows: Sequence[int], rows: int) -> None:
    """One table: all prompts of one kind in turns."""
    count = args.prompts if samples == 1 else args.sampled_prompts
    schedule = Schedule(1, args.rounds, 1)
    contenders = [*(contender("hf", each, args) for each in hf_rows), contender("loom", rows, args)]
    work = make_work(args.model, args.data, count, samples, args.new_tokens, not args.endless)
    with tempfile.TemporaryDirectory(prefix="loom-bench-data-") as folder:
        work.write(Path(folder))
        records = compete(contenders, Path(folder), schedule)
        names = [record.contender.name for record in records]
        base = best([record for record in records if record.contender.module == HF]).contender.name
        same = ["" if samples > 1 else alike(Path(folder), name, base) for name in names]
    sizes = sorted(map(len, work.prompts))
    what = "greedy" if samples == 1 else f"{samples} samples a prompt"
    head = f"{count} prompts of {sizes[0]} to {sizes[-1]} tokens ({sum(sizes)} in all), {what}"
    head += f", up to {args.new_tokens} new tokens, {args.threads} threads"
    print(f"\n{head}\n{table(records, same)}", flush=True)
    append_results(args.json, f"generation, {what}", schedule, records)


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few prompts, few tokens, to see that everything runs")
    parser.add_argument("--only", choices=("greedy", "samples", "growth"), nargs="+", help="these parts")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--sampled-prompts", type=int, default=6, help="prompts that get samples")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rows", type=int, nargs=2, default=(64, 64), help="Loom's, for greedy and for samples")
    parser.add_argument("--hf-rows", type=int, nargs="+", default=(16, 32), help="batch sizes of transformers")
    parser.add_argument("--hf-sampled-rows", type=int, nargs="+", default=(24, 48))
    parser.add_argument("--endless", action="store_true", help="no text ends before its last token")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the prompts' texts")
    parser.add_argument("--json", type=Path, default=ROOT / "runs" / "bench" / "generation.jsonl")
    args = parser.parse_args()
    if args.quick:
        vars(args).update(rounds=1, prompts=4, sampled_prompts=2, new_tokens=8, hf_rows=(4,), hf_sampled_rows=(16,))
    return args


def main() -> None:
    """The parts that were asked for, one after another."""
    args = arguments()
    parts = args.only or ("greedy", "samples", "growth")
    if "greedy" in parts:
        measure(args, 1, args.hf_rows, args.rows[0])
    if "samples" in parts:
        measure(args, args.samples, args.hf_sampled_rows, args.rows[1])
    if "growth" in parts:
        points = generation_growth.measure(args.model, args.threads, quick=args.quick)
        picture = args.json.with_name("generation_growth.png")
        generation_growth.plot(points, picture)
        print(f"\n{generation_growth.table(points)}\npicture: {picture}")
        with args.json.open("a") as file:
            file.write(json.dumps({"bench": "generation, growth", "points": [vars(point) for point in points]}) + "\n")


if __name__ == "__main__":
    try:
        main()
    except RuntimeError as failure:
        sys.exit(str(failure))
