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
from parallel import matmul
from parallel.config import ParallelConfig
from parallel.groups import LauncherRanks, build_groups
from parallel.materialise import materialise
from parallel.pipeline import Pipeline, _Step
from parallel.sharding import SINGLE, WHOLE, name_of
from parallel.step_clock import StepClock
from tests.cases import TINY, here
from trainer.stages.next_token import NextToken

PLAIN = Runtime()
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
    named = [(name_of(p, n), p) for model in models for n, p in model.named_parameters() if p.requires_grad]
    for name, param in named:
        assert param.grad is not None, name
        found[name] = found[name] + param.grad if name in found else param.grad.clone()
    return found


def steps_of(counts: list[int]) -> list[tuple[list[MicroBatch], float]]:
    """Micro-batches and loss weight of each step."""
    made = [micro_batches(count, seed) for seed, count in enumerate(counts)]
    return [(batches, 1.0 / STAGE.count(batches)) for batches in made]


def alone(cfg: ModelConfig, counts: list[int], freeze: int = -1) -> list[dict[str, Any]]:
    """Every step on the whole model in one process, with autograd's own accumulation."""
    model = frozen(filled(build(cfg)), freeze)
    out = []
    for batches, weight in steps_of(counts):
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


def frozen(model: Decoder, layers: int) -> Decoder:
    """The embedding and the first `layers` layers are not trained."""
    for name, param in model.named_parameters():
        number = name.split(".")[1] if name.startswith("layers.") else "-1" if name.startswith("embed.") else None
        param.requires_grad_(number is None or int(number) >= layers)
    return model


def pipeline_of(
    cfg: ModelConfig, layout: ParallelConfig, runtime: Runtime = PLAIN, freeze: int = -1
) -> tuple[list[Decoder], Pipeline]:
    """This rank's chunks, filled, and the pipeline around them."""
    groups = build_groups(LauncherRanks(here().rank, here().world, here().rank), 300, layout)
    chunks = [filled(build(cfg, SINGLE, runtime, chunk)) for chunk in chunks_of(cfg, layout, groups.pp.rank)]
    chunks = [frozen(chunk, freeze) for chunk in chunks]
    return chunks, Pipeline(chunks, layout, groups.pp, CPU, cfg.hidden_size)


def piped(
    layout: ParallelConfig, cfg: ModelConfig, counts: list[int], recompute: Any = "none", freeze: int = -1
) -> list[dict[str, Any]]:
    """The same steps through the pipeline; each rank's share."""
    chunks, pipe = pipeline_of(cfg, layout, Runtime(recompute=recompute), freeze)
    out = []
    for batches, weight in steps_of(counts):
        for chunk in chunks:
            chunk.zero_grad()
        terms = pipe.train(batches, STAGE.forward, weight)
        out.append({"terms": terms, "gradients": gradients(chunks), "time": pipe.last_step()})
        out[-1]["scores"] = pipe.evaluate(batches, STAGE.forward)
    return out


def scored(layout: ParallelConfig, cfg: ModelConfig, count: int) -> list[torch.Tensor]:
    """Forward only, through a pipeline that never trained."""
    _, pipe = pipeline_of(cfg, layout)
    return pipe.evaluate(micro_batches(count), STAGE.forward)


def sent_gradients(layout: ParallelConfig, cfg: ModelConfig, freeze: int) -> list[bool]:
    """Whether gradients come back into each stage of this rank."""
    _, pipe = pipeline_of(cfg, layout, freeze=freeze)
    return [stage.behind is not None and stage.behind.has_grad for stage in pipe.stages]


def weight_products(layout: ParallelConfig, cfg: ModelConfig, count: int) -> dict[str, int]:
    """How many weight gradients of linear layers ran inside a backward, and how many after it."""
    _, pipe = pipeline_of(cfg, layout)
    found = {"within": 0, "after": 0}
    original = matmul.weight_gradient

    def counted(*args: Any) -> torch.Tensor:
        # The runner of put-off gradients is the only caller outside of autograd's engine.
        within = torch._C._current_graph_task_id() != -1
        found["within" if within else "after"] += 1
        return original(*args)

    matmul.weight_gradient = counted
    try:
        pipe.train(micro_batches(count), STAGE.forward, 1.0)
    finally:
        matmul.weight_gradient = original
    return found


def failing(layout: ParallelConfig, cfg: ModelConfig) -> str:
    """A mistake of the user's that only the model finds: what becomes of it, on a stage that waits for no other."""
    chunks, pipe = pipeline_of(cfg, layout)
    chunks[0].forward = _refuse
    stage = pipe.stages[0]
    stage.begin(_Step(micro_batches(1), [1], STAGE.forward, 1.0, StepClock(CPU)), has_backward=True)
    stage.args_recv_info[0] = ()
    try:
        stage.forward_one_chunk(0, (), {"number": 0})
    except ValueError as error:
        return str(error)
    return "no error"


def _refuse(*_: Any, **__: Any) -> None:
    raise ValueError("this batch is no good")
