"""Connectors against transformers' modules, torch's attention and the papers' formulas; fp32, 1e-5."""

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from models.vision.config import (
    ImageConfig,
    MergerConfig,
    PerceiverConfig,
    QFormerConfig,
    ResamplerConfig,
    ShuffleConfig,
    TowerConfig,
    VisionConfig,
)
from models.vision.connectors import build_connector
from models.vision.connectors.resampler import sine_positions
from parallel.sharding import SINGLE

WIDTH, DIM, SIDE = 24, 16, 4


def made(connector: Any, **tower: Any) -> Any:
    """A connector with random weights, norms and biases included, for tiles of SIDE x SIDE patches."""
    torch.manual_seed(1)
    eyes = TowerConfig("clip", DIM, 32, 1, 2, 7, SIDE * 7, **tower)
    module = build_connector(VisionConfig("loom", eyes, connector, ImageConfig()), WIDTH, SINGLE, False)
    for param in module.parameters():
        nn.init.normal_(param, 0.5, 0.5)
    return module


def fused(*parts: torch.Tensor) -> torch.Tensor:
    return torch.cat(parts)


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())


def test_pixel_shuffle_is_internvls() -> None:
    from transformers.models.internvl.modeling_internvl import InternVLModel, InternVLMultiModalProjector

    vision = transformers.InternVLVisionConfig(hidden_size=DIM, num_hidden_layers=1, num_attention_heads=2)
    text = transformers.LlamaConfig(hidden_size=WIDTH, num_attention_heads=2)
    config = transformers.InternVLConfig(vision_config=vision, text_config=text, downsample_ratio=0.5)
    theirs, ours = InternVLMultiModalProjector(config), made(ShuffleConfig(block=2))
    pairs = (("norm", theirs.layer_norm), ("first", theirs.linear_1), ("second", theirs.linear_2))
    for name, module in pairs:
        getattr(ours, name).load_state_dict(module.state_dict())
    pixel_shuffle: Any = InternVLModel.pixel_shuffle
    x = torch.randn(3, SIDE, SIDE, DIM)
    shuffled = pixel_shuffle(None, x, scale_factor=0.5).flatten(1, 2)
    close(ours(x.flatten(0, 2), ((SIDE, SIDE),) * 3), theirs(shuffled).flatten(0, 1))


@pytest.mark.parametrize("rms", [False, True])
def test_patch_merger_is_qwens(rms: bool) -> None:
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLPatchMerger
    from transformers.models.qwen2_vl.modeling_qwen2_vl import PatchMerger

    theirs = (Qwen2_5_VLPatchMerger if rms else PatchMerger)(WIDTH, DIM, spatial_merge_size=2)
    ours = made(MergerConfig(block=2, rms_norm=rms))
    for name, module in (("norm", theirs.ln_q), ("first", theirs.mlp[0]), ("second", theirs.mlp[2])):
        getattr(ours, name).load_state_dict(module.state_dict())
    x = torch.randn(24, DIM)
    close(ours(x, ((4, 4), (2, 4))), theirs(x))


def test_qformer_is_blip2s() -> None:
    config = transformers.Blip2QFormerConfig(
        hidden_size=20, num_hidden_layers=3, num_attention_heads=4, intermediate_size=40, encoder_hidden_size=DIM
    )
    theirs: Any = transformers.Blip2QFormerModel(config).eval()
    ours = made(QFormerConfig(queries=5, hidden_size=20, intermediate_size=40, num_layers=3, num_heads=4))
    with torch.no_grad():
        for param in theirs.parameters():
            param.normal_(0.5, 0.3)
    state = {"norm." + k: v for k, v in theirs.layernorm.state_dict().items()}
    for i, layer in enumerate(theirs.encoder.layer):
        kinds = [("attn", layer.attention)] + ([("cross", layer.crossattention)] if i % 2 == 0 else [])
        for name, block in kinds:
            for kind in ("weight", "bias"):
                q, k, v = (getattr(getattr(block.attention, x), kind) for x in ("query", "key", "value"))
                state[f"layers.{i}.{name}.q.{kind}"], state[f"layers.{i}.{name}.kv.{kind}"] = q, fused(k, v)
                state[f"layers.{i}.{name}.out.{kind}"] = getattr(block.output.dense, kind)
                state[f"layers.{i}.{name}_norm.{kind}"] = getattr(block.output.LayerNorm, kind)
        for kind in ("weight", "bias"):
            state[f"layers.{i}.mlp.up.{kind}"] = getattr(layer.intermediate_query.dense, kind)
            state[f"layers.{i}.mlp.down.{kind}"] = getattr(layer.output_query.dense, kind)
            state[f"layers.{i}.mlp_norm.{kind}"] = getattr(layer.output_query.LayerNorm, kind)
    missing, unknown = ours.load_state_dict(state, strict=False)
    assert not unknown and set(missing) == {"queries", "proj.weight", "proj.bias"}
    x = torch.randn(2, SIDE * SIDE, DIM)
    told = theirs(query_embeds=ours.queries.expand(2, -1, -1), encoder_hidden_states=x).last_hidden_state
    close(ours(x.flatten(0, 1), ((SIDE, SIDE),) * 2), ours.proj(told).flatten(0, 1))


