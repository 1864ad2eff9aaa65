"""Megatron's tensors as rows of Hugging Face tensors: names, fused orders, how each is cut.

The Hugging Face names come from the family's own rules, by Loom's name; here stand only Megatron's name of that tensor
and the order of its rows. Source: Megatron-core's GPTModel (`gpt_layer_specs.py`, `attention.py`, `mlp.py`,
`moe/experts.py`, `multi_latent_attention.py`), read at 0.16.1 and 0.19.2.

Shapes: H query heads, G key/value heads, d head size, F feed-forward size, D hidden size, V vocabulary (padded).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Literal

import torch

from convert.boxes import Meta
from convert.from_hf import weight_rules, whole_shapes
from convert.megatron.layout import Layout
from models.config import ModelConfig
from models.rules import Segment
from parallel.sharding import Shard

Kind = Literal["whole", "rows", "halves", "columns"]
"""How tensor-parallel ranks cut: not at all, equal blocks of rows, gate and up rows each by itself, columns."""


@dataclass(frozen=True)
class Whole:
    """One tensor of Megatron before it is cut."""

    name: str
    """Megatron's name, with `{layer}` and `{expert}` where the number is counted from the chunk's or rank's first."""
    ours: str
    """Loom's name of the same weights (for an expert: of the stack it is in)."""
    segments: tuple[Segment, ...]
    shape: tuple[int, ...]
    shard: Shard
    layer: int | None = None
    """The model's layer it belongs to; None at the ends."""
    expert: int | None = None
    end: Literal["first", "last"] | None = None
    copy: bool = False
    """The last stage's copy of a tied embedding: there where the model is cut into several chunks."""
    zeros_like: tuple[Segment, ...] = ()
    """Of a tensor without segments, which is all zeros: whose dtype it has."""

    def dtype(self, metas: Mapping[str, Meta]) -> torch.dtype:
        """What all its rows can be stored as."""
        return reduce(torch.promote_types, (metas[part.hf].dtype for part in self.segments or self.zeros_like))


@dataclass(frozen=True)
class Name:
    """Megatron's name below a layer, and how it is cut; `local` is the name without Transformer Engine."""

    name: str
    kind: Kind = "whole"
    local: str = ""
    local_kind: Kind | None = None

    def of(self, layout: Layout) -> tuple[str, Kind]:
        """Name and kind in a layout."""
        if layout.implementation == "local":
            return self.local or self.name, self.local_kind or self.kind
        return self.name, self.kind


LAYER = {
    "attn.qkv": Name("self_attention.linear_qkv", "rows"),
    "attn.q_norm": Name("self_attention.q_layernorm"),
    "attn.k_norm": Name("self_attention.k_layernorm"),
    "attn.out": Name("self_attention.linear_proj", "columns"),
    "mlp.gate_up": Name("mlp.linear_fc1", "halves"),
    "mlp.down": Name("mlp.linear_fc2", "columns"),
    "mlp.router": Name("mlp.router"),
    "mlp.shared.gate_up": Name("mlp.shared_experts.linear_fc1", "halves"),
    "mlp.shared.down": Name("mlp.shared_experts.linear_fc2", "columns"),
}
LATENT = {
    "attn.q_down": Name("self_attention.linear_q_down_proj", "whole", local_kind="rows"),
    "attn.kv_down": Name("self_attention.linear_kv_down_proj", "whole", local_kind="rows"),
    "attn.kv_up": Name("self_attention.linear_kv_up_proj", "rows"),
    "attn.out": Name("self_attention.linear_proj", "columns"),
}
NORMS = {
    "attn_norm.weight": Name("self_attention.linear_qkv.layer_norm_weight", local="input_layernorm.weight"),
    "mlp_norm.weight": Name("mlp.linear_fc1.layer_norm_weight", local="pre_mlp_layernorm.weight"),
    "attn.q_norm.weight": Name(
        "self_attention.linear_q_up_proj.layer_norm_weight", local="self_attention.q_layernorm.weight"
    ),
    "attn.kv_norm.weight": Name(
        "self_attention.linear_kv_up_proj.layer_norm_weight", local="self_attention.kv_layernorm.weight"
    ),
}
OWN = {"mlp.router.bias": "mlp.router.expert_bias", "mlp.shared.gate": "mlp.shared_experts.gate_weight"}
EXPERTS = {
    "mlp.experts.gate_up": ("linear_fc1", "halves"),
    "mlp.experts.down": ("linear_fc2", "columns"),
}


def wholes(cfg: ModelConfig, layout: Layout) -> list[Whole]:
    """Every tensor of a model in Megatron's names, in the model's order, each before it is cut."""
    rules, _ = weight_rules(cfg)
    shapes = whole_shapes(cfg)
    padded = layout.padded_vocab(cfg.vocab_size)
    found: list[Whole] = []
    for ours, rule in rules.items():
        shape, segments = shapes[ours], rule.segments(shapes[ours])
        if ours in ("embed.weight", "head.weight"):
            name = "embedding.word_embeddings.weight" if ours == "embed.weight" else "output_layer.weight"
            end = "first" if ours == "embed.weight" else "last"
            found.append(Whole(name, ours, segments, (padded, shape[1]), Shard(0, (padded,)), end=end))
        elif ours == "norm.weight":
            found.append(Whole("decoder.final_layernorm.weight", ours, segments, shape, Shard(), end="last"))
        else:
            _, number, below = ours.split(".", 2)
            found += _of_layer(cfg, layout, int(number), below, ours, segments, shape)
            found += _zero_bias(cfg, layout, int(number), below, segments, shape)
    if cfg.tied_embeddings:
        first = next(whole for whole in found if whole.ours == "embed.weight")
        shared = (first.ours, first.segments, first.shape, first.shard)
        found.append(Whole("output_layer.weight", *shared, end="last", copy=True))
    return found


