"""Draw what one or more runs measured: loss, throughput, gradient norm, learning rate, memory, and each channel.

    python scripts/plot.py runs/a runs/b --out compare.png

In the place of the loss stands what a stage is about: the reward of reinforcement learning (with length, entropy,
divergences, clipping and what else was measured), the accuracy of preferences (with loss and margin). The picture is a
PNG, or with ``--out FILE.html`` one page with the picture and a table of first and last values.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from trainer.logging.history import History, read

# Paul Tol's "bright" scheme: calm, and distinct to colour-blind readers. Runs past the seventh change the dash.
_COLOURS = ("#4477AA", "#EE6677", "#228833", "#CCBB44", "#66CCEE", "#AA3377", "#777777")
_DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.5)))
_COLUMNS = 3
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.5,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Goal:
    """What runs are about: the large panel, and one of each channel."""

    title: str
    unit: str
    train: str
    """Metric of training; ``eval/<name>`` of what is held out, ``channel/<channel>/<name>`` and so on of channels."""
    name: str


_GOALS = (
    Goal("Reward", "mean reward", "rollout/reward", "reward"),
    Goal("Preferred by the policy", "share of pairs", "train/preferred", "preferred"),
    Goal("Accuracy", "share of pairs", "train/accuracy", "accuracy"),
    Goal("Loss", "nats per token", "train/loss", "loss"),
)
# title, metric, unit on the y axis
_LOWER_PANELS = (
    ("Gradient norm", "train/grad_norm", "global L2 norm"),
    ("Learning rate", "train/lr", "learning rate"),
    ("Memory", "perf/memory_gib", "peak GiB, main rank"),
)
# The same, drawn where a run measured it and is about something else than its loss.
_MORE_PANELS = (
    ("Preference loss", "train/loss", "nats per pair"),
    ("Accuracy of rewards", "train/accuracy", "share of pairs"),
    ("Margin", "train/margin", "reward"),
    ("Length of answers", "rollout/length", "tokens"),
    ("Cut off", "rollout/truncated", "share of samples"),
    ("Groups without signal", "rollout/flat_groups", "share of groups"),
    ("Entropy", "train/entropy", "nats per token"),
    ("Divergence from the reference", "train/kl", "nats per token"),
    ("Moved since the rollout", "train/moved_kl", "nats per token"),
    ("Clipped upwards", "train/clip_high", "share of tokens"),
    ("Clipped downwards", "train/clip_low", "share of tokens"),
    ("Generator against trainer", "train/mismatch_kl", "nats per token"),
    ("Critic's explained variance", "critic/explained_variance", "share"),
    ("Time of a step", "perf/step_time", "seconds"),
)


def smooth(values: list[float], weight: float) -> list[float]:
    """Exponential moving average that forgets ``1 - weight`` per point, without bias towards the first value.

    Points that are not finite stay as they are and leave the average alone.
    """
    average, total, out = 0.0, 0.0, []
    for value in values:
        if not math.isfinite(value):
            out.append(value)
            continue
        average = weight * average + (1 - weight) * value
        total = weight * total + (1 - weight)
        out.append(average / total)
    return out


def _line(axes: Axes, run: History, metric: str, look: tuple[str, object], smoothing: float, label: str | None) -> bool:
    """Draw one metric of one run; what is not finite becomes a cross on the lower border. False if never measured."""
    steps, values = run.series(metric)
    colour, dash = look
    if not steps:
        return False
    # A line needs two points; a single one is drawn as a dot.
    marker = "o" if len(steps) == 1 else None
    if smoothing > 0:
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
    axes.plot(steps, smooth(values, smoothing), color=colour, linestyle=dash, label=label, marker=marker, markersize=4)
    broken = [step for step, value in zip(steps, values, strict=True) if not math.isfinite(value)]
    if broken:
        low = axes.get_xaxis_transform()
        axes.plot(broken, [0.02] * len(broken), "x", color="#CC0000", transform=low, label="not finite", markersize=6)
    return True


def _held_out(axes: Axes, run: History, metric: str, look: tuple[str, object], label: str | None) -> None:
    """Evaluations are few: dots joined by a thin line."""
    steps, values = run.series(metric)
    if steps:
        axes.plot(steps, values, "o:", color=look[0], markersize=4, markerfacecolor="white", linewidth=1, label=label)


def _literal(text: str) -> str:
    """A name as it is: matplotlib would read what stands between dollar signs as a formula."""
    return text.replace("$", r"\$")


def _finish(axes: Axes, title: str, unit: str) -> None:
    axes.set_title(_literal(title))
    axes.set_xlabel("step")
    axes.set_ylabel(unit)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
    if not axes.get_lines():
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color="#999999")


def _fit_y(axes: Axes, metric: str) -> None:
    """The y scale that suits a quantity: amounts from 0, rates in powers of ten, a norm with spikes logarithmic."""
    values = [y for line in axes.get_lines() for y in np.asarray(line.get_ydata()) if math.isfinite(y) and y > 0]
    if metric.startswith("perf/") and values:
        axes.set_ylim(0, 1.1 * max(values))
    elif metric == "train/lr":
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    elif metric == "train/grad_norm" and values and max(values) > 100 * min(values):
        axes.set_yscale("log")


def _legend(axes: Axes) -> None:
    """A legend without repeated names (several runs may have broken steps)."""
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    if unique:
        axes.legend(unique.values(), unique.keys(), loc="best", fontsize=8)


def run_names(folders: list[Path]) -> list[str]:
    """Folder names, with as many parents as it takes to tell the runs apart."""
    resolved = [folder.resolve() for folder in folders]
    for depth in range(1, max(len(path.parts) for path in resolved) + 1):
        names = ["/".join(path.parts[-depth:]) for path in resolved]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in resolved]


def goal_of(runs: list[History]) -> Goal:
    """What all the runs have in common that says most."""
    return next((goal for goal in _GOALS if all(run.series(goal.train)[0] for run in runs)), _GOALS[-1])


def _panels(runs: list[History], goal: Goal) -> list[tuple[str, str, str]]:
    """The small panels besides those of the channels, as (title, metric, unit)."""
    names = {name for run in runs for name in run.names()}
    if goal is _GOALS[-1]:
        return list(_LOWER_PANELS)
    parts = sorted(name for name in names if name.startswith("rollout/reward/"))
    more = [(f"Reward: {name.rpartition('/')[2]}", name, "mean") for name in parts if len(parts) > 1]
    own = [panel for panel in _MORE_PANELS if panel[1] in names]
    if goal.name == "reward":
        own = [panel for panel in own if panel[1] != "train/loss"]  # of a policy's update it says nothing
    return [*more, *own, *_LOWER_PANELS]


def draw(runs: list[History], names: list[str], smoothing: float = 0.0) -> Figure:
    """The whole picture: goal and throughput on top, one panel per channel, then what else was measured."""
    names = [_literal(name) for name in names]
    looks = [(_COLOURS[i % len(_COLOURS)], _DASHES[i // len(_COLOURS) % len(_DASHES)]) for i in range(len(runs))]
    channels = sorted({channel for run in runs for channel in run.channels()})
    goal = goal_of(runs)
    panels = _panels(runs, goal)
    rows = 1 + math.ceil((len(channels) + len(panels)) / _COLUMNS)
    with plt.rc_context(_STYLE):
        figure = plt.figure(figsize=(13, 3.2 + 2.7 * (rows - 1)), layout="constrained")
        grid = figure.add_gridspec(rows, _COLUMNS, height_ratios=[1.25] + [1] * (rows - 1))
        main = figure.add_subplot(grid[0, :-1])
        speed = figure.add_subplot(grid[0, -1], sharex=main)
        places = iter(grid[row, column] for row in range(1, rows) for column in range(_COLUMNS))
        for run, name, look in zip(runs, names, looks, strict=True):
            _line(main, run, goal.train, look, smoothing, name if len(runs) > 1 else "training")
            _held_out(main, run, f"eval/{goal.name}", look, f"{name}, held out" if len(runs) > 1 else "held out")
            _line(speed, run, "perf/tokens_per_s", look, 0.0, None)
        _finish(main, goal.title, goal.unit)
        _finish(speed, "Throughput", "tokens/s, all devices")
        _fit_y(speed, "perf/tokens_per_s")
        _legend(main)
        for channel in channels:
            axes = figure.add_subplot(next(places), sharex=main)
            for run, look in zip(runs, looks, strict=True):
                _line(axes, run, f"channel/{channel}/{goal.name}", look, smoothing, None)
                _held_out(axes, run, f"eval/{channel}/{goal.name}", look, None)
            _finish(axes, f"Channel {channel}", goal.unit)
        for title, metric, unit in panels:
            axes = figure.add_subplot(next(places), sharex=main)
            for run, look in zip(runs, looks, strict=True):
                _line(axes, run, metric, look, 0.0, None)
                if metric.startswith("rollout/") and metric != "rollout/flat_groups":  # greedy texts are all alike
                    _held_out(axes, run, metric.replace("rollout/", "eval/", 1), look, None)
            _finish(axes, title, unit)
            _fit_y(axes, metric)
        figure.suptitle("  ·  ".join(names) if len(names) <= 3 else f"{len(names)} runs", fontsize=12, weight="bold")
    return figure


def summary(runs: list[History], names: list[str]) -> list[tuple[str, str, str, str, str]]:
    """Rows (run, what, steps, first, last) of the runs' goal, of each channel's, and of what is held out."""
    goal, table = goal_of(runs), []
    whole = {goal.train: "training", f"eval/{goal.name}": "held out"}
    for run, name in zip(runs, names, strict=True):
        of_channels = [f"channel/{channel}/{goal.name}" for channel in run.channels()]
        for metric in (goal.train, *of_channels, f"eval/{goal.name}"):
            steps, values = run.series(metric)
            if steps:
                what = whole.get(metric, metric.split("/")[1])
                table.append((name, what, f"{steps[0]}-{steps[-1]}", f"{values[0]:.4f}", f"{values[-1]:.4f}"))
    return table


def _header(goal: Goal) -> tuple[str, ...]:
    return ("run", f"{goal.name} of", "steps", "first", "last")


def _text_table(table: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in table)


def _html_page(picture: bytes, names: list[str], table: list[tuple[str, ...]]) -> str:
    """One page that needs no other file and no network."""

    def cells(row: tuple[str, ...], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"

    title = html.escape(", ".join(names))
    body = "".join(cells(row, "td") for row in table[1:])
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        "<style>body{font:14px sans-serif;margin:24px;color:#222}img{max-width:100%}"
        "table{border-collapse:collapse}td,th{padding:4px 14px;text-align:left;border-bottom:1px solid #ddd}</style>"
        f'<img alt="{title}" src="data:image/png;base64,{base64.b64encode(picture).decode()}">'
        f"<table>{cells(table[0], 'th')}{body}</table></html>\n"
    )


def plot(folders: list[Path], out: Path, smoothing: float) -> list[tuple[str, ...]]:
    """Read the runs, write the picture to ``out`` and return the table of first and last values, its header first.

    Raises:
        ValueError: a folder is no run, ``out`` is neither .png nor .html, or the smoothing is outside [0, 1).
    """
    if out.suffix not in (".png", ".html"):
        raise ValueError(f"--out {out}: the picture is a .png or a .html file; give --out plot.png")
    if not 0 <= smoothing < 1:
        raise ValueError(f"--smooth {smoothing}: a weight lies in [0, 1), 0 draws the values as they are")
    runs = [read(folder) for folder in folders]
    names = run_names(folders)
    figure = draw(runs, names, smoothing)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    plt.close(figure)
    table: list[tuple[str, ...]] = [_header(goal_of(runs)), *summary(runs, names)]
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".png":
        out.write_bytes(buffer.getvalue())
    else:
        out.write_text(_html_page(buffer.getvalue(), names, table), encoding="utf-8")
    return table


def main(argv: list[str] | None = None) -> int:
    """Command line; 0, or 2 with a message for a user's mistake."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help="run folder, such as runs/<name>")
    parser.add_argument("--out", type=Path, help=".png or .html (default: plot.png in the first run folder)")
    parser.add_argument("--smooth", type=float, default=0.0, metavar="W", help="smooth losses, 0 to below 1 (0.9)")
    args = parser.parse_args(argv)
    out = args.out or args.runs[0] / "plot.png"
    try:
        table = plot(args.runs, out, args.smooth)
    except (ValueError, OSError) as err:
        print(f"plot.py: {err}", file=sys.stderr)
        return 2
    print(_text_table(table))
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
