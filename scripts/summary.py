"""What a run learnt, channel by channel, as a small table read from its metrics.jsonl.

    python scripts/summary.py runs/quickstart

"first" and "last" are means over the first and the last quarter of the logged steps, weighted by supervised tokens, so
that one lucky batch decides nothing. "held out" are samples never trained on, evaluated before and after.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trainer.logging.history import History, read


@dataclass(frozen=True)
class Line:
    """One row of the table; losses in nats per token, None where the run did not measure."""

    name: str
    tokens: float
    first: float | None
    last: float | None
    held_out_before: float | None
    held_out: float | None


def weighted_mean(points: list[tuple[float, float]]) -> float | None:
    """Mean of (value, weight) pairs; None when nothing weighs anything."""
    total = sum(weight for _, weight in points)
    return sum(value * weight for value, weight in points) / total if total > 0 else None


def line_of(history: History, name: str, loss: str, tokens: str | None, held_out: str) -> Line:
    """The row of one channel, or of the whole run (`tokens` None: every step weighs the same)."""
    logged = [row for row in history.rows if row.kind == "train"]
    quarter = max(1, len(logged) // 4)

    def mean(rows: list) -> float | None:
        return weighted_mean(
            [(r.metrics[loss], r.metrics[tokens] if tokens else 1.0) for r in rows if loss in r.metrics]
        )

    seen = sum(row.metrics.get(tokens, 0.0) for row in logged) if tokens else 0.0
    steps, evaluations = history.series(held_out)
    return Line(
        name=name,
        tokens=seen,
        first=mean(logged[:quarter]),
        last=mean(logged[-quarter:]),
        held_out_before=evaluations[0] if steps and steps[0] == 0 else None,
        held_out=evaluations[-1] if steps and steps[-1] > 0 else None,
    )


def table(history: History) -> list[Line]:
    """One row for each channel and a last one for all of them together."""
    rows = [
        line_of(history, name, f"channel/{name}/loss", f"channel/{name}/tokens", f"eval/{name}/loss")
        for name in history.channels()
    ]
    return [*rows, line_of(history, "all", "train/loss", None, "eval/loss")]


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def change(before: float | None, after: float | None) -> str:
    return "-" if before is None or after is None or before == 0 else f"{100 * (after / before - 1):+.0f} %"


def render(history: History) -> str:
    """The table as text, followed by how many steps and tokens it covers."""
    lines = table(history)
    groups = [("in training", "first", "last", [(line.first, line.last) for line in lines])]
    if any(line.held_out is not None for line in lines):
        groups.append(("held out", "before", "after", [(line.held_out_before, line.held_out) for line in lines]))
    width = max(8, *(len(line.name) for line in lines))
    out = [
        " " * width + "".join(f"  {title:^25}" for title, *_ in groups),
        f"{'loss':<{width}}" + "".join(f"  {early:>7}  {late:>7}  {'change':>7}" for _, early, late, _ in groups),
    ]
    out.append("-" * len(out[-1]))
    for index, line in enumerate(lines):
        pairs = [values[index] for *_, values in groups]
        cells = (f"  {number(early):>7}  {number(late):>7}  {change(early, late):>7}" for early, late in pairs)
        out.append(f"{line.name:<{width}}" + "".join(cells))
    logged = [row for row in history.rows if row.kind == "train"]
    tokens = sum(line.tokens for line in lines)
    out.append(f"{logged[-1].step if logged else 0} steps, {tokens:,.0f} supervised tokens; nats per token")
    return "\n".join(out)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path, help="a folder written by train.py")
    try:
        print(render(read(parser.parse_args().run_dir)))
    except ValueError as error:
        print(f"summary: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
