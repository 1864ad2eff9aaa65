"""What the pools run for the first stage of a Q-Former: a tiny one trained in a given layout."""

from __future__ import annotations

import dataclasses
import functools
from itertools import chain
from typing import Any

import numpy as np
import torch

from data.batch import Document, MicroBatch, Row, collate, split_rows
from data.pictures.types import Pictures
from models.config import ModelConfig
from models.dual.qformer import QFormerPair
from models.init import InitSource
from models.parts import ALL
from models.vision.config import ImageConfig, QFormerConfig, TowerConfig, VisionConfig
from parallel.config import EngineConfig, ParallelConfig
from parallel.groups import ALL_DATA, Groups
from parallel.materialise import materialise
from parallel.sharding import SINGLE
from tests.cases import here, whole
from trainer import channels
from trainer.build import make_engine
from trainer.matching import Matching
from trainer.optim import OptimConfig
from trainer.stages.qformer import QFormerStage, QFormerStageConfig

TILE, PATCH = 12, 4
TINY = ModelConfig(
    family="bert",
    vocab_size=61,
    hidden_size=16,
    intermediate_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_dim=4,
    max_seq_len=16,
    norm_eps=1e-6,
    init_std=0.25,
    vision=VisionConfig(
        "blip2_itm",
        TowerConfig("blip2", 16, 24, 1, 2, PATCH, TILE, 1e-6, final_norm=True, keep_class=True),
        QFormerConfig(
            queries=3, hidden_size=16, intermediate_size=32, num_layers=2, num_heads=4, norm_eps=1e-6, width=8
        ),
        ImageConfig(fit="squash"),
    ),
)
NAMES = ("one", "other")
STAGE = QFormerStageConfig()


def documents(step: int, count: int = 8) -> list[Document]:
    """Pairs of which some have the same caption, and two the same picture."""
    draw, docs = np.random.default_rng([5, step]), []
    for _ in range(count):
        tokens = draw.integers(1, TINY.vocab_size, draw.integers(2, 9))
        patches = draw.standard_normal(((TILE // PATCH) ** 2, 3 * PATCH**2)).astype(np.float32)
        docs.append((tokens, patches))
    docs[2] = docs[0][0], docs[2][1]
    docs[5] = docs[5][0], docs[1][1]
    return [pair(tokens, patches, n % 3 == 0) for n, (tokens, patches) in enumerate(docs)]


def pair(tokens: np.ndarray, patches: np.ndarray, channel: int = 0) -> Document:
    """A caption with its picture; all tokens but the first are learnt."""
    nothing, side = torch.zeros(0, dtype=torch.int64), TILE // PATCH
    shown = Pictures(torch.from_numpy(patches), ((side, side),), nothing, nothing)
    return Document(tokens, np.arange(len(tokens)) > 0, int(channel), pictures=shown, features=0)


def micro_batches(step: int, rank: int, world: int, rows: int) -> list[MicroBatch]:
    """This rank's micro-batches of a step, cut by the product's own rule."""
    docs = documents(step)
    light = [Row((n,), (len(doc.tokens_L),)) for n, doc in enumerate(docs)]
    return [collate([docs[row.pieces[0]] for row in part]) for part in split_rows(light, rank, world, rows)]


@functools.cache
def model(cfg: ModelConfig = TINY) -> QFormerPair:
    """On the CPU, in this process, with norms and biases away from 1 and 0."""
    import models

    made: Any = models.build(cfg)
    materialise(made, InitSource(cfg, 3), SINGLE.cut, torch.device("cpu"))
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, param in made.named_parameters():
            if param.dim() == 1 and "temperature" not in name:
                param.add_(torch.randn(param.shape, generator=draw) * 0.2)
    return made


def train(
    zero: Any = 0,
    rows: int = 8,
    steps: int = 2,
    layout: ParallelConfig = ALL_DATA,
    recompute: Any = "none",
    frozen: bool = False,
) -> dict[str, Any]:
    """Some steps: numbers by channel, the first step's gradients, the last weights, what was matched."""
    groups = here(layout)
    parts = dataclasses.replace(ALL, vision=dataclasses.replace(ALL.vision, train=False)) if frozen else ALL
    optim = OptimConfig(lr=1e-2, clip=0.0, eps=1e-2, parts=parts)
    engine_cfg = EngineConfig(zero=zero, recompute=recompute, loss_chunk=7)
    engine = make_engine(TINY, engine_cfg, optim, groups, InitSource(TINY, 3), layout)
    stage = QFormerStage(STAGE, len(NAMES))
    prepare = Matching(stage, groups, engine, 11)
    out: dict[str, Any] = {"metrics": [], "matched": []}
    for step in range(steps):
        batches = micro_batches(step, groups.dp.rank, groups.dp.size, rows)
        count = groups.sum([stage.count(batches)])[0]
        prepared = prepare(batches, [])
        out["matched"].append(sorted(chain.from_iterable(groups.all_gather(told(prepared))[:: groups.tp.size])))
        result = engine.train_step(prepared, stage.forward, count, 1e-2)
        out["metrics"].append(channels.metrics(result.metrics, NAMES, groups.all_gather, "train", stage.columns))
        if step == 0:
            out["grads"] = {n: m / 0.1 for n, m in whole(engine, groups, "exp_avg").items()}
    out["weights"] = whole(engine, groups, "master")
    held = prepare(held_out(groups), None)
    terms = engine.evaluate(held, stage.forward)
    out["eval"] = channels.metrics(terms, NAMES, groups.all_gather, "eval", stage.columns)
    return out


def held_out(groups: Groups) -> list[MicroBatch]:
    """Seven pairs; the last rank has nothing of them where there are several."""
    from data.batch import empty_micro_batch

    docs, ranks = documents(99)[:7], max(1, groups.dp.size - 1)
    mine = docs[groups.dp.rank :: ranks] if groups.dp.rank < ranks else []
    return [collate(mine) if mine else empty_micro_batch()]


def told(prepared: list[Any]) -> list[tuple[Any, ...]]:
    """Who is matched with whom, by the bits of pictures and the tokens of texts."""
    found = []
    for each in prepared:
        pictures = each.batch.pictures.patches_PX.unflatten(0, (-1, (TILE // PATCH) ** 2)).sum((1, 2))
        texts = each.matches.tokens_T.split(each.matches.lengths)
        for image, text, label in zip(each.matches.image_M, texts, each.label_M, strict=True):
            found.append((round(float(pictures[image]), 4), tuple(text.tolist()), int(label)))
    return found
