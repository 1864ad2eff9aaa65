"""What the pools run for vision towers: one of each kind, tiny, with weights drawn by name whatever the layout."""

from __future__ import annotations

import dataclasses
import zlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from models.vision.config import TowerConfig
from models.vision.tower import build_tower
from parallel.materialise import fill_
from parallel.sharding import Place, init_of, shard_of
from tests.tp_cases import here

PIXELS = 7
Grids = tuple[tuple[int, int], ...]
TILES: Grids = ((4, 4),) * 3
PICTURES: Grids = ((8, 12), (6, 4), (6, 4), (10, 6), (2, 2))


@dataclass(frozen=True)
class Case:
    """A tower, the side of the blocks its connector joins, and tiles to look at."""

    cfg: TowerConfig
    block: int = 1
    grids: Grids = TILES


_INTERN = TowerConfig("intern", 32, 64, 3, 4, PIXELS, 28, 1e-6, "gelu", -2)
_QWEN2_5 = TowerConfig(
    "qwen2_5_vl", 32, 44, 3, 4, PIXELS, None, 1e-6, "silu", frames=2, window_size=28, full_layers=(1,)
)
CASES = {
    "clip": Case(TowerConfig("clip", 32, 64, 3, 4, PIXELS, 28, 1e-5, "quick_gelu", -2)),
    "clip_last": Case(TowerConfig("clip", 32, 64, 3, 4, PIXELS, 28, 1e-5, "quick_gelu", -1, keep_class=True)),
    "siglip": Case(TowerConfig("siglip", 32, 64, 3, 4, PIXELS, 28, 1e-6, "gelu_tanh", -1)),
    "siglip_normed": Case(TowerConfig("siglip", 32, 64, 3, 4, PIXELS, 28, 1e-6, "gelu_tanh", -1, True)),
    "siglip_third": Case(TowerConfig("siglip", 32, 64, 3, 4, PIXELS, 28, 1e-6, "gelu_tanh", -3)),
    "blip2": Case(TowerConfig("blip2", 32, 64, 3, 4, PIXELS, 28, 1e-6, "gelu", -1, True, keep_class=True)),
    "intern": Case(_INTERN, block=2),
    "intern_normed": Case(dataclasses.replace(_INTERN, feature_layer=-1, final_norm=True), block=2),
    "intern_6b": Case(
        dataclasses.replace(_INTERN, feature_layer=-1, qkv_bias=False, qk_norm=True, rms_norm=True), block=2
    ),
    "qwen2_vl": Case(TowerConfig("qwen2_vl", 32, 64, 3, 4, PIXELS, None, 1e-6, "quick_gelu", frames=2), 2, PICTURES),
    "qwen2_5_vl": Case(_QWEN2_5, 2, PICTURES),
}


def tower_of(case: Case, place: Place, recompute: bool = False) -> nn.Module:
    """The tower with random weights; norms and scales lie around 1."""
    with torch.device("meta"):
        tower = build_tower(case.cfg, case.block, place, recompute)
    for name, param in tower.named_parameters():
        draw = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        whole = torch.empty(shard_of(param).whole_shape(param.shape)).normal_(0, 0.2, generator=draw)
        whole += float(init_of(param) == "ones")
        fill_(param, shard_of(param).slice(whole, place.cut), torch.device("cpu"))
    return tower


def patches_of(case: Case) -> torch.Tensor:
    """Patches [P, X] of the case's tiles."""
    total, numbers = sum(a * b for a, b in case.grids), 3 * case.cfg.frames * PIXELS**2
    return torch.randn(total, numbers, generator=torch.Generator().manual_seed(7))


def looked(case: Case, place: Place, recompute: bool = False) -> dict[str, Any]:
    """Features, and every gradient of a sum of them with random weights."""
    tower = tower_of(case, place, recompute)
    features = tower(patches_of(case), case.grids)
    seed = torch.randn(features.shape, generator=torch.Generator().manual_seed(8))
    (features * seed).sum().backward()
    grads = {name: p.grad for name, p in tower.named_parameters()}
    return {"features": features.detach(), "grads": grads}


def looked_in_pool(names: list[str]) -> dict[str, Any]:
    """Several cases, tensor parallel over the whole pool."""
    return {name: looked(CASES[name], here()) for name in names}
