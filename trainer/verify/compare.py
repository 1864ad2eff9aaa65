"""The records of a layout's processes against that of one process: every number at its place."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from parallel.sharding import Cut, Shard
from trainer.verify.record import Range, Record, Rows

TOLERANCE = 1e-5
INPUTS = ("tokens_T", "positions_T", "targets_T")
KINDS = ("start", "forward", "numbers", "gradients", "weights")
"""In the order in which they are made, which is that of cause and effect."""
SMALLEST = 1e-3
"""A tensor smaller than this share of the largest one of its kind is measured against that share: its rounding errors
come from the large ones."""


@dataclass(frozen=True)
class Difference:
    """How far one tensor or number is from that of one process, relative to its largest value."""

    name: str
    relative: float
    where: str = ""


@dataclass(frozen=True)
class Comparison:
    """The differences of each kind, in the order of the model; equal ones too."""

    reference: Record
    ranks: Sequence[Record]
    found: dict[str, list[Difference]]

    def wrong(self, kind: str) -> list[Difference]:
        """Those above the tolerance."""
        return [each for each in self.found[kind] if not each.relative <= TOLERANCE]

    def worst(self, kind: str) -> Difference:
        """The largest difference of a kind."""
        return max(self.found[kind], key=lambda each: each.relative)

    @property
    def equal(self) -> bool:
        """Whether nothing is above the tolerance."""
        return not any(self.wrong(kind) for kind in KINDS)


def compare(reference: Record, ranks: Sequence[Record]) -> Comparison:
    """Compare what the processes of a layout recorded with what one process did."""
    found = {
        "start": _states(reference.start, [r.start for r in ranks], reference.names, 0.0),
        "forward": _forward(reference, ranks),
        "numbers": _numbers(reference, ranks[0]),
        "gradients": _states(reference.gradients, [r.gradients for r in ranks], reference.names, SMALLEST),
        "weights": _states(reference.weights, [r.weights for r in ranks], reference.names, 0.0),
    }
    return Comparison(reference, ranks, found)


# ---- module outputs --------------------------------------------------------------------------------------------------


def outputs(record: Record) -> dict[str, dict[int, torch.Tensor]]:
    """What one process alone recorded: module -> micro-batch -> values of all its tokens."""
    found: dict[str, dict[int, torch.Tensor]] = {}
    for rows in record.rows:
        found.setdefault(rows.module, {})[rows.batch] = rows.values
    return found


def _forward(reference: Record, ranks: Sequence[Record]) -> list[Difference]:
    differences = []
    for module, expected in outputs(reference).items():
        pieces = [(r, rows) for r in ranks for rows in r.rows if rows.module == module]
        size = max(float(values.abs().max()) for values in expected.values())
        seen = {batch: torch.zeros(len(values), dtype=torch.bool) for batch, values in expected.items()}
        worst = Difference(module, 0.0)
        for rank, rows in pieces:
            seen[rows.batch][rows.at] = True
            apart = _apart(rows, expected[rows.batch]) / max(size, 1e-12)
            if apart.numel() and not float(apart.max()) <= worst.relative:
                count = int((apart > TOLERANCE).sum())
                where = f"micro-batch {rows.batch}, rank {rank.rank}, {count} of its {len(apart)} tokens"
                worst = Difference(module, float(apart.max()), where)
        missing = sum(int((~each).sum()) for each in seen.values())
        if missing:
            worst = Difference(module, float("inf"), f"{missing} tokens are on no rank")
        differences.append(worst)
    twice = _learnt_twice(ranks)
    if twice:
        differences = [
            Difference("targets_T", float("inf"), twice) if d.name == "targets_T" else d for d in differences
        ]
    return differences


def _apart(rows: Rows, expected: torch.Tensor) -> torch.Tensor:
    """The largest difference of each row."""
    apart = (rows.values.double() - expected[rows.at].double()).abs()
    return apart.flatten(1).amax(1) if apart.dim() > 1 else apart


def _learnt_twice(ranks: Sequence[Record]) -> str:
    """Says how many targets lie on several of the ranks that share a micro-batch's tokens."""
    holders: dict[tuple[int, int], set[int]] = {}
    for rank in ranks:
        for rows in rank.rows:
            if rows.module == "targets_T":
                for at in rows.at[rows.values != -100].tolist():
                    holders.setdefault((rows.batch, at), set()).add(rank.place["cp"])
    several = sum(len(places) > 1 for places in holders.values())
    return f"{several} targets are on several cp ranks" if several else ""


# ---- parameters ------------------------------------------------------------------------------------------------------


