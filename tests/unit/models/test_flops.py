"""FLOPs against counts by hand and by torch's own counter."""

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import parallel.matmul
from data.pictures.types import Pictures
from models import Decoder, ModelConfig, build
from models.config import MoEConfig
from models.flops import attended_pairs, matmul_params, needed, step_flops
from models.parts import LayeredPartConfig, PartConfig, PartsConfig, freeze
from models.vision import tower_layers
from models.vision.config import (
    ConnectorConfig,
    CrossConfig,
    ImageConfig,
    MergerConfig,
    PerceiverConfig,
    ProjectorConfig,
    QFormerConfig,
    ResamplerConfig,
    ShuffleConfig,
    TowerConfig,
    VisionConfig,
)
from models.vision.eyes import build_eyes
from models.vision.flops import Grids, vision_work
from parallel.sharding import SINGLE

CFG = ModelConfig("llama", 100, 32, 48, 3, 4, 2, 8, 64)


def test_matmul_params_by_hand() -> None:
    assert matmul_params(CFG) == 3 * (32 * (32 + 16 + 16) + 32 * 32 + 3 * 32 * 48)


def test_experts_count_as_many_as_a_token_goes_to() -> None:
    """One dense layer, then two of 8 experts: 3 of size 16 a token, a gated shared one of 40, a router."""
    moe = MoEConfig(8, 3, 16, shared_size=40, shared_gate=True, first_dense=1)
    sparse = dataclasses.replace(CFG, family="qwen2_moe", moe=moe)
    experts = 3 * 32 * 16 * 3 + 3 * 32 * 40 + 32 + 32 * 8
    assert matmul_params(sparse) == matmul_params(CFG) + 2 * (experts - 3 * 32 * 48)


@pytest.mark.parametrize(("length", "window", "pairs"), [(1, None, 1), (4, None, 10), (4, 2, 7), (4, 9, 10), (5, 1, 5)])
def test_pairs_by_hand(length: int, window: int | None, pairs: int) -> None:
    assert attended_pairs(length, window) == pairs
    seen = [(q, k) for q in range(length) for k in range(q + 1) if window is None or q - k < window]
    assert len(seen) == pairs


def test_step_equals_torch_counter_on_plain_matmuls() -> None:
    """The linear part, counted by torch over the forward of plain products; backward is twice the forward."""
    tokens = 10
    shapes = 3 * [(32, 64), (32, 32), (32, 96), (48, 32)]
    with FlopCounterMode(display=False) as counter:
        for inputs, outputs in shapes:
            torch.mm(torch.empty(tokens, inputs), torch.empty(inputs, outputs))
        torch.mm(torch.empty(6, 32), torch.empty(32, 100))
    attention = 12.0 * 4 * 8 * 3 * (attended_pairs(4, None) + attended_pairs(6, None))
    assert step_flops(CFG, [4, 6], 6) == 3 * counter.get_total_flops() + attention


def test_window_counts_only_the_layers_that_have_it() -> None:
    sizes = (100, 32, 48, 4, 4, 2, 8, 64)
    full = ModelConfig("qwen2", *sizes, qkv_bias=True)
    some = ModelConfig("qwen2", *sizes, qkv_bias=True, sliding_window=5, full_attention_layers=3)
    saved = attended_pairs(20, None) - attended_pairs(20, 5)
    assert step_flops(full, [20], 0) - step_flops(some, [20], 0) == 12.0 * 4 * 8 * saved


CLIP = TowerConfig("clip", 32, 48, 3, 4, 7, 28, activation="quick_gelu", feature_layer=-2)
WINDOWS = TowerConfig(
    "qwen2_5_vl", 32, 48, 3, 4, 7, activation="silu", frames=2, window_size=28, full_layers=(1,), rms_norm=True
)
SQUARES, ANY = ((4, 4),) * 3, ((8, 10), (6, 4))
SIGHTS = [
    (CLIP, ProjectorConfig("linear"), SQUARES),
    (dataclasses.replace(CLIP, keep_class=True), ProjectorConfig(), SQUARES),
    (dataclasses.replace(CLIP, kind="siglip"), ShuffleConfig(), SQUARES),
    (CLIP, QFormerConfig("qformer", 5, 24, 40, 3, 4), SQUARES),
    (dataclasses.replace(CLIP, kind="intern", qk_norm=True), PerceiverConfig("perceiver", 5, 2, 2, 12), SQUARES),
    (CLIP, ResamplerConfig("resampler", 3, 4), SQUARES),
    (WINDOWS, MergerConfig(), ANY),
]


