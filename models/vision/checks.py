"""Values of the section `model.vision` that cannot work, as (key, value, reason, way out)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from models.vision.connector_checks import connector_problems
from models.vision.image_checks import image_problems

if TYPE_CHECKING:
    from models.vision.config import Problem, TowerConfig, VisionConfig

OWNERS: dict[str, tuple[tuple[str, ...], object, str]] = {
    "qk_norm": (("intern",), False, "false"),
    "rms_norm": (("intern",), False, "false"),
    "qkv_bias": (("intern", "blip2"), True, "true"),
    "keep_class": (("clip", "intern", "blip2"), False, "false"),
    "final_norm": (("clip", "siglip", "intern", "blip2"), False, "false"),
    "frames": (("qwen2_vl", "qwen2_5_vl"), 1, "1"),
    "window_size": (("qwen2_5_vl",), None, "null"),
    "full_layers": (("qwen2_5_vl",), (), "[]"),
}
"""Fields that only some kinds of tower know, and what the others have."""


def vision_problems(cfg: VisionConfig, width: int) -> list[Problem]:
    """Those of the tower, of the connector, of the pictures, and of several together; `width` is the decoder's."""
    found = [
        (f"vision.tower.{key}", value, reason, f"model.vision.tower.{way}")
        for key, value, reason, way in tower_problems(cfg.tower, cfg.connector.block)
    ]
    found += [
        (f"vision.connector.{key}", value, reason, f"model.vision.connector.{way}")
        for key, value, reason, way in connector_problems(cfg, width)
    ]
    native = cfg.images.mode == "native"
    if native != cfg.tower.native:
        size = "its tiles have one size" if native else "its tiles have sizes of their own"
        ways = ("fixed, anyres or tiles", "native")
        reason = f"is not for a tower of kind {cfg.tower.kind}: {size}"
        found.append(("vision.images.mode", cfg.images.mode, reason, f"model.vision.images.mode={ways[not native]}"))
    if cfg.tower.keep_class and (cfg.connector.block > 1 or cfg.connector.name == "resampler"):
        reason = f"is a feature at no place, and the connector {cfg.connector.name} asks where each one is"
        found.append(("vision.tower.keep_class", True, reason, "model.vision.tower.keep_class=false"))
    found += cross_problems(cfg)
    return found + [
        (f"vision.images.{key}", value, reason, f"model.vision.images.{way}")
        for key, value, reason, way in image_problems(cfg)
    ]


def cross_problems(cfg: VisionConfig) -> list[Problem]:
    """Those of the layers that read features."""
    cross = cfg.cross
    if cross is None:
        return []
    found: list[Problem] = [
        (f"vision.cross.{key}", getattr(cross, key), "must be at least 1", f"model.vision.cross.{key}=1 or more")
        for key in ("intermediate_size", "every", "num_heads", "head_dim")
        if getattr(cross, key) < 1
    ]
    if cross.norm_eps <= 0:
        found.append(("vision.cross.norm_eps", cross.norm_eps, "must be above 0", "model.vision.cross.norm_eps=1e-5"))
    if cfg.format != "loom":
        reason = f"checkpoints of {cfg.format} have no layers in the decoder that read features"
        way = "model.vision.format=loom, or model.vision.cross=null"
        found.append(("vision.cross", "a section", reason, way))
    return found


def tower_problems(cfg: TowerConfig, block: int) -> list[Problem]:
    """Those of a tower, keys within its section.

    Args:
        block: side of the blocks of patches that become one feature.
    """
    sizes = ("hidden_size", "intermediate_size", "num_layers", "num_heads", "patch_size", "frames")
    found: list[Problem] = [
        (key, getattr(cfg, key), "must be at least 1", f"{key}=1 or more") for key in sizes if getattr(cfg, key) < 1
    ]
    if cfg.norm_eps <= 0:
        found.append(("norm_eps", cfg.norm_eps, "must be above 0", "norm_eps=1e-6"))
    for key, (kinds, other, way) in OWNERS.items():
        if cfg.kind not in kinds and getattr(cfg, key) != other:
            reason = (
                f"a tower of kind {cfg.kind} has no such thing ({', '.join(kinds)} {'have' if kinds[1:] else 'has'} it)"
            )
            found.append((key, getattr(cfg, key), reason, f"{key}={way}"))
    if found:
        return found
    return _head_problems(cfg) + _layer_problems(cfg) + (_window_problems if cfg.native else _tile_problems)(cfg, block)


def _head_problems(cfg: TowerConfig) -> list[Problem]:
    size, heads = cfg.hidden_size, cfg.num_heads
    if size % heads:
        near = max(n for n in range(1, min(heads, size) + 1) if size % n == 0)
        return [("num_heads", heads, f"hidden_size={size} is not shared out evenly over them", f"num_heads={near}")]
    if cfg.native and cfg.head_dim % 4:
        reason = f"heads of hidden_size / num_heads = {cfg.head_dim} do not turn in pairs, half by row, half by column"
        return [("num_heads", heads, reason, "heads whose size is a multiple of 4")]
    if cfg.kind == "qwen2_5_vl" and cfg.activation != "silu":
        return [("activation", cfg.activation, "the gate of a tower of kind qwen2_5_vl is silu", "activation=silu")]
    return []


def _layer_problems(cfg: TowerConfig) -> list[Problem]:
    found: list[Problem] = []
    if not -cfg.num_layers <= cfg.feature_layer <= -1:
        reason = f"counts from the last layer, -1, to the first, {-cfg.num_layers}"
        found.append(("feature_layer", cfg.feature_layer, reason, "feature_layer=-1"))
    elif cfg.final_norm and cfg.feature_layer != -1 and cfg.kind != "intern":
        reason = f"norms what the last layer gives, and feature_layer={cfg.feature_layer} takes another's"
        found.append(("final_norm", True, reason, "final_norm=false"))
    return found


def _tile_problems(cfg: TowerConfig, block: int) -> list[Problem]:
    if cfg.image_size is None:
        reason = f"a tower of kind {cfg.kind} has learnt the places of tiles of one size"
        return [("image_size", None, reason, f"image_size={16 * cfg.patch_size}")]
    side = cfg.patch_size * block
    if cfg.image_size < side or cfg.grid % block:  # pixels behind the last whole patch are not seen (SigLIP: 384 by 14)
        near = max(round(cfg.image_size / side), 1) * side
        reason = f"makes {cfg.grid} patches a side, and the connector joins blocks of {block} x {block}"
        found = "holds no patch" if cfg.image_size < cfg.patch_size else reason
        return [("image_size", cfg.image_size, found, f"image_size={near}")]
    return []


def _window_problems(cfg: TowerConfig, block: int) -> list[Problem]:
    found: list[Problem] = []
    if cfg.image_size is not None:
        reason = f"the tiles of a tower of kind {cfg.kind} have sizes of their own"
        found.append(("image_size", cfg.image_size, reason, "image_size=null"))
    if cfg.kind != "qwen2_5_vl":
        return found
    side = cfg.patch_size * block
    if cfg.window_size is not None and (cfg.window_size < side or cfg.window_size % side):
        reason = f"is no multiple of patch_size={cfg.patch_size} x the connector's block={block} = {side} pixels"
        near = max(round(cfg.window_size / side), 1) * side
        found.append(("window_size", cfg.window_size, reason, f"window_size={near}"))
    wrong = [i for i in cfg.full_layers if not 0 <= i < cfg.num_layers]
    if wrong:
        last = cfg.num_layers - 1
        found.append(("full_layers", list(cfg.full_layers), f"layers are counted from 0 to {last}", "full_layers=[]"))
    return found
