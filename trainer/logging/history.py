"""``metrics.jsonl``: one JSON object a line, written as the run goes and read back by plots and tests.

A line is ``{"kind": "train"|"eval"|"resume", "step": int, "time": seconds since 1970, "<metric>": number, ...}``.
Numbers that JSON cannot hold are the strings "NaN", "Infinity" and "-Infinity". The file only grows: a run that goes on
or starts over (step 0) first writes a ``resume`` line with the step it goes on from, and a reader drops every earlier
line past that step; beyond that, the last line of each kind and step counts.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

FILE_NAME = "metrics.jsonl"
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def encode(kind: str, step: int, wall: float, metrics: Mapping[str, float]) -> str:
    """One line without its newline; strict JSON."""
    row: dict[str, object] = {"kind": kind, "step": step, "time": round(wall, 3)}
    for name, value in metrics.items():
        number = float(value)
        if math.isfinite(number):
            row[name] = number
        else:
            row[name] = "NaN" if math.isnan(number) else ("Infinity" if number > 0 else "-Infinity")
    return json.dumps(row, allow_nan=False)


@dataclass(frozen=True)
class Row:
    """One line of the file."""

    kind: str
    step: int
    wall: float
    """Seconds since 1970."""
    metrics: dict[str, float] = field(default_factory=dict)


def _decode(line: str) -> Row:
    raw = json.loads(line)
    metrics = {name: _NOT_FINITE[value] if value in _NOT_FINITE else float(value) for name, value in raw.items()
               if name not in ("kind", "step", "time")}  # fmt: skip
    return Row(kind=raw["kind"], step=int(raw["step"]), wall=float(raw["time"]), metrics=metrics)


@dataclass(frozen=True)
class History:
    """What a run measured, with superseded lines removed."""

    name: str
    rows: tuple[Row, ...]

    def names(self) -> list[str]:
        """Every metric, sorted."""
        return sorted({name for row in self.rows for name in row.metrics})

    def channels(self) -> list[str]:
        """Every training channel with a loss, sorted."""
        return sorted(
            name.removeprefix("channel/").removesuffix("/loss")
            for name in self.names()
            if name.startswith("channel/") and name.endswith("/loss")
        )

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of one metric; both empty where the run never measured it."""
        points = [(row.step, row.metrics[name]) for row in self.rows if name in row.metrics]
        return [step for step, _ in points], [value for _, value in points]


def read(run_dir: Path) -> History:
    """The metrics of a run folder, in the order of steps.

    Raises:
        ValueError: the folder is missing, or has no ``metrics.jsonl`` or no metrics in it.
    """
    path = run_dir / FILE_NAME
    if not run_dir.is_dir():
        raise ValueError(
            f"run folder {run_dir}: no such folder; give a folder that train.py wrote, such as runs/<name>"
        )
    if not path.is_file():
        raise ValueError(f"run folder {run_dir}: has no {FILE_NAME}; give a folder that train.py wrote, runs/<name>")
    kept: dict[tuple[str, int], Row] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = _decode(line)
        except (ValueError, KeyError, TypeError, AttributeError) as err:
            # A killed process may leave half a line; the lines around it are whole.
            warnings.warn(f"{path}:{number}: not a metrics line, left out ({err!r})", stacklevel=2)
            continue
        if row.kind == "resume":
            kept = {key: old for key, old in kept.items() if old.step <= row.step}
        else:
            kept[row.kind, row.step] = row
    if not kept:
        raise ValueError(f"run folder {run_dir}: {FILE_NAME} holds no metrics yet; wait for the first logged step")
    rows = tuple(sorted(kept.values(), key=lambda row: (row.step, row.kind)))
    return History(name=run_dir.resolve().name, rows=rows)