@pytest.fixture
def plain_products(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Products and attention by operators that torch's counter knows; rotation has none."""

    def attention(qkv: torch.Tensor, heads: int, seen: tower_layers.Seen) -> torch.Tensor:
        return tower_layers.sequence_attention(qkv, heads, seen.pieces)

    monkeypatch.setattr(parallel.matmul, "_ONEDNN", False)
    monkeypatch.setattr(tower_layers, "self_attention", attention)
    with sdpa_kernel(SDPBackend.MATH):
        yield


@pytest.mark.parametrize("frozen", ["nothing", "vision", "connector"])
@pytest.mark.parametrize(("tower", "connector", "grids"), SIGHTS, ids=lambda each: getattr(each, "name", None))
def test_eyes_equal_torch_counter(
    plain_products: None, tower: TowerConfig, connector: ConnectorConfig, grids: Grids, frozen: str
) -> None:
    """Forward and backward of the real modules, of which either may be frozen."""
    cfg = VisionConfig("loom", tower, connector, ImageConfig())
    with torch.device("meta"):
        eyes = build_eyes(cfg, 64, SINGLE, False)
    seeing, connecting = (module.to_empty(device="cpu") for module in eyes)
    for module, name in ((seeing, "vision"), (connecting, "connector")):
        module.requires_grad_(name != frozen)
    patches_PX = torch.zeros(sum(rows * cols for rows, cols in grids), 3 * tower.frames * 49)
    with FlopCounterMode(display=False) as counter:
        connecting(seeing(patches_PX, grids), grids).sum().backward()
    counted = needed(vision_work(cfg, 64, grids, lambda name: not name.startswith(frozen)))
    # Queries and latents make no gradients of what they come from; a norm's weight takes a small product.
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.016)
    if isinstance(connector, ProjectorConfig | ShuffleConfig) or frozen == "vision":
        assert counted == counter.get_total_flops()


@pytest.mark.parametrize(
    "parts",
    [
        PartsConfig(),
        PartsConfig(vision=LayeredPartConfig(train=False), decoder=LayeredPartConfig(train=False)),
        PartsConfig(vision=LayeredPartConfig(train=False), decoder=LayeredPartConfig(last_layers=1)),
        PartsConfig(connector=PartConfig(train=False), decoder=LayeredPartConfig(train=False)),
    ],
    ids=["everything", "connector", "connector and a layer", "tower"],
)
def test_whole_models_with_frozen_parts_equal_torch_counter(plain_products: None, parts: PartsConfig) -> None:
    """Documents of one token, whose attention the counter does not see and which is little."""
    vision = VisionConfig("llava", CLIP, ProjectorConfig(), ImageConfig())
    cfg = ModelConfig("llama", 512, 64, 176, 2, 4, 2, 16, 512, vision=vision)
    model = build(cfg).to_empty(device="cpu")
    assert isinstance(model, Decoder)
    freeze(model, parts)
    tokens_T, slots_F = torch.zeros(96, dtype=torch.int64), torch.arange(48)
    pictures = Pictures(torch.zeros(48, 147), SQUARES, slots_F, slots_F)
    with FlopCounterMode(display=False) as counter:
        loss, _ = model(tokens_T, tokens_T, torch.arange(97), targets_T=tokens_T, pictures=pictures)
        loss.backward()
    counted = step_flops(cfg, [1] * 96, 96, SQUARES, lambda name: parts.trains(name, cfg))
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_layers_that_read_features_equal_torch_counter(plain_products: None) -> None:
    """What they add, where all tokens read a picture; attention between tokens is the same without them."""
    counted, seen = [], []
    for cross in (None, CrossConfig(200, 2, 4, 24)):
        vision = VisionConfig("loom", CLIP, ProjectorConfig(), ImageConfig(), cross)
        cfg = ModelConfig("llama", 512, 64, 176, 3, 4, 2, 16, 512, vision=vision)
        model, tokens_T = build(cfg).to_empty(device="cpu"), torch.zeros(120, dtype=torch.int64)
        slots_F = torch.arange(48) if cross is None else torch.tensor([0, 40, 80]).repeat_interleave(16)
        pictures = Pictures(torch.zeros(48, 147), SQUARES, slots_F, torch.arange(48))
        with FlopCounterMode(display=False) as counter:
            loss, _ = model(tokens_T, tokens_T, [0, 40, 80, 120], targets_T=tokens_T, pictures=pictures)
            loss.backward()
        seen.append(counter.get_total_flops())
        counted.append(step_flops(cfg, [40] * 3, 120, SQUARES))
    assert counted[1] - counted[0] == pytest.approx(seen[1] - seen[0], rel=0.005)


def test_no_picture_no_work_for_eyes() -> None:
    """Not even a gradient on the way to them."""
    vision = VisionConfig("llava", CLIP, ProjectorConfig(), ImageConfig())
    cfg = ModelConfig("llama", 100, 32, 48, 3, 4, 2, 8, 64, vision=vision)
    assert step_flops(cfg, [4, 6], 6) == step_flops(CFG, [4, 6], 6)
    connector_only = step_flops(cfg, [4, 6], 6, trains=lambda name: name.startswith("connector"))
    assert 3 * connector_only == step_flops(CFG, [4, 6], 6)
