"""The engine section: how the model is run, never what it computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ParallelConfig:
    """How the model and the tokens are laid over the processes. What is left over is data parallel."""

    tp: int = 1
    """Tensor parallel: ranks that share every layer, by heads, feed-forward and vocabulary."""
    sequence_parallel: bool = False
    """Between those layers every tp rank keeps its share of the rows only: less memory, the same bytes on the wire."""
    pp: int = 1
    """Pipeline parallel: ranks that hold consecutive layers."""
    schedule: Literal["gpipe", "1f1b", "interleaved", "zero_bubble", "zbv"] = "1f1b"
    """Order of the micro-batches in the pipeline; the last three give each rank several stages."""
    vpp: int | None = None
    """Stages of each pipeline rank; null = 2 for interleaved, zero_bubble and zbv, 1 otherwise."""
    stage_layers: tuple[int, ...] | None = None
    """Layers of each stage in the order of the model; null balances them by cost."""
    cp: int = 1
    """Context parallel: ranks that share the tokens of a micro-batch."""
    context: Literal["ulysses", "ring"] = "ring"
    """How cp ranks attend to each other: all-to-all over heads, or keys and values passed round."""
    ep: int = 1
    """Expert parallel: ranks, among those with different tokens, that share the experts."""

    @property
    def stages_per_rank(self) -> int:
        """Stages of each pipeline rank."""
        if self.vpp is not None:
            return self.vpp
        return 2 if self.schedule in ("interleaved", "zero_bubble", "zbv") and self.pp > 1 else 1

    @property
    def model_ranks(self) -> int:
        """Ranks that together compute one micro-batch."""
        return self.tp * self.pp * self.cp

    def problems(self) -> list[tuple[str, object, str, str]]:
        """Values wrong in themselves, as (key, value, reason, way out)."""
        return [
            (f"parallel.{key}", getattr(self, key), "must be at least 1", f"parallel.{key}=1")
            for key in ("tp", "pp", "cp", "ep", "vpp")
            if getattr(self, key) is not None and getattr(self, key) < 1
        ]


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
