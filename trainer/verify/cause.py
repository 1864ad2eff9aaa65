"""What the pattern of the differences says about their cause, where it says anything."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from trainer.verify.compare import (
    INPUTS,
    TOLERANCE,
    Comparison,
    Difference,
    metric_of,
    outputs,
    parts_touched,
    places_of,
)
from trainer.verify.record import Range, Record, Rows

COUNTS = ("tokens", "pairs", "answers", "samples")
"""What numbers end in that are denominators."""


def likely_cause(seen: Comparison) -> str:
    """One sentence, or nothing where the pattern could mean many things."""
    if seen.wrong("start"):
        return _of_start(seen.wrong("start")[0])
    if seen.wrong("forward"):
        return _of_forward(seen, seen.wrong("forward")[0].name)
    counts = [each for each in seen.wrong("numbers") if metric_of(each.name).endswith(COUNTS)]
    if counts:
        what = metric_of(counts[0].name)
        return f"{what} are counted twice or left out: {counts[0].name} is {counts[0].where}."
    if seen.wrong("gradients"):
        return _of_gradients(seen, [each.name for each in seen.wrong("gradients")])
    norms = [each for each in seen.wrong("numbers") if "grad_norm" in each.name]
    if norms:
        return f"the gradients are right and their norm is not ({norms[0].where}): a tensor counts twice or not at all."
    if seen.wrong("numbers"):
        return "the training is right and what is reported is not: sums over ranks, channels or stages."
    return "gradients are right and the update is not: the clipping, the learning rate or the share each rank updates."


def _of_start(first: Difference) -> str:
    heads = " Key/value heads lie on other ranks than the query heads that use them." if _only_kv(first) else ""
    return f"before the first step a rank holds other values of {first.name} than its place says: its cut.{heads}"


def _only_kv(difference: Difference) -> bool:
    return ".qkv." in difference.name and difference.where.rpartition(", of ")[2] in ("k", "v", "k and v")


# ---- forward ---------------------------------------------------------------------------------------------------------


def _of_forward(seen: Comparison, module: str) -> str:
    if module == "targets_T":
        return "a token is learnt on several ranks, or one that has no target: counted twice."
    if module in INPUTS:
        return "the ranks are given other tokens or positions than one process: how a micro-batch is cut."
    whole = outputs(seen.reference)
    pieces = [(rank, rows) for rank in seen.ranks for rows in rank.rows if rows.module == module]
    if _is_partial(whole, module, pieces):
        return "each tp rank has only its own part of the sum: the all-reduce behind the row-parallel layer is missing."
    factor = _factor([(rows.values, whole[module][rows.batch][rows.at]) for _, rows in pieces])
    if factor is not None:
        return f"all values are {factor:.4g} times the right ones: a scale is applied twice, or on one side only."
    if module.endswith("attn") and _spares_first_documents(seen.reference, whole[module], pieces):
        return (
            "the first document of a micro-batch is right and later ones are not: documents see each other (the mask), "
            "or positions do not restart."
        )
    return _where(seen, module, whole[module], pieces)


def _where(seen: Comparison, module: str, whole: dict[int, torch.Tensor], pieces: Sequence[tuple[Record, Rows]]) -> str:
    """Which ranks are wrong, when not all are."""
    wrong = {rank.rank for rank, rows in pieces if not _close(rows.values, whole[rows.batch][rows.at], whole)}
    said = ""
    for axis in ("tp", "cp", "ep", "dp"):
        bad = {rank.place[axis] for rank in seen.ranks if rank.rank in wrong}
        if len(bad) < len({rank.place[axis] for rank in seen.ranks}):
            said = f"only ranks with place {', '.join(map(str, sorted(bad)))} on the {axis} axis are wrong. "
            break
    if f"{module}.experts.gate_up" in seen.reference.names:
        said += "These are experts: rows do not come back from the ranks they went to, or in another order or weight."
    return said


def _close(values: torch.Tensor, expected: torch.Tensor, whole: dict[int, torch.Tensor]) -> bool:
    size = max(float(each.abs().max()) for each in whole.values())
    return float((values - expected).abs().max()) <= TOLERANCE * size if values.numel() else True


def _is_partial(whole: dict[str, dict[int, torch.Tensor]], module: str, pieces: Sequence[tuple[Record, Rows]]) -> bool:
    """Whether the ranks' values sum up to the right ones. What a block adds to (its residual) is in each of them."""
    order = [name for name in whole if name not in INPUTS]
    before = order[order.index(module) - 1] if module != "embed" and module.startswith("layers.") else None
    by_place: dict[tuple[int, tuple[int, ...]], list[Rows]] = {}
    for rank, rows in pieces:
        by_place.setdefault((rows.batch, (rank.place["dp"], rank.place["cp"])), []).append(rows)
    checked = 0
    for (batch, _), some in by_place.items():
        first = some[0]
        if len(some) < 2 or any(not torch.equal(rows.at, first.at) for rows in some):
            return False
        base = whole[before][batch][first.at] if before else torch.zeros_like(first.values)
        total = base + sum((rows.values - base for rows in some), torch.zeros_like(base))
        if not _close(total, whole[module][batch][first.at], whole[module]):
            return False
        checked += 1
    return checked > 0


