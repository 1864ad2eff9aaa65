"""Per-channel numbers of a global batch, merged over ranks whose channels may differ."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

Sums = dict[str, tuple[float, float]]
"""channel -> (sum of token losses, number of tokens)"""


def local_sums(terms: Sequence[torch.Tensor], names: Sequence[str]) -> Sums:
    """Sums of this rank's micro-batches for the channels that occur in them; none from a rank that does not report.

    Args:
        terms: one [C, 2] tensor for each micro-batch: loss sum and token count by channel.
        names: the C channel names.
    """
    if not terms:
        return {}
    total_C2 = torch.stack(list(terms)).sum(0).tolist()
    return {name: (loss, count) for name, (loss, count) in zip(names, total_C2, strict=True) if count > 0}


def merge(parts: Sequence[Sums]) -> Sums:
    """Add up what the ranks saw; a channel absent on some ranks is no trouble. Sorted by name."""
    merged: Sums = {}
    for part in parts:
        for name, (loss, count) in part.items():
            had = merged.get(name, (0.0, 0.0))
            merged[name] = (had[0] + loss, had[1] + count)
    return dict(sorted(merged.items()))


def metrics(
    terms: Sequence[torch.Tensor], names: Sequence[str], all_gather: Callable[[Sums], list[Sums]], prefix: str
) -> dict[str, float]:
    """Token-exact losses over all ranks, overall and by channel, ready to log.

    Args:
        prefix: ``train`` gives ``train/loss`` and ``channel/<name>/…``; ``eval`` gives ``eval/loss``,
            ``eval/perplexity`` and ``eval/<name>/…``.
    """
    sums = merge(all_gather(local_sums(terms, names)))
    count = sum(c for _, c in sums.values())
    loss = sum(s for s, _ in sums.values()) / max(count, 1.0)
    out = {f"{prefix}/loss": loss, f"{prefix}/tokens": count}
    if prefix == "eval":
        out["eval/perplexity"] = perplexity(loss)
    for name, (total, tokens) in sums.items():
        key = f"channel/{name}" if prefix == "train" else f"{prefix}/{name}"
        out[f"{key}/loss"], out[f"{key}/tokens"] = total / tokens, tokens
        if prefix == "eval":
            out[f"{key}/perplexity"] = perplexity(total / tokens)
    return out


def perplexity(loss: float) -> float:
    """exp(loss) with an overflow shown as infinity; a loss that is no number stays one."""
    return math.inf if loss >= 700 else math.exp(loss)
