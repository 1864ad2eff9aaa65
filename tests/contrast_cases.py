"""What the pools run of stages that compare pictures with texts: tiny pairs of encoders trained in a
layout, with everything that must not depend on it."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch

from data.batch import Document, MicroBatch, Row, collate, empty_micro_batch, split_ragged, split_rows
from data.pictures.types import Pictures
from models import ModelConfig
from models.init import InitSource
from models.vision.config import ImageConfig, PooledConfig, TowerConfig, VisionConfig
from parallel.config import EngineConfig, ParallelConfig
from parallel.groups import ALL_DATA, Groups
from tests.cases import NAMES, here, whole
from trainer import channels
from trainer.build import make_engine
from trainer.comparing import Comparing
from trainer.optim import OptimConfig
from trainer.stages import ClipConfig, build_stage

PAIRS = 8
TOWER = TowerConfig(
    kind="clip",
    hidden_size=24,
    intermediate_size=32,
    num_layers=2,
    num_heads=4,
    patch_size=4,
    image_size=8,
    final_norm=True,
    keep_class=True,
)
CLIP = ModelConfig(
    family="clip",
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_dim=8,
    max_seq_len=12,
    norm_eps=1e-5,
    init_std=0.18,
    vision=VisionConfig("clip", TOWER, PooledConfig(width=16), ImageConfig()),
)
SIGLIP_TOWER = dataclasses.replace(TOWER, kind="siglip", keep_class=False)
MODELS = {
    "clip": CLIP,
    "siglip": dataclasses.replace(
        CLIP, family="siglip", vision=VisionConfig("siglip", SIGLIP_TOWER, PooledConfig(width=24), ImageConfig())
    ),
}


def pairs(step: int, count: int = PAIRS) -> list[Document]:
    """Pictures of noise with captions of uneven length; two have the same one."""
    random = np.random.default_rng([17, step])
    found = []
    for index in range(count):
        length = int(random.integers(2, 12))
        tokens_L = random.integers(0, CLIP.vocab_size, size=length)
        if index == count - 1:
            tokens_L = found[0].tokens_L
        patches = torch.from_numpy(random.standard_normal((4, 48)).astype(np.float32))
        nothing = torch.zeros(0, dtype=torch.int64)
        channel = 2 if index == step % count else int(step > 1 and index % 3 == 0)
        shown = Pictures(patches, ((2, 2),), nothing, nothing)
        found.append(Document(tokens_L, np.ones(len(tokens_L), dtype=bool), channel, pictures=shown))
    return found


def light(docs: list[Document]) -> list[Row]:
    """The pairs as the dealer sees them."""
    return [Row((i,), (len(doc.tokens_L),)) for i, doc in enumerate(docs)]


def train_pairs(
    stage_cfg: ClipConfig,
    model: str = "clip",
    zero: Any = 1,
    micro_rows: int = PAIRS,
    steps: int = 3,
    *,
    layout: ParallelConfig = ALL_DATA,
    recompute: Any = "none",
) -> dict[str, Any]:
    """Train; losses, norms, per-channel numbers, first-step gradients, final weights, metrics of held-out pairs."""
    groups, cfg = here(layout), MODELS[model]
    optim, engine_cfg = OptimConfig(lr=3e-3, clip=1.0, eps=1e-3), EngineConfig(zero=zero, recompute=recompute)
    engine = make_engine(cfg, engine_cfg, optim, groups, InitSource(cfg, seed=3), layout)
    stage: Any = build_stage(stage_cfg, len(NAMES))
    prepare = Comparing(stage, groups, engine)
    out: dict[str, Any] = {"metrics": [], "norm": []}
    for step in range(steps):
        docs = pairs(step)
        mine = split_rows(light(docs), groups.dp.rank, groups.dp.size, micro_rows)
        batches = [collate([docs[row.pieces[0]] for row in part]) for part in mine]
        (count,) = groups.sum([stage.count(batches)])
        assert count == PAIRS
        result = engine.train_step(prepare(batches, []), stage.forward, count, optim.lr_at(step, 100))
        out["metrics"].append(channels.metrics(result.metrics, NAMES, groups.all_gather, "train", stage.columns))
        out["norm"].append(result.grad_norm)
        if step == 0:
            moments = whole(engine, groups, "exp_avg")
            out["grads"] = {n: m / (1 - optim.betas[0]) for n, m in moments.items()}
    out["weights"] = whole(engine, groups, "master")
    out["losses"] = [m["train/loss"] for m in out["metrics"]]
    terms = engine.evaluate(prepare(_held_out(groups), None), stage.forward)
    out["metrics"].append(channels.metrics(terms, NAMES, groups.all_gather, "eval", stage.columns))
    return out


def _held_out(groups: Groups) -> list[MicroBatch]:
    """Five pairs in micro-batches of two: some ranks have none of them and fill up."""
    docs = pairs(99, 5)
    mine = split_ragged(light(docs), groups.dp.rank, groups.dp.size, 2)
    return [collate([docs[i] for row in part for i in row.pieces]) if part else empty_micro_batch() for part in mine]