def test_perceiver_is_the_papers() -> None:
    """Each tile by itself, head by head, with softmax written out."""
    cfg = PerceiverConfig(queries=3, num_layers=2, num_heads=2, head_dim=5)
    ours = made(cfg)
    x = torch.randn(2, SIDE * SIDE, DIM)
    wanted = []
    for tile in x:
        latents = ours.latents
        for layer in ours.layers:
            seen = torch.cat([layer.norm_features(tile), layer.norm_latents(latents)])
            q = layer.norm_latents(latents) @ layer.attn.q.weight.T
            k, v = (seen @ layer.attn.kv.weight.T).chunk(2, 1)
            heads = []
            for at in (slice(0, 5), slice(5, 10)):
                heads.append(torch.softmax(q[:, at] @ k[:, at].T / 5**0.5, -1) @ v[:, at])
            latents = latents + torch.cat(heads, 1) @ layer.attn.out.weight.T
            inner = torch.nn.functional.gelu(layer.norm(latents) @ layer.up.weight.T)
            latents = latents + inner @ layer.down.weight.T
        wanted.append(ours.norm(latents) @ ours.proj.weight.T + ours.proj.bias)
    close(ours(x.flatten(0, 1), ((SIDE, SIDE),) * 2), torch.cat(wanted))


def test_resampler_is_torchs_attention() -> None:
    ours = made(ResamplerConfig(side=SIDE, num_heads=3))
    theirs = nn.MultiheadAttention(WIDTH, 3, batch_first=True)
    weights = {"in_proj_weight": fused(ours.q.weight, ours.k.weight, ours.v.weight)}
    weights |= {"in_proj_bias": fused(ours.q.bias, ours.k.bias, ours.v.bias)}
    weights |= {"out_proj.weight": ours.out.weight, "out_proj.bias": ours.out.bias}
    theirs.load_state_dict(weights)
    x = torch.randn(2, SIDE * SIDE, DIM)
    places = sine_positions(SIDE, WIDTH, x.device).flatten(0, 1)
    kv = ours.norm_kv(ours.features(x))
    q = (ours.norm_q(ours.queries) + places).expand(2, -1, -1)
    told = theirs(q, kv + places, kv, need_weights=False)[0]
    close(ours(x.flatten(0, 1), ((SIDE, SIDE),) * 2), ours.proj(ours.norm(told)).flatten(0, 1))


def test_sine_positions_tell_column_and_row() -> None:
    """Two numbers of each worked by hand: frequencies 1 and 1 / 100, at row 2 and column 1."""
    table = sine_positions(3, 8, torch.device("cpu"))[2, 1]
    told = [torch.tensor(angle).sin() for angle in (1.0, 0.01)] + [torch.tensor(angle).cos() for angle in (1.0, 0.01)]
    told += [torch.tensor(angle).sin() for angle in (2.0, 0.02)] + [torch.tensor(angle).cos() for angle in (2.0, 0.02)]
    torch.testing.assert_close(table, torch.stack(told))


SMALL = (
    ShuffleConfig(block=2),
    MergerConfig(block=2),
    QFormerConfig(queries=2, hidden_size=8, intermediate_size=8, num_layers=2, num_heads=2),
    PerceiverConfig(queries=2, num_layers=1, num_heads=2, head_dim=4),
    ResamplerConfig(side=2, num_heads=2),
)


@pytest.mark.parametrize("connector", SMALL, ids=lambda connector: connector.name)
def test_a_blank_block_gives_every_parameter_a_gradient_of_zero(connector) -> None:
    """What a micro-batch without pictures does (`models.vision.eyes`)."""
    module, side = made(connector), connector.block
    out = module(torch.zeros(side * side, DIM), ((side, side),))
    out.index_select(0, torch.zeros(0, dtype=torch.int64)).sum().backward()
    assert all(param.grad is not None and not param.grad.any() for param in module.parameters())
