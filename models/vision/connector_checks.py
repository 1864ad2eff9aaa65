"""Values of `model.vision.connector` that cannot work, as (key, value, reason, way out)."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from models.vision.config import Problem, VisionConfig

MAY_BE_ZERO = ("pad_id",)


def connector_problems(cfg: VisionConfig, width: int) -> list[Problem]:
    """Those of the connector; keys within its section.

    Args:
        width: hidden size of the decoder.
    """
    own = cfg.connector
    counts = [(field.name, getattr(own, field.name)) for field in fields(own)]
    found: list[Problem] = [
        (name, value, "must be at least 1", f"{name}=1 or more")
        for name, value in counts
        if type(value) is int and value < (0 if name in MAY_BE_ZERO else 1)
    ]
    found += [(n, v, "must be above 0", f"{n}=1e-6") for n, v in counts if type(v) is float and v <= 0]
    if found:
        return found
    if own.name == "qformer" and own.hidden_size % own.num_heads:
        near = _nearest(own.num_heads, own.hidden_size)
        reason = f"hidden_size={own.hidden_size} is not shared out evenly over them"
        found.append(("num_heads", own.num_heads, reason, f"num_heads={near}"))
    if own.name == "resampler" and width % own.num_heads:
        near = _nearest(own.num_heads, width)
        reason = f"the decoder's hidden_size={width} is not shared out evenly over them"
        found.append(("num_heads", own.num_heads, reason, f"num_heads={near}"))
    if own.name == "resampler" and width % 4:
        reason = f"its positions tell row and column by sines and cosines, a quarter of model.hidden_size={width} each"
        found.append(("name", own.name, reason, "name=perceiver, or a model.hidden_size that is a multiple of 4"))
    return found


def _nearest(heads: int, size: int) -> int:
    return max(n for n in range(1, min(heads, size) + 1) if size % n == 0)
