"""A step of a small LLaVA against transformers' own: ``python scripts/bench/llava.py [--quick]``.

All make their steps on the same eight samples of a picture and 64 words, all equally long, so nothing is padded, and
with the same weights: their losses have to agree. The peers' pictures are decoded beforehand, Loom decodes its own in
every step. Prints useful tokens per CPU-second as ratios to the plain loop, and the products of a step beside the time
it takes. Results: ``runs/bench/llava.jsonl``.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from convert.from_hf import open_hf
from models.flops import step_flops
from scripts.bench import picture_load
from scripts.bench.harness import ROOT, Contender, Record, append_results, compete, table
from scripts.bench.picture_load import FEATURES, PATCH, SAME_LENGTH, SAME_SAMPLES, TILE
from scripts.bench.turns import Schedule

HF = "scripts.bench.peers.hf_llava"
ROWS = 2
CONTENDERS = [
    Contender("transformers", HF, ("--ready",)),
    Contender("same, memory kept", HF, ("--ready", "--keep-freed-memory")),
    Contender(
        "loom",
        "scripts.bench.loom_pictures",
        ("--seq-len", str(SAME_SAMPLES * SAME_LENGTH // ROWS), "--rows", str(ROWS)),
    ),
]
AGREE = 1e-3
"""Losses of the last step may differ by this share: sums in another order, some thirty steps long."""


def products(folder: Path) -> float:
    """FLOPs of the matrix products that a step needs."""
    samples = picture_load.read(folder)
    learnt = sum(len(sample.ids) - sample.prompt for sample in samples)
    grids = ((TILE // PATCH, TILE // PATCH),) * len(samples)
    assert all(sample.ids.count(picture_load.IMAGE) == FEATURES for sample in samples)
    return step_flops(open_hf(folder / "start").cfg, [len(sample.ids) for sample in samples], learnt, grids)


def disagreement(records: Sequence[Record]) -> float:
    """Greatest distance of a loss to that of the first contender, as a share of it."""
    losses = [record.loss() for record in records]
    return max(abs(loss - losses[0]) for loss in losses) / losses[0]


def main() -> None:
    """Write the data, let the contenders take turns, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short round, to see that everything runs")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=4, help="steps of one turn")
    parser.add_argument("--json", type=Path, default=ROOT / "runs" / "bench" / "llava.jsonl")
    args = parser.parse_args()
    schedule = Schedule(1, 1, 1) if args.quick else Schedule(2, args.rounds, args.steps)
    with tempfile.TemporaryDirectory(prefix="loom-bench-data-") as name:
        folder = Path(name)
        picture_load.write(folder, picture_load.same_samples(folder))
        needed = products(folder)
        records = compete(CONTENDERS, folder, schedule)
    print(table(records))
    tokens, told = SAME_SAMPLES * SAME_LENGTH, []
    for record in (records[0], records[-1]):
        rate = median(record.tokens_per_cpu_s())
        told.append(f"{record.contender.name} {tokens / rate:.3f} CPU-s, {needed * rate / tokens / 1e9:.0f} GFLOP/s")
    print(f"products of a step: {needed / 1e9:.1f} GFLOP; {'; '.join(told)}")
    append_results(args.json, "llava", schedule, records)
    if disagreement(records) > AGREE:
        raise RuntimeError("the contenders' losses do not agree: they do not compute the same")


if __name__ == "__main__":
    try:
        main()
    except RuntimeError as failure:
        sys.exit(str(failure))
