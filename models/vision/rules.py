"""Where the weights of a vision tower lie in a Hugging Face checkpoint, as `models.rules` says it of decoders."""

from __future__ import annotations

from collections.abc import Iterator

from models.rules import Concat, Rename, Rule, Unused
from models.vision.config import TowerConfig

BOTH = ("weight", "bias")


def tower_rules(
    cfg: TowerConfig, hf: str, ours: str = "vision.", pooled: bool = False
) -> Iterator[Rule | Unused]:  # fmt: skip
    """Every tensor of a tower.

    Args:
        hf: what the names of the tower's tensors begin with in the checkpoint, with the last dot.
        ours: what ours begin with.
        pooled: the head of a SigLIP, which makes one vector of a picture, has a place of its own.
    """
    if cfg.kind == "intern":
        yield from _intern(cfg, ours, hf)
    elif cfg.native:
        yield from _qwen(cfg, ours, hf)
    else:
        yield from _clip_like(cfg, ours, hf, pooled)


def _renamed(ours: str, hf: str, kinds: tuple[str, ...] = BOTH) -> Iterator[Rule]:
    for kind in kinds:
        yield Rename(f"{ours}.{kind}", f"{hf}.{kind}")


def _clip_like(cfg: TowerConfig, ours: str, hf: str, pooled: bool) -> Iterator[Rule | Unused]:
    """CLIP, SigLIP and BLIP-2's own."""
    first = f"{hf}embeddings."
    yield Rename(f"{ours}patch", f"{first}patch_embedding.weight")
    if cfg.kind != "clip":
        yield Rename(f"{ours}patch_bias", f"{first}patch_embedding.bias")
    if cfg.has_class:
        yield Rename(f"{ours}class_token", f"{first}class_embedding")
    yield Rename(f"{ours}positions", f"{first}position_embedding{'' if cfg.kind == 'blip2' else '.weight'}")
    if cfg.kind == "clip":
        yield from _renamed(f"{ours}pre_norm", f"{hf}pre_layrnorm")
    yield from clip_layers(cfg, ours, hf)
    yield from _renamed(f"{ours}norm", f"{hf}post_layernorm")
    yield Unused(f"{first}position_ids", "numbers from 0 on, in older checkpoints")
    if cfg.kind == "siglip" and not pooled:
        yield Unused(f"{hf}head.", "makes one vector of a picture, where a decoder reads all of its patches")


def clip_layers(cfg: TowerConfig, ours: str, hf: str) -> Iterator[Rule]:
    """The layers of these towers, and of the text encoders beside them."""
    for i in range(cfg.num_layers):
        own, theirs = f"{ours}layers.{i}.", f"{hf}encoder.layers.{i}."
        yield from _renamed(f"{own}attn_norm", f"{theirs}layer_norm1")
        if cfg.kind == "blip2":
            yield from _renamed(f"{own}qkv", f"{theirs}self_attn.qkv", BOTH if cfg.qkv_bias else BOTH[:1])
            yield from _renamed(f"{own}out", f"{theirs}self_attn.projection")
        else:
            yield from _fused(cfg, f"{own}qkv", f"{theirs}self_attn.")
            yield from _renamed(f"{own}out", f"{theirs}self_attn.out_proj")
        yield from _renamed(f"{own}mlp_norm", f"{theirs}layer_norm2")
        yield from _two_layers(own, theirs)


def _intern(cfg: TowerConfig, ours: str, hf: str) -> Iterator[Rule | Unused]:
    first = f"{hf}embeddings."
    yield Rename(f"{ours}class_token", f"{first}cls_token")
    yield Rename(f"{ours}patch", f"{first}patch_embeddings.projection.weight")
    yield Rename(f"{ours}patch_bias", f"{first}patch_embeddings.projection.bias")
    yield Rename(f"{ours}positions", f"{first}position_embeddings")
    yield Unused(f"{first}mask_token", "stands for patches that are hidden in the tower's own pretraining")
    norm = BOTH[:1] if cfg.rms_norm else BOTH
    for i in range(cfg.num_layers):
        own, theirs = f"{ours}layers.{i}.", f"{hf}encoder.layer.{i}."
        yield from _renamed(f"{own}attn_norm", f"{theirs}layernorm_before", norm)
        yield from _fused(cfg, f"{own}qkv", f"{theirs}attention.", BOTH if cfg.qkv_bias else BOTH[:1])
        for part in ("q", "k") if cfg.qk_norm else ():
            yield Rename(f"{own}qk_norm.{part}", f"{theirs}attention.{part}_norm.weight")
        yield from _renamed(f"{own}out", f"{theirs}attention.projection_layer")
        yield Rename(f"{own}attn_scale.weight", f"{theirs}lambda_1")
        yield from _renamed(f"{own}mlp_norm", f"{theirs}layernorm_after", norm)
        yield from _two_layers(own, theirs)
        yield Rename(f"{own}mlp_scale.weight", f"{theirs}lambda_2")
    if cfg.has_norm:
        yield from _renamed(f"{ours}norm", f"{hf}layernorm")


def _qwen(cfg: TowerConfig, ours: str, hf: str) -> Iterator[Rule]:
    yield Rename(f"{ours}patch", f"{hf}patch_embed.proj.weight")
    gated = cfg.kind == "qwen2_5_vl"
    norm = BOTH[:1] if gated else BOTH
    for i in range(cfg.num_layers):
        own, theirs = f"{ours}layers.{i}.", f"{hf}blocks.{i}."
        yield from _renamed(f"{own}attn_norm", f"{theirs}norm1", norm)
        yield from _renamed(f"{own}qkv", f"{theirs}attn.qkv")
        yield from _renamed(f"{own}out", f"{theirs}attn.proj")
        yield from _renamed(f"{own}mlp_norm", f"{theirs}norm2", norm)
        if not gated:
            yield from _two_layers(own, theirs)
            continue
        for kind in BOTH:
            parts = (f"{theirs}mlp.gate_proj.{kind}", f"{theirs}mlp.up_proj.{kind}")
            yield Concat(f"{own}mlp.gate_up.{kind}", parts, (cfg.intermediate_size,) * 2)
        yield from _renamed(f"{own}mlp.down", f"{theirs}mlp.down_proj")


def _fused(cfg: TowerConfig, ours: str, hf: str, kinds: tuple[str, ...] = BOTH) -> Iterator[Rule]:
    for kind in kinds:
        yield Concat(f"{ours}.{kind}", tuple(f"{hf}{x}_proj.{kind}" for x in "qkv"), (cfg.hidden_size,) * 3)


def _two_layers(ours: str, hf: str) -> Iterator[Rule]:
    yield from _renamed(f"{ours}mlp.up", f"{hf}mlp.fc1")
    yield from _renamed(f"{ours}mlp.down", f"{hf}mlp.fc2")
