"""Optimizer section: AdamW, its decay groups and the learning-rate schedules."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from models.parts import PartsConfig, lr_scale_of


@dataclass(frozen=True)
class OptimConfig:
    """AdamW (Loshchilov & Hutter 2019) and its schedule. Steps are optimizer steps."""

    lr: float = 1e-4
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the first and second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices; norms and biases are never decayed."""
    clip: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    """Shape of the learning rate after the warm-up."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0."""
    decay_steps: int = 0
    """Length of the final decay, only for schedule=wsd (warm-up, stable, decay)."""
    min_lr_ratio: float = 0.1
    """Final learning rate as a fraction of the peak (linear, cosine, wsd)."""
    parts: PartsConfig = field(default_factory=PartsConfig)
    """What of the model is trained, and how fast."""

    def problems(self) -> list[tuple[str, object, str, str]]:
        """Values wrong in themselves, as (key, value, reason, way out)."""
        rules = [
            ("lr", self.lr > 0, "a learning rate is above 0", "optim.lr=1e-4"),
            ("eps", self.eps > 0, "must be above 0", "optim.eps=1e-8"),
            ("weight_decay", self.weight_decay >= 0, "cannot be negative", "optim.weight_decay=0"),
            ("clip", self.clip >= 0, "cannot be negative", "optim.clip=0 turns clipping off"),
            ("betas", all(0 <= b < 1 for b in self.betas), "each lies in [0, 1)", "optim.betas=[0.9,0.95]"),
            ("warmup_steps", self.warmup_steps >= 0, "cannot be negative", "optim.warmup_steps=0"),
            ("decay_steps", self.decay_steps >= 0, "cannot be negative", "optim.decay_steps=0"),
            ("min_lr_ratio", 0 <= self.min_lr_ratio <= 1, "is a fraction of the peak", "optim.min_lr_ratio=0.1"),
        ]
        found: list[tuple[str, object, str, str]] = [
            (f"optim.{key}", getattr(self, key), why, way) for key, good, why, way in rules if not good
        ]
        return found + [(f"optim.{key}", value, why, way) for key, value, why, way in self.parts.problems()]

    def lr_at(self, step: int, total_steps: int) -> float:
        """Learning rate of optimizer step ``step`` (from 0) in a run of ``total_steps``.

        Warm-up reaches the peak on its last step, so step 0 never has rate 0. The decaying schedules reach
        ``min_lr_ratio`` on the last step. WSD: Hu et al. 2024 (MiniCPM), linear tail.
        """
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.lr
        start = max(total_steps - self.decay_steps, self.warmup_steps) if self.schedule == "wsd" else self.warmup_steps
        span = max(total_steps - 1 - start, 1)
        done = min(max(step - start, 0) / span, 1.0)
        shape = 0.5 * (1 + math.cos(math.pi * done)) if self.schedule == "cosine" else 1 - done
        return self.lr * (self.min_lr_ratio + (1 - self.min_lr_ratio) * shape)


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Optimizer groups: matrices with decay, vectors (norms, biases) without, and experts that are dealt out over
    ranks by themselves, since DeepSpeed cuts their states over other ranks. Each by its learning rate (``lr_scale``).

    Called before ZeRO-3 partitions the parameters or after; the rank of the whole tensor decides, which DeepSpeed
    keeps as ``ds_shape`` on a partitioned parameter.
    """
    kinds: dict[tuple[str, float], list[nn.Parameter]] = {}
    for param in model.parameters():
        if param.requires_grad:
            matrix = len(getattr(param, "ds_shape", param.shape)) > 1
            kind = "experts" if "group_name" in vars(param) else "matrices" if matrix else "vectors"
            kinds.setdefault((kind, lr_scale_of(param)), []).append(param)
    order = ("matrices", "vectors", "experts")
    groups: list[dict[str, object]] = []
    for kind, scale in sorted(kinds, key=lambda key: order.index(key[0])):
        params = kinds[kind, scale]
        decay = 0.0 if kind == "vectors" else weight_decay
        group: dict[str, object] = {"params": params, "weight_decay": decay, "lr_scale": scale}
        groups.append(group | ({"moe": True, "name": vars(params[0])["group_name"]} if kind == "experts" else {}))
    return groups