def _spares_first_documents(
    reference: Record, whole: dict[int, torch.Tensor], pieces: Sequence[tuple[Record, Rows]]
) -> bool:
    """Whether the tokens of first documents are right everywhere and some of later ones are not."""
    first_wrong = later_wrong = 0
    size = max(float(values.abs().max()) for values in whole.values())
    for _, rows in pieces:
        apart = (rows.values - whole[rows.batch][rows.at]).abs().flatten(1).amax(1) > TOLERANCE * size
        first = rows.at < reference.borders[rows.batch][1]
        first_wrong += int((apart & first).sum())
        later_wrong += int((apart & ~first).sum())
    return later_wrong > 0 and first_wrong == 0


# ---- gradients -------------------------------------------------------------------------------------------------------


def _of_gradients(seen: Comparison, names: Sequence[str]) -> str:
    reference = {piece.name: piece.values.flatten() for piece in seen.reference.gradients}
    pieces: dict[str, list[Range]] = {name: [] for name in names}
    for rank in seen.ranks:
        for piece in rank.gradients:
            if piece.name in pieces:
                pieces[piece.name].append(piece)
    pairs = {name: [_pair(piece, reference[name]) for piece in pieces[name]] for name in names}
    factor = _factor([pair for some in pairs.values() for pair in some])
    if factor is not None:
        return _of_factor(factor, names, seen)
    partial = frozenset[str]().union(*(rank.partial for rank in seen.ranks))
    if set(names) <= partial:
        return (
            "only parameters of which each tp rank sees a part differ: the sum of their gradients over tp is missing."
        )
    if set(names) == {"embed.weight"} and len(seen.ranks) > 1:
        return (
            "only the embedding differs: its gradient lacks what the last stage has of it (tied), or that of some rows."
        )
    shared = [piece for name in names for piece in pieces[name] if _shares_heads(piece)]
    if len({piece.name for piece in shared}) == len(names) and all(_kv_rows(pieces[n], reference[n]) for n in names):
        return (
            "only key and value heads differ, which lie on several tp ranks: the sum over these ranks, or their order."
        )
    if all(".experts." in name for name in names):
        return "only experts differ: the reduction over the ranks that hold the same ones, or the way back to them."
    losses = [each for each in seen.wrong("numbers") if each.name == "train/loss step 1"]
    if losses and len(names) == len(seen.found["gradients"]):
        return (
            f"what the head gives is right and the loss is not ({losses[0].where}): what the stage makes of it, or is "
            "told besides (a reference, advantages)."
        )
    return (
        "the forward is right, and behind this tensor (towards the input) gradients are not: a sum in the backward, "
        "there or in the module it belongs to."
    )


def _pair(piece: Range, whole: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    at, values = places_of(piece)
    return values, whole[at]


def _of_factor(factor: float, names: Sequence[str], seen: Comparison) -> str:
    everything = len(names) == len(seen.found["gradients"])
    what = "all gradients are" if everything else "they are"
    times = factor if factor > 1 else 1 / factor
    exact = abs(times - round(times)) < 1e-4
    if everything and factor < 1:
        why = "the denominator counts tokens, pairs or samples more than once" + (
            f" ({round(times)} times)" if exact else ""
        )
    elif everything:
        why = f"tokens, or ranks with the same tokens, count {round(times)} times" if exact else "a scale is missing"
    else:
        why = "their sum over the ranks is missing, or made twice" if exact else "a scale is applied to some only"
    return f"{what} {factor:.6g} times the right ones: {why}."


def _factor(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> float | None:
    """The number c, not 1, with values = c x expected everywhere; None where there is none."""
    values, expected = (torch.cat([each.flatten().double() for each in side]) for side in zip(*pairs, strict=True))
    square = float(expected @ expected)
    if square == 0.0:
        return None
    factor = float(values @ expected) / square
    apart = float((values - factor * expected).abs().max())
    alike = apart <= 10 * TOLERANCE * float(expected.abs().max()) * max(abs(factor), 0.01)
    return factor if alike and abs(factor - 1) > 10 * TOLERANCE and factor != 0.0 else None


def _shares_heads(piece: Range) -> bool:
    return bool(piece.shard.units) and min(piece.shard.units) < piece.cut.tp


def _kv_rows(pieces: Sequence[Range], whole: torch.Tensor) -> bool:
    """Whether only rows of k and v differ."""
    for piece in pieces:
        if ".qkv." not in piece.name:
            return False
        at, values = places_of(piece)
        bad = at[(values - whole[at]).abs() > TOLERANCE * float(whole.abs().max())]
        width = max(torch.Size(piece.whole[1:]).numel(), 1)
        if "q" in parts_touched(piece.shard, ("q", "k", "v"), (bad // width).tolist()):
            return False
    return True
