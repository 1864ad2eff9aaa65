"""Per-channel numbers of a global batch, merged over ranks whose channels may differ.

Legend: C channels, K columns, X tokens, documents or pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True)
class Column:
    """A number that a stage reports of every channel."""

    name: str
    over: str | None = None
    """The column it is divided by when it is shown: a loss over tokens, a margin over pairs."""
    reduce: Literal["sum", "max", "min"] = "sum"
    """How those of several micro-batches and ranks become one."""

    @property
    def nothing(self) -> float:
        """What a channel has that did not occur."""
        return {"sum": 0.0, "max": -math.inf, "min": math.inf}[self.reduce]

    def join(self, a: float, b: float) -> float:
        """Two parts as one."""
        return a + b if self.reduce == "sum" else max(a, b) if self.reduce == "max" else min(a, b)


TOKEN_LOSS = (Column("loss", over="tokens"), Column("tokens"))
Sums = dict[str, tuple[float, ...]]
"""channel -> its columns"""


def by_channel(terms: Sequence[torch.Tensor], channel_X: torch.Tensor, num_channels: int) -> torch.Tensor:
    """Sums by channel, float64 [C, K], of K terms [X] (of tokens, documents or pairs)."""
    terms_XK = torch.stack([term.detach().double() for term in terms], dim=1)
    sums_CK = torch.zeros(num_channels, len(terms), dtype=torch.float64, device=terms_XK.device)
    return sums_CK.index_add_(0, channel_X, terms_XK)


def extremes(x_X: torch.Tensor, channel_X: torch.Tensor, num_channels: int, column: Column) -> torch.Tensor:
    """The largest or smallest of each channel, float64 [C], for a column that is one."""
    out_C = torch.full((num_channels,), column.nothing, dtype=torch.float64, device=x_X.device)
    kind = "amax" if column.reduce == "max" else "amin"
    return out_C.scatter_reduce_(0, channel_X, x_X.detach().double(), kind)


def local_sums(terms: Sequence[torch.Tensor], names: Sequence[str], columns: Sequence[Column] = TOKEN_LOSS) -> Sums:
    """Columns of this rank's micro-batches for the channels that occur in them; none from a rank that does not report.

    Args:
        terms: one [C, K] tensor for each micro-batch.
        names: the C channel names.
    """
    if not terms:
        return {}
    stacked = torch.stack(list(terms))
    joined = [
        stacked[:, :, k].sum(0) if each.reduce == "sum" else getattr(stacked[:, :, k], f"a{each.reduce}")(0)
        for k, each in enumerate(columns)
    ]
    rows = torch.stack(joined, 1).tolist()
    counts = [k for k, each in enumerate(columns) if each.name in {other.over for other in columns}]
    return {name: tuple(row) for name, row in zip(names, rows, strict=True) if any(row[k] > 0 for k in counts)}


def merge(parts: Sequence[Sums], columns: Sequence[Column] = TOKEN_LOSS) -> Sums:
    """Join what the ranks saw; a channel absent on some ranks is no trouble. Sorted by name."""
    merged: Sums = {}
    for part in parts:
        for name, row in part.items():
            had = merged.get(name, [each.nothing for each in columns])
            merged[name] = tuple(each.join(a, b) for each, a, b in zip(columns, had, row, strict=True))
    return dict(sorted(merged.items()))


def metrics(
    terms: Sequence[torch.Tensor],
    names: Sequence[str],
    all_gather: Callable[[Sums], list[Sums]],
    prefix: str,
    columns: Sequence[Column] = TOKEN_LOSS,
) -> dict[str, float]:
    """Exact numbers over all ranks, overall and by channel, ready to log.

    Args:
        prefix: ``train`` gives ``train/loss`` and ``channel/<name>/…``; ``eval`` gives ``eval/loss`` and
            ``eval/<name>/…``. Losses of tokens have a perplexity too in ``eval``.
    """
    sums = merge(all_gather(local_sums(terms, names, columns)), columns)
    whole = [each.nothing for each in columns]
    for row in sums.values():
        whole = [each.join(a, b) for each, a, b in zip(columns, whole, row, strict=True)]
    out = _shown(whole, columns, prefix, prefix == "eval")
    for name, row in sums.items():
        out |= _shown(row, columns, f"channel/{name}" if prefix == "train" else f"{prefix}/{name}", prefix == "eval")
    return out


def _shown(row: Sequence[float], columns: Sequence[Column], key: str, held_out: bool) -> dict[str, float]:
    """One channel's columns as metrics, without the extremes of nothing."""
    at = {each.name: value for each, value in zip(columns, row, strict=True)}
    out: dict[str, float] = {}
    for each in columns:
        value, below = at[each.name], 1.0 if each.over is None else at[each.over]
        if each.reduce == "sum" or value != each.nothing:
            out[f"{key}/{each.name}"] = value / below if below else 0.0
    if held_out and columns[:2] == TOKEN_LOSS:
        out[f"{key}/perplexity"] = perplexity(out[f"{key}/loss"])
    return out


def perplexity(loss: float) -> float:
    """exp(loss) with an overflow shown as infinity; a loss that is no number stays one."""
    return math.inf if loss >= 700 else math.exp(loss)
