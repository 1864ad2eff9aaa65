"""Whether documents of a micro-batch may have what they begin with in common once (``models.blocks.branches``)."""

from __future__ import annotations

from models.config import ModelConfig
from parallel.config import ParallelConfig

Fault = tuple[str, object, str, str]
"""key, value, why not, way out"""


def sharing_fault(model: ModelConfig, layout: ParallelConfig) -> Fault | None:
    """What keeps documents from sharing their beginning with the same result; None where they may."""
    if layout.cp > 1:
        return "parallel.cp", layout.cp, "cuts each document for itself", "parallel.cp=1"
    if model.rope.scaling == "dynamic":
        reason = "turns keys by the length of their own document"
        return "model.rope.scaling", "dynamic", reason, "another model.rope.scaling"
    if model.moe is not None:
        reason = "has routers, which would count a token once that belongs to several documents"
        return "model.moe", "set", reason, "a model without experts"
    if model.vision is not None and model.vision.cross is not None:
        reason = "has each token read the pictures before it, and those of a beginning are one document's alone"
        return "model.vision.cross", "set", reason, "a model whose features stand among the tokens"
    return None