def _states(
    reference: Iterable[Range], ranks: Sequence[Iterable[Range]], names: Sequence[str], floor: float
) -> list[Difference]:
    wholes = {piece.name: piece.values.flatten() for piece in reference}
    largest = max(float(whole.abs().max()) for whole in wholes.values())
    worst = dict.fromkeys(wholes, 0.0)
    rows: dict[str, set[int]] = {name: set() for name in wholes}
    seen = {name: torch.zeros(len(whole), dtype=torch.bool) for name, whole in wholes.items()}
    shards = {piece.name: piece for piece in reference}
    for pieces in ranks:
        for piece in pieces:
            at, values = places_of(piece)
            whole = wholes[piece.name]
            seen[piece.name][at] = True
            apart = (values.double() - whole[at].double()).abs() / max(float(whole.abs().max()), floor * largest, 1e-12)
            if apart.numel():
                worst[piece.name] = max(worst[piece.name], _no_nan(float(apart.max())))
                width = max(torch.Size(piece.whole[1:]).numel(), 1)
                rows[piece.name].update((at[~(apart <= TOLERANCE)] // width).unique().tolist())
    for name, covered in seen.items():
        if not bool(covered.all()):
            worst[name] = float("inf")
    order = {name: i for i, name in enumerate(names)}  # buffers, which are no parameters, come last
    return [
        Difference(name, worst[name], where_in(shards[name], rows[name]))
        for name in sorted(wholes, key=lambda name: order.get(name, len(order)))
    ]


def _no_nan(value: float) -> float:
    return value if value == value else float("inf")


def places_of(piece: Range) -> tuple[torch.Tensor, torch.Tensor]:
    """Flat places in the whole tensor of a range's values, and the values; rows of padding are left out."""
    at = held(piece.shard, piece.cut, piece.whole).flatten()[piece.start : piece.start + len(piece.values)]
    return at[at >= 0], piece.values[at >= 0]


def held(shard: Shard, cut: Cut, whole: Sequence[int]) -> torch.Tensor:
    """Which elements of a whole tensor a place holds, as flat numbers in the shape of its part; -1 is padding.

    Worked out from what the fields of ``Shard`` mean and not with its methods, whose mistakes would not be seen.
    """
    index = torch.arange(torch.Size(whole).numel()).view(*whole)
    if shard.experts:
        each = whole[0] // cut.ep
        index = index[cut.ep_rank * each : (cut.ep_rank + 1) * each]
    if shard.dim is None or cut.tp == 1:
        return index
    chosen: list[int] = []
    first = 0
    for i, part in enumerate(shard.parts):
        units = shard.units[i] if shard.units else 0
        if units:
            size = part // units
            heads = [h for h in range(units) if h * cut.tp // units == cut.tp_rank]
            heads = heads if units >= cut.tp else [cut.tp_rank * units // cut.tp]
            chosen += [first + h * size + row for h in heads for row in range(size)]
        else:
            size = -(-part // cut.tp)
            rows = range(cut.tp_rank * size, (cut.tp_rank + 1) * size)
            chosen += [first + row if row < part else -1 for row in rows]
        first += part
    rows = torch.tensor(chosen)
    taken = index.index_select(shard.dim, rows.clamp(min=0))
    taken.movedim(shard.dim, 0)[rows < 0] = -1
    return taken


FUSED = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}


def where_in(piece: Range, rows: set[int]) -> str:
    """Which of a tensor's first dimension differ, and which fused part they belong to."""
    if not rows or len(piece.whole) < 1:
        return ""
    low, high, size = min(rows), max(rows), piece.whole[0]
    if len(rows) == size:
        return "all rows"
    text = f"{len(rows)} of {size} rows, {low} to {high}"
    names = FUSED.get(piece.name.split(".")[-2], ()) if "." in piece.name else ()
    if piece.shard.dim == 0 and len(names) == len(piece.shard.parts):
        return f"{text}, of {' and '.join(parts_touched(piece.shard, names, rows))}"
    return text


def parts_touched(shard: Shard, names: Sequence[str], rows: Iterable[int]) -> list[str]:
    """The names of the fused parts that rows belong to."""
    touched, first = [], 0
    for name, part in zip(names, shard.parts, strict=True):
        if any(first <= row < first + part for row in rows):
            touched.append(name)
        first += part
    return touched


NATS = ("loss", "margin", "kl", "moved_kl", "mismatch_k1", "mismatch_kl")
"""Numbers that are differences of larger ones, as are rewards: below 1 they are compared as if they were 1."""


# ---- numbers ---------------------------------------------------------------------------------------------------------


def _numbers(reference: Record, main: Record) -> list[Difference]:
    differences = []
    names = sorted({**reference.numbers, **main.numbers}, key=lambda name: name.startswith("eval/"))  # training first
    for name in names:
        ours, theirs = main.numbers.get(name), reference.numbers.get(name)
        if ours is None or theirs is None:
            where = "told by one process, not here" if ours is None else "told here, not by one process"
            differences.append(Difference(name, float("inf"), where))
        else:
            relative = abs(ours - theirs) / max(abs(theirs), _smallest(name)) if ours != theirs else 0.0
            differences.append(Difference(name, _no_nan(relative), f"{ours:.9g} instead of {theirs:.9g}"))
    return differences


def metric_of(name: str) -> str:
    """The last word of a number's name: tokens for channel/code/tokens step 1."""
    return name.partition(" ")[0].rpartition("/")[2]


def _smallest(name: str) -> float:
    return 1.0 if metric_of(name) in NATS or metric_of(name).endswith("_reward") else 1e-12
