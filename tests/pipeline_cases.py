"""What the pools run to test the pipeline: stages of a tiny model against the whole model in one process."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch

from data.batch import Document, MicroBatch, collate
from models import Runtime, build
from models.balance import chunks_of
from models.config import ModelConfig
from models.decoder import Decoder
from models.init import InitSource
from parallel.config import ParallelConfig
from parallel.groups import LauncherRanks, build_groups
from parallel.materialise import materialise
from parallel.pipeline import Pipeline
from parallel.sharding import SINGLE, WHOLE, name_of
from tests.cases import TINY, here
from trainer.stages.next_token import NextToken

STAGE = NextToken(2)
CPU = torch.device("cpu")


def micro_batches(count: int, seed: int = 0) -> list[MicroBatch]:
    """`count` micro-batches, each with another number of tokens, documents and targets."""
    random = np.random.default_rng([5, seed])
    made = []
    for index in range(count):
        docs = []
        for length in random.integers(2, 14, size=1 + index % 3):
            learn = random.random(length) < 0.7
            learn[-1] = True
            docs.append(Document(random.integers(0, TINY.vocab_size, size=length), learn, index % 2))
        made.append(collate(docs))
    assert count < 3 or len({len(b.tokens_T) for b in made}) > 1
    return made


def model_config(layers: int, tied: bool = False) -> ModelConfig:
    return dataclasses.replace(TINY, num_layers=layers, tied_embeddings=tied)


def filled(model: Decoder) -> Decoder:
    materialise(model, InitSource(model.cfg, seed=3), WHOLE, CPU)
    return model


def gradients(models: list[Decoder]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for name, param in [(name_of(p, n), p) for model in models for n, p in model.named_parameters()]:
        assert param.grad is not None, name
        found[name] = found[name] + param.grad if name in found else param.grad.clone()
    return found


def steps_of(cfg: ModelConfig, counts: list[int]) -> list[tuple[list[MicroBatch], float]]:
    """Micro-batches and loss weight of each step."""
    made = [micro_batches(count, seed) for seed, count in enumerate(counts)]
    return [(batches, 1.0 / STAGE.count(batches)) for batches in made]


def alone(cfg: ModelConfig, counts: list[int]) -> list[dict[str, Any]]:
    """Every step on the whole model in one process, with autograd's own accumulation."""
    model = filled(build(cfg))
    out = []
    for batches, weight in steps_of(cfg, counts):
        model.zero_grad()
        terms = []
        for batch in batches:
            loss, sums = STAGE.forward(model, batch, weight)
            loss.backward()
            terms.append(sums)
        with torch.no_grad():
            scores = [STAGE.forward(model, batch, 1.0)[1] for batch in batches]
        out.append({"terms": terms, "gradients": gradients([model]), "scores": scores})
    return out


def pipeline_of(cfg: ModelConfig, layout: ParallelConfig, runtime: Runtime) -> tuple[list[Decoder], Pipeline]:
    groups = build_groups(LauncherRanks(here().rank, here().world, here().rank), 300, layout)
    chunks = [filled(build(cfg, SINGLE, runtime, chunk)) for chunk in chunks_of(cfg, layout, groups.pp.rank)]
    pipe = Pipeline(chunks, layout, groups.pp, CPU, cfg.hidden_size)
    return chunks, pipe


def piped(layout: ParallelConfig, cfg: ModelConfig, counts: list[int], recompute: Any = "none") -> list[dict[str, Any]]:
    """The same steps through the pipeline; each rank's share."""
    chunks, pipe = pipeline_of(cfg, layout, Runtime(recompute=recompute))
    out = []
    for batches, weight in steps_of(cfg, counts):
        for chunk in chunks:
            chunk.zero_grad()
        terms = pipe.train(batches, STAGE.forward, weight)
        found = {"terms": terms, "gradients": gradients(chunks), "time": pipe.last_step}
        found["scores"] = pipe.evaluate(batches, STAGE.forward)
        out.append(found)
    return out