def _of_layer(
    cfg: ModelConfig,
    layout: Layout,
    layer: int,
    below: str,
    ours: str,
    segments: tuple[Segment, ...],
    shape: tuple[int, ...],
) -> Iterator[Whole]:
    prefix = "decoder.layers.{layer}."
    if below in EXPERTS:
        yield from _experts(layout, prefix, layer, below, ours, segments, shape)
        return
    name, kind = _named(cfg, layout, layer, below)
    if below.startswith("attn.qkv."):
        segments = query_groups(cfg, segments)
    if below.endswith(".bias") and kind == "columns":
        kind = "whole"  # a row-parallel layer's bias is added once, after the sum
    yield Whole(prefix + name, ours, segments, shape, _shard(kind, shape), layer)


def _zero_bias(
    cfg: ModelConfig, layout: Layout, layer: int, below: str, segments: tuple[Segment, ...], shape: tuple[int, ...]
) -> Iterator[Whole]:
    """Megatron has biases in all linear layers or in none (q, k and v apart): those this model lacks, as zeros."""
    lacking = {
        "attn.qkv.weight": cfg.qkv_bias,
        "attn.out.weight": cfg.attention_out_bias,
        "mlp.gate_up.weight": cfg.mlp_bias,
        "mlp.down.weight": cfg.mlp_bias,
    }
    if lacks_biases(cfg) and not has_no_bias_form(cfg) and not lacking.get(below, True):
        name, kind = LAYER[below.removesuffix(".weight")].of(layout)
        shard = _shard("whole" if kind == "columns" else kind, shape[:1])
        yield Whole("decoder.layers.{layer}." + f"{name}.bias", "", (), shape[:1], shard, layer, zeros_like=segments)


def lacks_biases(cfg: ModelConfig) -> bool:
    """Whether Megatron would look for biases in linear layers that have none in this model."""
    some = cfg.attention_out_bias or cfg.mlp_bias
    return some and not (cfg.qkv_bias and cfg.attention_out_bias and cfg.mlp_bias)


def has_no_bias_form(cfg: ModelConfig) -> str:
    """Why the biases of a model have no place in Megatron's own formats; empty where they have one."""
    if cfg.mla and (cfg.qkv_bias or cfg.attention_out_bias):
        return "the model has biases in its latent attention, for which Megatron has no place"
    if cfg.moe and (cfg.attention_out_bias or cfg.mlp_bias):
        return "the model has biases in its attention and none in its router and experts; Megatron has all or none"
    return ""


def _named(cfg: ModelConfig, layout: Layout, layer: int, below: str) -> tuple[str, Kind]:
    if below in OWN:
        return OWN[below], "whole"
    # Transformer Engine fuses a norm into the linear layer after it, where that is one layer.
    if below == "attn_norm.weight" and cfg.mla:
        return "input_layernorm.weight", "whole"
    if below == "mlp_norm.weight" and cfg.is_moe(layer):
        return "pre_mlp_layernorm.weight", "whole"
    if below in NORMS and not (below == "attn.q_norm.weight" and not cfg.mla):
        return NORMS[below].of(layout)
    module, _, part = below.rpartition(".")
    if module == "attn.q_up":
        assert cfg.mla is not None
        return f"self_attention.linear_q_{'up_' if cfg.mla.q_rank else ''}proj.{part}", "rows"
    name, kind = ((LATENT if cfg.mla else {}).get(module) or LAYER[module]).of(layout)
    return f"{name}.{part}", kind


def _experts(
    layout: Layout,
    prefix: str,
    layer: int,
    below: str,
    ours: str,
    segments: tuple[Segment, ...],
    shape: tuple[int, ...],
) -> Iterator[Whole]:
    linear, kind = EXPERTS[below]
    form = "mlp.experts.local_experts.{expert}.%s.weight" if layout.experts == "sequential" else (
        "mlp.experts.%s.weight{expert}"
    )  # fmt: skip
    each = len(segments) // shape[0]
    for expert in range(shape[0]):
        own = segments[expert * each : (expert + 1) * each]
        shard = _shard("halves" if kind == "halves" else "columns", shape[1:])
        yield Whole(prefix + form % linear, ours, own, shape[1:], shard, layer, expert)


def _shard(kind: Kind, shape: tuple[int, ...]) -> Shard:
    if kind == "whole":
        return Shard()
    if kind == "columns":
        return Shard(1, (shape[1],))
    return Shard(0, (shape[0] // 2,) * 2 if kind == "halves" else (shape[0],))


def query_groups(cfg: ModelConfig, segments: tuple[Segment, ...]) -> tuple[Segment, ...]:
    """q, k and v rows as Megatron fuses them: for each key/value head its query heads, the key head, the value head."""
    q, k, v = (segment.hf for segment in segments)
    size, heads = cfg.head_dim, cfg.num_heads // cfg.num_kv_heads
    fused: list[Segment] = []
    for group in range(cfg.num_kv_heads):
        fused.append(Segment(q, group * heads * size, (group + 1) * heads * size))
        fused += [Segment(kv, group * size, (group + 1) * size) for kv in (k, v)]
    return tuple(fused)
