"""Results as tables for a terminal and as plain values for JSON."""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.cache_files import BadRow
from trainer.evaluation.choices import RULES, ChannelAccuracy
from trainer.evaluation.completions import ChannelTasks
from trainer.evaluation.perplexity import ChannelLoss

SHOWN, KEPT = 5, 1000
"""Bad rows that the terminal shows and that the JSON file names."""


class BadRows:
    """Rows that were passed over: all are counted, the first are named."""

    def __init__(self) -> None:
        self.first: list[BadRow] = []
        self.count: Counter[str] = Counter()

    def add(self, row: BadRow) -> None:
        """Count one."""
        self.count[row.file] += 1
        if len(self.first) < KEPT:
            self.first.append(row)

    def __str__(self) -> str:
        """Counts by file and the first rows; empty when there are none."""
        if not self.count:
            return ""
        counts = ", ".join(f"{count} of {file}" for file, count in self.count.items())
        total = self.count.total()
        more = [f"  and {total - SHOWN} more"] if total > SHOWN else []
        shown = [f"  {row.file}:{row.line}: {row.reason}" for row in self.first[:SHOWN]]
        return "\n".join([f"passed over {total} bad row(s) ({counts})", *shown, *more])


def loss_table(losses: Sequence[ChannelLoss]) -> str:
    """Losses by channel, ± one standard error."""
    head = ("channel", "documents", "tokens", "loss (nats/token)", "perplexity", "bits/byte")
    rows = [
        (
            each.channel,
            f"{each.documents:,}",
            f"{each.tokens:,}",
            _pair(each.loss, each.loss_error, 4),
            _pair(each.perplexity, each.perplexity_error, 3),
            _pair(each.bits_per_byte, each.bits_per_byte_error, 4),
        )
        for each in losses
    ]
    return _table(head, rows)


def accuracy_table(results: Sequence[ChannelAccuracy]) -> str:
    """Accuracies by channel, ± one standard error."""
    head = ("channel", "questions", "accuracy", "per token", "per byte", "chance")
    rows = [
        (
            each.channel,
            f"{each.questions:,}",
            *(_pair(each.accuracy[rule], each.error[rule], 4) for rule in RULES),
            f"{each.chance:.4f}",
        )
        for each in results
    ]
    return _table(head, rows)


def task_table(results: Sequence[ChannelTasks]) -> str:
    """Right answers by channel, with a 95 % interval."""
    head = ("channel", "tasks", "accuracy", "95% interval", "cut off", "no match")
    rows = [
        (
            each.channel,
            f"{each.tasks:,}",
            f"{each.accuracy:.4f}",
            f"{each.low:.4f} to {each.high:.4f}",
            f"{each.cut:,}",
            f"{each.unmatched:,}",
        )
        for each in results
    ]
    return _table(head, rows)


def to_dict(
    about: dict[str, Any],
    losses: Sequence[ChannelLoss],
    answers: Sequence[ChannelAccuracy],
    attempts: Sequence[ChannelTasks],
    bad: BadRows,
) -> dict[str, Any]:
    """Everything for the JSON file."""
    return {
        **about,
        "perplexity": [dataclasses.asdict(each) for each in losses],
        "choices": [dataclasses.asdict(each) for each in answers],
        "tasks": [dataclasses.asdict(each) for each in attempts],
        "bad_rows": {
            "count": bad.count.total(),
            "by_file": dict(bad.count),
            "first": [dataclasses.asdict(row) for row in bad.first],
        },
    }


def check_writable(path: Path, option: str) -> None:
    """That a file can be written, before hours of work.

    Raises:
        ValueError: it cannot.
    """
    folder = path.absolute().parent
    if path.is_dir():
        raise ValueError(f"{option} {path} is a folder; name a file in it")
    if not folder.is_dir():
        raise ValueError(f"{option} {path}: there is no folder {folder}; make it first")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise ValueError(f"{option} {path} cannot be written: no permission; name another place")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replace a file at once. A number that is none (an infinite perplexity) is written as null."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_text(json.dumps(_finite(content), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    if isinstance(value, float) and not abs(value) < float("inf"):
        return None
    return value


def _pair(value: float | None, error: float | None, digits: int) -> str:
    if value is None:
        return "-"
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[column]) for line in (head, *rows)) for column in range(len(head))]
    lines = []
    for line in (head, *rows):
        cells = [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        lines.append("  ".join([line[0].ljust(widths[0]), *cells]))
    return "\n".join(lines)
