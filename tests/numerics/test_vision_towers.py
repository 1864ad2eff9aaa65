"""Vision towers against transformers: features and gradients, at every feature layer a checkpoint may ask for."""

import math
from itertools import groupby, pairwise
from typing import Any

import pytest
import torch
from transformers.models.blip_2 import Blip2VisionConfig, Blip2VisionModel
from transformers.models.clip import CLIPVisionConfig, CLIPVisionModel
from transformers.models.internvl import InternVLVisionConfig, InternVLVisionModel
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen2_5
from transformers.models.qwen2_vl import modeling_qwen2_vl as qwen2
from transformers.models.siglip import SiglipVisionConfig, SiglipVisionModel
from transformers.vision_utils import get_vision_window_index

from models.rules import Unused
from models.vision.config import TowerConfig
from models.vision.rules import tower_rules
from models.vision.tower_native import tile_of
from parallel.sharding import SINGLE
from tests.tower_cases import CASES, PIXELS, Case, patches_of, tower_of


def theirs(cfg: TowerConfig) -> Any:
    """transformers' tower of the same sizes, with random weights: norms and scales around 1, nothing 0."""
    sizes: dict[str, Any] = {
        "hidden_size": cfg.hidden_size,
        "intermediate_size": cfg.intermediate_size,
        "num_hidden_layers": cfg.num_layers,
        "num_attention_heads": cfg.num_heads,
        "image_size": cfg.image_size,
        "patch_size": PIXELS,
        "layer_norm_eps": cfg.norm_eps,
    }
    if cfg.kind == "clip":
        model = CLIPVisionModel(CLIPVisionConfig(**sizes))
    elif cfg.kind == "siglip":
        model = SiglipVisionModel(SiglipVisionConfig(**sizes))
    elif cfg.kind == "blip2":
        model = Blip2VisionModel(Blip2VisionConfig(**sizes))
    elif cfg.kind == "intern":
        more = {
            "attention_bias": cfg.qkv_bias,
            "use_qk_norm": cfg.qk_norm,
            "norm_type": "rms_norm" if cfg.rms_norm else "layer_norm",
            "use_mean_pooling": not cfg.final_norm,
            "use_mask_token": True,
        }
        model = InternVLVisionModel(InternVLVisionConfig(**sizes, **more))
    else:
        model = _qwen(cfg)
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for param in model.parameters():
            noise = torch.empty_like(param).normal_(0, 0.15, generator=draw)
            param.copy_(noise + (param == 1.0).all() * 1.0)
    return model.eval()


def _qwen(cfg: TowerConfig) -> Any:
    common: dict[str, Any] = {"depth": cfg.num_layers, "num_heads": cfg.num_heads, "patch_size": PIXELS}
    if cfg.kind == "qwen2_vl":
        ratio = cfg.intermediate_size // cfg.hidden_size
        keys = qwen2.Qwen2VLVisionConfig(**common, embed_dim=cfg.hidden_size, hidden_size=48, mlp_ratio=ratio)
        return qwen2.Qwen2VisionTransformerPretrainedModel(keys)
    assert cfg.window_size is not None
    keys = qwen2_5.Qwen2_5_VLVisionConfig(
        **common,
        hidden_size=cfg.hidden_size,
        intermediate_size=cfg.intermediate_size,
        out_hidden_size=48,
        window_size=cfg.window_size,
        fullatt_block_indexes=list(cfg.full_layers),
    )
    return qwen2_5.Qwen2_5_VisionTransformerPretrainedModel(keys)


