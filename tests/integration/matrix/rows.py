"""The layouts the matrix runs, as data: each row is trained and compared with one process.

A row is legal: ``tests/unit/trainer/test_layouts.py`` holds every one to the rules that refuse layouts before start.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, field
from typing import Any

from models import ModelConfig
from models.parts import ALL, LayeredPartConfig, PartConfig, PartsConfig
from models.vision.config import (
    CrossConfig,
    ImageConfig,
    MergerConfig,
    ProjectorConfig,
    QFormerConfig,
    TowerConfig,
    VisionConfig,
)
from parallel.config import ParallelConfig
from scripts.params import load_model
from tests.cases import Rows

MOE_LOSSES = ["moe.balance_loss=0.1", "moe.z_loss=0.01"]
MODELS: dict[str, tuple[str, list[str]]] = {
    "llama": ("tiny_llama", []),
    "llama_odd_vocab": ("tiny_llama", ["vocab_size=509", "num_layers=4"]),
    "llama_deep": ("tiny_llama", ["num_layers=8", "tied_embeddings=true"]),
    "llama_biases": ("tiny_llama", ["qkv_bias=true", "attention_out_bias=true", "mlp_bias=true", "num_layers=4"]),
    "llama_spread": ("tiny_llama", ["init_std=0.06"]),
    "llama_one_kv": ("tiny_llama", ["num_kv_heads=1"]),
    "qwen2": ("tiny_qwen2", []),
    "qwen3": ("tiny_qwen3", []),
    "qwen2_vl": ("tiny_qwen2_vl", []),
    "mixtral": ("tiny_mixtral", MOE_LOSSES),
    "mixtral_sequence": ("tiny_mixtral", [*MOE_LOSSES, "moe.balance_over=sequence"]),
    "qwen2_moe": ("tiny_qwen2_moe", MOE_LOSSES),
    "qwen3_moe": ("tiny_qwen3_moe", MOE_LOSSES),
    "deepseek_v2": ("tiny_deepseek_v2", MOE_LOSSES),
    "deepseek_v3": ("tiny_deepseek_v3", ["moe.bias_rate=0.001"]),
}


_TOWER: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_layers": 3, "num_heads": 4, "patch_size": 4}
VISION = {
    "tiles": VisionConfig(
        "loom", TowerConfig("clip", image_size=8, feature_layer=-2, **_TOWER), ProjectorConfig("mlp"), ImageConfig()
    ),
    "queries": VisionConfig(
        "loom",
        TowerConfig("siglip", image_size=8, **_TOWER),
        QFormerConfig(queries=3, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4),
        ImageConfig(),
    ),
    "native": VisionConfig(
        "loom",
        TowerConfig("qwen2_5_vl", frames=2, window_size=16, full_layers=(1,), activation="silu", **_TOWER),
        MergerConfig(),
        ImageConfig("native"),
    ),
    "gated": VisionConfig(
        "loom",
        TowerConfig("siglip", image_size=8, **_TOWER),
        ProjectorConfig("mlp"),
        ImageConfig(),
        CrossConfig(48, 1, 4, 8),
    ),
}
"""What a model of the matrix sees with, by the pictures it is shown (``tests.cases.Rows``)."""
VISION["turned"] = VISION["native"]


@functools.cache
def model_of(name: str) -> ModelConfig:
    """The sizes of a model of the matrix: one of ``MODELS``, or with ``_sees_`` one of ``VISION`` besides."""
    decoder, _, sees = name.partition("_sees_")
    yaml, overrides = MODELS[decoder]
    cfg = load_model(yaml, overrides)
    return dataclasses.replace(cfg, vision=VISION[sees]) if sees else cfg


@dataclass(frozen=True)
class Row:
    """One training: which model, on how many processes, laid out how."""

    model: str
    processes: int
    layout: ParallelConfig = field(default_factory=ParallelConfig)
    zero: int = 1
    recompute: str = "none"
    rows: Rows = field(default_factory=Rows)
    micro_rows: int = 1
    parts: PartsConfig = ALL

    @property
    def id(self) -> str:
        """A short name: what differs from the defaults."""
        plain = ParallelConfig()
        parts = [f"{key}={value}" for key, value in vars(self.layout).items() if value != getattr(plain, key)]
        parts += [f"zero{self.zero}"] if self.zero != 1 else []
        parts += [self.recompute] if self.recompute != "none" else []
        parts += ["unpacked"] if not self.rows.packed else []
        parts += ["pretrain"] if self.rows.pretrain else []
        parts += ["alike"] if self.rows.alike else []
        parts += ["parts"] if self.parts != ALL else []
        return f"{self.model}-{self.processes}-{','.join(parts)}"


def row(
    model: str,
    processes: int,
    *,
    zero: int = 1,
    recompute: str = "none",
    micro: int = 1,
    parts: PartsConfig = ALL,
    **layout: Any,
) -> Row:
    """A row from keywords; ``packed`` and ``pretrain`` are of the data, the rest of the layout."""
    given: dict[str, Any] = {key: layout.pop(key) for key in ("packed", "pretrain", "alike") if key in layout}
    kind = Rows(**given, pictures=model.partition("_sees_")[2] or None)  # pyright: ignore[reportArgumentType]
    return Row(model, processes, ParallelConfig(**layout), zero, recompute, kind, micro, parts)


SP: dict[str, Any] = {"sequence_parallel": True}
FROZEN = LayeredPartConfig(train=False)
CONNECTOR = PartsConfig(vision=FROZEN, decoder=FROZEN)
LAST = PartsConfig(LayeredPartConfig(True, 0.5, 1), PartConfig(True, 2.0), LayeredPartConfig(last_layers=1))
LAST_LAYER = PartsConfig(decoder=LayeredPartConfig(last_layers=1))
ROWS = [
    # tensor and sequence parallel, every ZeRO stage, recompute, heads fewer than ranks, padded vocabulary
    row("llama", 2, tp=2, zero=0, micro=4),
    row("llama_odd_vocab", 2, tp=2, **SP, zero=2, micro=4),
    row("llama", 4, tp=4, zero=3, micro=4),
    row("llama_one_kv", 4, tp=4, **SP, micro=4),
    row("llama_biases", 4, tp=2, **SP, zero=3, recompute="selective", micro=2),
    row("qwen2", 2, tp=2, **SP, recompute="full", micro=4),
    row("qwen3", 4, tp=2, **SP, zero=2, pretrain=True, micro=2),
    row("deepseek_v2", 2, tp=2, **SP, micro=4),
    row("deepseek_v3", 4, tp=2, zero=3, micro=2),
    # pipelines
    row("llama_deep", 2, pp=2, schedule="gpipe"),
    row("llama_deep", 2, pp=2, zero=0, packed=False),
    row("llama_deep", 2, pp=2, schedule="interleaved", recompute="full"),
    row("llama_deep", 2, pp=2, schedule="zero_bubble"),
    row("llama_deep", 2, pp=2, schedule="zbv"),
    row("llama_deep", 4, pp=4, schedule="zbv"),
    row("llama_deep", 4, pp=2, schedule="interleaved", vpp=4, micro=1),
    row("llama_deep", 4, pp=2, tp=2, **SP, schedule="zero_bubble"),
    row("llama_biases", 4, pp=4, stage_layers=(1, 1, 1, 1), recompute="selective"),
    row("qwen3", 2, pp=2, pretrain=True),
    row("mixtral", 2, pp=2),
    row("deepseek_v3", 2, pp=2),
    # context parallel
    row("llama", 2, cp=2, zero=3, micro=2),
    row("llama", 2, cp=2, context="ulysses", recompute="full", micro=4),
    row("qwen3", 4, cp=4, micro=4, packed=False),
    row("llama_biases", 4, cp=2, tp=2, **SP, micro=2),
    row("llama_deep", 4, cp=2, pp=2, schedule="zbv"),
    row("qwen3_moe", 4, cp=2, ep=4, micro=2),
    row("mixtral_sequence", 2, cp=2, micro=2),
    # experts
    row("mixtral", 2, ep=2, zero=2, micro=2),
    row("mixtral_sequence", 4, ep=2, tp=2, **SP, micro=2),
    row("mixtral", 2, zero=3, micro=2),
    row("qwen2_moe", 2, ep=2, recompute="full", micro=2),
    row("qwen3_moe", 4, ep=2, pp=2),
    row("qwen3_moe", 4, ep=4, zero=0, micro=1),
    row("deepseek_v2", 4, ep=2, recompute="selective", micro=2),
    row("deepseek_v3", 4, ep=2, tp=2, **SP, zero=2, micro=2),
    # two different tokens only: most experts get none, on most ranks
    row("qwen3_moe", 2, zero=3, alike=True, micro=2),
    row("qwen3_moe", 4, ep=4, alike=True, zero=2, micro=2),
    row("deepseek_v3", 4, ep=2, pp=2, alike=True),
    # models that see: a rank, a micro-batch or a whole step has no picture, others many
    row("llama_sees_tiles", 2, tp=2, **SP, zero=0, recompute="full", micro=2),
    row("llama_sees_tiles", 2, zero=3, micro=1),
    row("llama_sees_queries", 4, tp=2, pp=2, zero=1),
    row("llama_deep_sees_tiles", 2, pp=2, stage_layers=(0, 8)),
    row("llama_deep_sees_native", 2, pp=2, schedule="interleaved"),
    row("llama_sees_native", 2, zero=2, micro=2),
    row("mixtral_sees_queries", 2, ep=2, zero=2, micro=2),
    row("llama_spread_sees_gated", 2, tp=2, **SP, zero=0, recompute="full", micro=2),
    row("llama_spread_sees_gated", 2, zero=3, micro=1),
    # positions of time, row and column, which every stage needs; videos
    row("qwen2_vl_sees_turned", 2, pp=2),
    row("qwen2_vl_sees_turned", 2, zero=3, micro=2),
    row("qwen2_vl_sees_turned", 2, tp=2, **SP, zero=0, recompute="full", micro=2),
    # parts of them trained: nothing below or nothing above what is, one layer, several rates
    row("llama_sees_tiles", 2, zero=3, parts=CONNECTOR),
    row("llama_sees_queries", 2, tp=2, **SP, zero=0, micro=2, parts=CONNECTOR),
    row("llama_spread_sees_gated", 2, zero=3, recompute="full", parts=CONNECTOR),
    row("llama_sees_tiles", 2, zero=3, recompute="full", parts=LAST),
    row("llama_sees_tiles", 4, tp=2, **SP, pp=2, parts=LAST),
    row("llama_deep", 2, pp=2, schedule="zero_bubble", parts=LAST_LAYER),
    row("llama_deep", 2, zero=3, parts=LAST_LAYER),
    # all of it
    row("llama_deep", 8, tp=2, **SP, pp=2, cp=2, schedule="interleaved"),
    row("mixtral", 8, tp=2, **SP, pp=2, ep=2),
    row("qwen3_moe", 8, tp=2, **SP, cp=2, ep=4, micro=2),
]
