"""Prompts with pictures for tiny models that see, and what the pools run of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from data.pictures.geometry import plan
from data.pictures.loader import features_of
from data.pictures.positions import rotary_positions
from data.pictures.types import PictureConfig, Pictures
from models import Decoder, ModelConfig
from models.config import RopeConfig
from models.generation import BeamConfig, Completion, Generator, GeneratorConfig, Request, SamplingConfig, Sight
from models.generation.config import Settings
from models.vision.config import CrossConfig, ImageConfig, MergerConfig, ProjectorConfig, TowerConfig, VisionConfig
from parallel.sharding import SINGLE, Place
from tests import tp_cases
from trainer.pictures import picture_config

NEW = 6
TOKEN = 60
SMALL = GeneratorConfig(max_rows=3, prefill_tokens=90)
TEXT = ModelConfig("llama", 61, 32, 48, 2, 4, 2, 8, 256, init_std=0.3)
CLIP = TowerConfig("clip", 32, 64, 2, 4, 7, 28, 1e-5, "quick_gelu", -1)
QWEN = TowerConfig("qwen2_vl", 32, 64, 2, 4, 7, None, 1e-6, "quick_gelu", frames=2)
NEXT = ImageConfig(mode="anyres", grids=((28, 56), (56, 28), (56, 56)), newline=True)
NATIVE = ImageConfig(
    mode="native", min_pixels=28 * 28, max_pixels=56 * 56, video_min_pixels=28 * 28, video_max_pixels=56 * 56
)
MODELS = {
    "llava": replace(TEXT, vision=VisionConfig("llava", CLIP, ProjectorConfig("mlp"), ImageConfig())),
    "next": replace(TEXT, vision=VisionConfig("llava_next", CLIP, ProjectorConfig("mlp"), NEXT)),
    "qwen2_vl": replace(
        TEXT,
        rope=RopeConfig(sections=(2, 1, 1)),
        vision=VisionConfig("qwen2_vl", QWEN, MergerConfig(), NATIVE),
    ),
    "gated": replace(TEXT, vision=VisionConfig("loom", CLIP, ProjectorConfig("mlp"), NEXT, CrossConfig(48, 1, 4, 8))),
}
SIZES: tuple[tuple[tuple[int, int], ...], ...] = (((40, 50),), (), ((80, 24), (30, 30)), ((28, 56),), ())
"""Width and height of each prompt's pictures."""
SETTINGS: tuple[Settings, ...] = (
    SamplingConfig(max_new_tokens=NEW, log_probs=True),
    SamplingConfig(max_new_tokens=NEW),
    SamplingConfig(max_new_tokens=NEW),
    SamplingConfig(max_new_tokens=NEW, temperature=1.0, samples=7),
    BeamConfig(num_beams=3, max_new_tokens=NEW),
)


def decoder(name: str, place: Place) -> Decoder:
    model = tp_cases.model_of(MODELS[name], place)
    assert isinstance(model, Decoder)
    return model


def shown(cfg: PictureConfig, sizes: tuple[tuple[int, int], ...], seed: int) -> tuple[list[int], Sight | None]:
    """Text with pictures of random pixels between."""
    draw = torch.Generator().manual_seed(seed)

    def text(count: int) -> list[int]:
        return torch.randint(1, TOKEN, (count,), generator=draw).tolist()

    tokens, made, starts, features = text(4 + seed), [], [], []
    plans = [plan(*size, cfg) for size in sizes]
    for each in plans:
        patches = torch.randn(sum(a * b for a, b in each.grids), 3 * cfg.frames * cfg.patch**2, generator=draw)
        made.append(Pictures(patches, each.grids, torch.from_numpy(each.slots_F), torch.from_numpy(each.order_F)))
        starts.append(len(tokens))
        features.append(features_of(each, cfg))
        tokens += [TOKEN] * each.tokens + text(5)
    if not plans:
        return tokens, None
    rotary = None
    if cfg.rotary:
        shapes = [(at, each.shape) for at, each in zip(starts, plans, strict=True)]
        rotary = torch.from_numpy(np.asarray(rotary_positions(len(tokens), shapes)))
    return tokens, Sight(Pictures.join(made, starts, features), sum(features), rotary)


def requests_of(name: str) -> list[Request]:
    """Prompts with no, one or two pictures; the beam search sees one too."""
    cfg = picture_config(MODELS[name])
    assert cfg is not None
    sizes = [*SIZES[:-1], SIZES[0]]
    made = [shown(cfg, each, i) for i, each in enumerate(sizes)]
    return [Request(made[i][0], SETTINGS[i], 7 + i, made[i][1]) for i in range(len(made))]


def texts(name: str, pooled: bool = True) -> list[Completion]:
    """All the texts, over the ranks of the pool or in one piece."""
    place = tp_cases.here() if pooled else SINGLE
    return Generator(decoder(name, place), config=SMALL).generate(requests_of(name))
