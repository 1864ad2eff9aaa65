"""Whether a token's cost grows as its FLOPs do: ``python scripts/bench/growth.py [--quick]``.

The plain loop and Loom on one process, with tp=2 and with pp=2, at sequences of 128 to 2,048 tokens and 2 to 16
layers, every step of as many tokens. Per point the table of ``pretrain.py``; at the end CPU-seconds a token over FLOPs
a token (``models/flops.py``), divided by the same at the middle point: 1.00 is growth by the formula, 1.20 a cost that
has grown 20 % more. Every turn is appended to ``runs/bench/growth.jsonl``.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from models.config import ModelConfig
from models.flops import attended_pairs, matmul_params, step_flops
from scripts.bench import workload
from scripts.bench.harness import ROOT, Record, append_results, compete, table
from scripts.bench.pretrain import LAYOUTS, LOOM_1, PLAIN, loaded
from scripts.bench.turns import Schedule

MICRO_BATCH_TOKENS = 2048
MICRO_BATCHES = 2
TOLERANCE = 0.15
CONTENDERS = [PLAIN, LOOM_1, *(c for c in LAYOUTS if c.name in ("loom tp2", "loom pp2 1f1b"))]


def load(seq_len: int, layers: int) -> workload.Load:
    """A step of this shape; micro-batches have as many tokens at every length."""
    return workload.Load(layers, seq_len, MICRO_BATCH_TOKENS // seq_len, MICRO_BATCHES)


MIDDLE = load(512, 8)
SEQUENCES = [load(128, 8), MIDDLE, load(2048, 8)]
DEPTHS = [load(512, 2), MIDDLE, load(512, 16)]


@dataclass(frozen=True)
class Flops:
    """FLOPs of a token, by part."""

    layers: float
    attention: float
    head: float

    @property
    def whole(self) -> float:
        """All of them."""
        return self.layers + self.attention + self.head

    @staticmethod
    def of_token(load: workload.Load) -> Flops:
        """Mean over a row, all of whose tokens but the last have a target."""
        cfg = ModelConfig(
            "llama",
            workload.VOCABULARY,
            workload.HIDDEN,
            workload.FFN,
            load.layers,
            workload.HEADS,
            workload.KV_HEADS,
            workload.HIDDEN // workload.HEADS,
            workload.SFT_LONGEST,
        )
        whole = step_flops(cfg, [load.seq_len], load.seq_len - 1) / load.seq_len
        layers = 6.0 * matmul_params(cfg)
        attention = 12.0 * workload.HIDDEN * load.layers * attended_pairs(load.seq_len, None) / load.seq_len
        return Flops(layers, attention, whole - layers - attention)


def cost_of_token(record: Record) -> float:
    """CPU-seconds of all processes, median over rounds."""
    return 1.0 / median(record.tokens_per_cpu_s())


def growth_table(loads: Sequence[workload.Load], costs: Sequence[dict[str, float]]) -> str:
    """Cost over FLOPs at every point relative to the middle one.

    Args:
        loads: the points.
        costs: for each of them, contender -> CPU-seconds of a token.
    """
    middle, middle_costs = Flops.of_token(MIDDLE), costs[list(loads).index(MIDDLE)]
    names = list(middle_costs)
    lines = [
        f"{'sequence':>8}{'layers':>8}{'MFLOP/token':>13}{'attention':>11}{'head':>7}"
        + "".join(f"{name:>16}" for name in names)
    ]
    for load, cost in zip(loads, costs, strict=True):
        flops = Flops.of_token(load)
        cells = [
            growth_cell(cost[name] / middle_costs[name] / (flops.whole / middle.whole), cost[name]) for name in names
        ]
        lines.append(
            f"{load.seq_len:>8}{load.layers:>8}{flops.whole / 1e6:>13.1f}{flops.attention / flops.whole:>11.0%}"
            f"{flops.head / flops.whole:>7.0%}" + "".join(f"{cell:>16}" for cell in cells)
        )
    return "\n".join(lines)


def growth_cell(ratio: float, cost: float) -> str:
    """The ratio to the formula, a mark where it is off, and the cost in microseconds."""
    mark = "!" if abs(ratio - 1.0) > TOLERANCE else " "
    return f"{ratio:.2f}{mark} {cost * 1e6:.0f}us"


def measure(load: workload.Load, schedule: Schedule, json: Path) -> dict[str, float]:
    """One point: its table is printed, its turns are kept. Returns the cost of a token by contender."""
    with tempfile.TemporaryDirectory(prefix="loom-bench-data-") as folder:
        rows = load.rows * MICRO_BATCHES * schedule.total
        workload.write(Path(folder), rows=rows, samples=1, seq_len=load.seq_len)
        records = compete(loaded(CONTENDERS, load), Path(folder), schedule)
    print(f"\nsequence {load.seq_len}, {load.layers} layers\n{table(records)}", flush=True)
    append_results(json, f"growth, sequence {load.seq_len}, {load.layers} layers", schedule, records)
    return {record.contender.name: cost_of_token(record) for record in records}


def main() -> None:
    """All points one after another, then what they come to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short round, to see that everything runs")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=ROOT / "runs" / "bench" / "growth.jsonl")
    args = parser.parse_args()
    schedule = Schedule(1, 1, 1) if args.quick else Schedule(2, args.rounds, 1)
    points = list(dict.fromkeys([*SEQUENCES, *DEPTHS]))
    costs = [measure(load, schedule, args.json) for load in points]
    print(
        f"\nCPU-seconds a token over FLOPs a token, relative to sequence {MIDDLE.seq_len} and {MIDDLE.layers} layers; "
        f"! is more than {TOLERANCE:.0%} off"
    )
    print(growth_table(points, costs))


if __name__ == "__main__":
    try:
        main()
    except RuntimeError as failure:
        sys.exit(str(failure))