def their_features(model: Any, case: Case, patches_PX: torch.Tensor) -> torch.Tensor:
    """What LLaVA, BLIP-2, InternVL and Qwen-VL take from their towers; of Qwen-VL behind the patch merger."""
    cfg = case.cfg
    if cfg.native:
        times = torch.tensor([(len(list(alike)), *grid) for grid, alike in groupby(case.grids)])  # of two: a video
        assert times[:, 0].max() == 2
        return model(patches_PX, grid_thw=times).pooler_output
    side = cfg.grid
    pixels = patches_PX.view(-1, side, side, 3, PIXELS, PIXELS).permute(0, 3, 1, 4, 2, 5)
    out = model(pixels.reshape(-1, 3, side * PIXELS, side * PIXELS), output_hidden_states=True)
    found = out.last_hidden_state if cfg.norms_features else out.hidden_states[cfg.feature_layer]
    found = found[:, 1:] if cfg.has_class and not cfg.keep_class else found
    return found.flatten(0, 1)


@pytest.mark.parametrize("name", CASES)
def test_equals_transformers(name: str) -> None:
    """fp32 features to 1e-5; every gradient to 1e-5 of the largest one. All tensors have a place."""
    case = CASES[name]
    model, tower = theirs(case.cfg), tower_of(case, SINGLE)
    rules = list(tower_rules(case.cfg, "", ""))
    named = [rule for rule in rules if not isinstance(rule, Unused)]
    unused = (*(rule.prefix for rule in rules if isinstance(rule, Unused)), "merger.")
    weights = {key: value for key, value in model.state_dict().items() if not key.startswith(unused)}
    assert sorted(key for rule in named for key in rule.sources) == sorted(weights)
    tower.load_state_dict({rule.ours: rule.to_ours(weights) for rule in named}, strict=True)
    patches_PX = patches_of(case)
    expected = their_features(model, case, patches_PX)
    found = tower(patches_PX, case.grids)
    found = model.merger(found) if case.cfg.native else found
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    seed = torch.randn(expected.shape, generator=torch.Generator().manual_seed(6))
    (expected * seed).sum().backward()
    grads = {key: torch.zeros_like(p) if p.grad is None else p.grad.clone() for key, p in model.named_parameters()}
    (found * seed).sum().backward()
    for rule in named:
        wanted, param = rule.to_ours(grads), tower.get_parameter(rule.ours)
        if not param.requires_grad:
            assert not wanted.any(), f"{rule.ours} is kept, and transformers uses it"
            continue
        assert param.grad is not None, rule.ours
        scale = wanted.abs().max().item()
        torch.testing.assert_close(param.grad, wanted, rtol=0, atol=1e-5 * scale, msg=lambda m, r=rule: f"{r.ours} {m}")


def test_rows_of_every_rule_are_all_rows() -> None:
    """Patch weights have four and five dims: rows are all but the last."""
    for case in CASES.values():
        shapes = {name: tuple(p.shape) for name, p in tower_of(case, SINGLE).named_parameters()}
        for rule in tower_rules(case.cfg, "", ""):
            if not isinstance(rule, Unused):
                shape = shapes[rule.ours]
                rows = sum(each.stop - each.start for each in rule.segments(shape))
                assert rows == math.prod(shape[:-1] if len(shape) > 1 else shape), rule.ours


@pytest.mark.parametrize("side", [1, 2, 3])
def test_windows_are_those_of_transformers(side: int) -> None:
    """The same sets of merged patches, for every size of a tile up to 7 x 7 blocks."""
    block = 2
    for high in range(1, 8):
        for wide in range(1, 8):
            tile = tile_of(high * block, wide * block, block, side)
            index, borders = get_vision_window_index(
                torch.tensor([[1, high * block, wide * block]]), block, side * block * PIXELS, PIXELS
            )
            wanted = {frozenset(index[a // 4 : b // 4].tolist()) for a, b in pairwise(borders.tolist())}
            found, at = set(), 0
            for size in tile.windows:
                rows = tile.order_P[at : at + size].tolist()
                assert rows == [4 * (rows[i] // 4) + i % 4 for i in range(size)], "blocks stay whole"
                found.add(frozenset(row // 4 for row in rows))
                at += size
            assert found == wanted and at == 4 * high * wide
