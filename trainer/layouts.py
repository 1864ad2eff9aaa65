"""What is wrong with a layout, and the legal layouts nearest to it, as words to paste."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from itertools import combinations
from typing import Any

from trainer.layout_rules import Layout, broken, feeds
from trainer.problems import Problem

MOST_CHANGES = 4
"""Keys changed at once in a suggestion; more would be another layout, not a near one."""
SIZES = ("parallel.tp", "parallel.pp", "parallel.cp", "parallel.ep")
KEYS = (
    *SIZES,
    "parallel.schedule",
    "parallel.vpp",
    "parallel.stage_layers",
    "parallel.context",
    "engine.zero",
    "engine.attention",
    "data.micro_batch_rows",
    "data.global_batch_rows",
)
"""What a suggestion may change. Each key's choices depend on those before it, so the rows come last."""
CHANGES_TRAINING = "data.global_batch_rows"
"""The one of them that changes what is computed, so it is suggested after equally small changes of the others."""


def problems(layout: Layout, world: int) -> list[Problem]:
    """Every rule the layout breaks on ``world`` processes, all with the same way out: the nearest legal layouts.

    Rows that cannot be shared out evenly are not told here (``trainer.config`` does), but a suggestion obeys that too.
    Empty where the sections' own values are wrong already.
    """
    own = layout.parallel.problems() or layout.model.size_problems()
    if own or min(layout.data.micro_batch_rows, layout.data.global_batch_rows) < 1:
        return []
    faults = list(broken(layout, world))
    if not faults:
        return []
    ways = [paste(layout, near) for near in nearest(layout, world)] or ["parallel=single"]
    enough = -(-world // layout.parallel.model_ranks) * layout.parallel.model_ranks
    if enough != world and layout.micro_batches(enough) and next(broken(layout, enough), None) is None:
        ways.append(f"{enough} processes for the layout as it is (torchrun --nproc_per_node {enough})")
    return [Problem(*fault, "\n".join(ways)) for fault in faults]


def nearest(asked: Layout, world: int, most: int = 3) -> list[Layout]:
    """Legal layouts that change as few keys as possible: first those that train the same, then the closest sizes."""
    for count in range(1, MOST_CHANGES + 1):
        legal = [
            layout
            for keys in combinations(KEYS, count)
            for layout in _changed(asked, keys, world)
            if layout.micro_batches(world) and next(broken(layout, world), None) is None
        ]
        if legal:
            return sorted(legal, key=lambda layout: _rank(asked, layout))[:most]
    return []


def paste(asked: Layout, layout: Layout) -> str:
    """The changes from one layout to another as command-line words."""
    shown = {None: "null", True: "true", False: "false"}
    words = []
    for key in KEYS:
        value = layout.get(key)
        if value != asked.get(key):
            words.append(f"{key}={shown[value] if value is None or isinstance(value, bool) else value}")
    return " ".join(words)


def _changed(layout: Layout, keys: tuple[str, ...], world: int) -> Iterator[Layout]:
    """The layout with all of ``keys`` at other values."""
    if not keys:
        yield layout
        return
    for value in _others(layout, keys[0], world):
        yield from _changed(layout.with_(keys[0], value), keys[1:], world)


def _others(layout: Layout, key: str, world: int) -> list[Any]:
    """Other values of a key that may help."""
    now, parallel = layout.get(key), layout.parallel
    if key in SIZES:
        if key == "parallel.ep" and layout.model.moe is None:
            choices: list[Any] = [1]
        else:
            choices = [n for n in range(1, world + 1) if world % n == 0]
    elif key == "parallel.schedule":
        choices = ["gpipe", "1f1b", "interleaved", "zero_bubble", "zbv"] if parallel.pp > 1 else []
    elif key == "parallel.vpp":
        derived = dataclasses.replace(parallel, vpp=None).stages_per_rank
        choices = [None, *(n for n in range(1, now) if n != derived)] if now is not None else []
    elif key == "engine.zero":
        choices = list(range(1, now))
    elif key == "data.micro_batch_rows":
        choices = [n for n in range(1, now) if layout.with_(key, n).micro_batches(world)]
    elif key == "data.global_batch_rows":
        choices = _row_choices(layout, world)
    else:
        simple = {
            "parallel.stage_layers": None,
            "parallel.context": "ring" if parallel.context == "ulysses" else "ulysses",
            "engine.attention": "sdpa",
        }
        choices = [simple[key]]
    return [choice for choice in choices if choice != now]


def _row_choices(layout: Layout, world: int) -> list[int]:
    """The nearest global batches below and above that the schedule can be fed with."""
    together = layout.data.micro_batch_rows * layout.dp(world)
    if not together:
        return []
    now = layout.data.global_batch_rows / together
    fits = [n for n in range(1, int(now) + 2 * layout.parallel.pp + 2) if feeds(layout.parallel, n) is None]
    below, above = [n for n in fits if n < now], [n for n in fits if n > now]
    return [n * together for n in (*below[-1:], *above[:1])]


def _rank(asked: Layout, layout: Layout) -> tuple[bool, float, str]:
    """How far a layout is from the one that was asked for; equally far ones come in a fixed order."""
    far = 0.0
    for key in KEYS:
        old, new = asked.get(key), layout.get(key)
        if old != new and (key in SIZES or key.startswith("data.")):
            far += abs(math.log2(new / old))
        elif old != new:
            far += abs(new - old) / 4 if key == "engine.zero" else 0.5
    return layout.get(CHANGES_TRAINING) != asked.get(CHANGES_TRAINING), far, paste(asked, layout)
