"""The engine section: how the model is run, never what it computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class EngineConfig:
    """How one training step is carried out by DeepSpeed and the layers."""

    zero: Literal[0, 1, 2, 3] = 1
    """ZeRO stage: 0 replicates all, 1 shards optimizer states, 2 also gradients, 3 also parameters."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Compute type. Weights, gradients and optimizer states stay fp32; bf16 and fp16 run under autocast."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation checkpointing: nothing, the cheap element-wise parts, or whole layers."""
    attention: Literal["sdpa", "flash_attn", "eager"] = "sdpa"
    """Attention back end."""
    offload_optimizer: bool = False
    """Keep optimizer states and their update in host memory (ZeRO 1-3)."""
    loss_chunk: int | None = None
    """Tokens whose fp32 logits exist at the same time in the loss; null = as many as fit a fixed budget of memory."""
    bucket_mib: int | None = None
    """Size of a gradient or parameter bucket on the wire, in MiB; null = 8 on a CPU, 128 on a GPU."""

    def problems(self) -> list[tuple[str, object, str, str]]:
        """Values wrong in themselves, as (key, value, reason, way out)."""
        found: list[tuple[str, object, str, str]] = []
        for key in ("loss_chunk", "bucket_mib"):
            value = getattr(self, key)
            if value is not None and value < 1:
                found.append((f"engine.{key}", value, "must be at least 1", f"engine.{key}=null"))
        if self.offload_optimizer and self.zero == 0:
            found.append(
                (
                    "engine.offload_optimizer",
                    True,
                    "DeepSpeed offloads only partitioned optimizer states, and engine.zero=0 does not partition",
                    "engine.zero=1",
                )
            )
        return found
