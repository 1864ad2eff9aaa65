"""What the pools run to test adapters: a tiny model whose adapters are trained in a given layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from convert.adapters import trained
from convert.peft_files import read_peft
from models import ModelConfig, build
from models.adapters.config import AdapterConfig
from models.adapters.source import AdapterSource
from models.adapters.virtual import VirtualSource
from models.adapters.virtual_config import PrefixConfig, PromptConfig
from models.init import InitSource
from models.routing import RouterBook
from parallel.config import EngineConfig, ParallelConfig
from parallel.groups import ALL_DATA
from parallel.materialise import TensorSource
from parallel.nf4 import Nf4
from tests.cases import NAMES, here, my_parts, whole
from tests.peft_reference import SEED
from trainer import channels, checkpoint
from trainer.build import make_engine
from trainer.optim import OptimConfig
from trainer.stages.next_token import NextToken

LR, EPS = 3e-3, 1e-3


def train(
    cfg: ModelConfig,
    adapter: AdapterConfig,
    *,
    zero: Any = 1,
    layout: ParallelConfig = ALL_DATA,
    recompute: Any = "none",
    precision: Any = "fp32",
    micro_rows: int = 8,
    steps: int = 3,
    first: int = 0,
    start: str | None = None,
    save_to: str | None = None,
    resume_from: str | None = None,
) -> dict[str, Any]:
    """Losses, norms, first gradients and the adapter after some steps; what the engine holds; losses without it."""
    groups = here(layout)
    saved = checkpoint.Checkpoint(Path(resume_from)) if resume_from else None
    begin = read_peft(Path(start), cfg).tensors if start else None
    source = source_of(cfg, adapter, saved, begin)
    optim = OptimConfig(lr=LR, clip=0.0, eps=EPS, weight_decay=0.0)
    engine_cfg = EngineConfig(zero=zero, recompute=recompute, precision=precision)
    engine = make_engine(cfg, engine_cfg, optim, groups, source, layout, adapter=adapter, seed=5)
    if saved:
        checkpoint.restore(saved, engine, groups)
    stage = NextToken(len(NAMES))
    out: dict[str, Any] = {"losses": [], "norm": [], "off": []}

    def loss_of(terms: list[Any]) -> float:
        return channels.metrics(terms, NAMES, groups.all_gather, "train")["train/loss"]

    for step in range(first, first + steps):
        batches = my_parts(step, groups, layout, micro_rows)
        (count,) = groups.sum([stage.count(batches)])
        with engine.adapters_off():
            out["off"].append(loss_of(engine.evaluate(batches, stage.forward)))
        result = engine.train_step(batches, stage.forward, count, LR)
        out["losses"].append(loss_of(result.metrics))
        out["norm"].append(result.grad_norm)
        if step == first:
            out["grads"] = {n: m / (1 - optim.betas[0]) for n, m in whole(engine, groups, "exp_avg").items()}
    if save_to:
        state = {"position": 0, "world": groups.world, "model": {}, "data": "", "routers": []}
        out["saved"] = str(checkpoint.save(Path(save_to), first + steps, engine, state, groups, keep_last=2))
    out["weights"] = whole(engine, groups, "master")
    frozen = [p for _, p in engine.named_parameters() if not p.requires_grad]
    out["frozen_gradients"] = sum(p.grad is not None for p in frozen)
    packed = [p.bytes for c in engine.chunks for m in c.modules() if isinstance(p := getattr(m, "packed", None), Nf4)]
    out["bytes"] = sum(4 * p.numel() for p in frozen) + sum(packed)
    out["parameters"] = sum(p.numel() for p in build(cfg).parameters())
    out["moments"] = sum(s.numel() for f in engine.fragments() for s in f.states.values())
    return out


def source_of(cfg: ModelConfig, adapter: AdapterConfig, saved: Any = None, begin: Any = None) -> TensorSource:
    """The tiny model's weights with an adapter's."""
    base = InitSource(cfg, seed=SEED)
    if isinstance(adapter, PromptConfig | PrefixConfig):
        named = None if begin is None else {key.module: tensor for key, tensor in begin.items()}
        return VirtualSource(base, cfg, adapter, 5, saved, named, words=(7, 3))
    return AdapterSource(base, cfg, adapter, 5, saved, begin)


def gathered(found: dict[str, torch.Tensor], cfg: ModelConfig, adapter: AdapterConfig) -> Any:
    """Flat tensors by our names as an adapter."""
    source = source_of(cfg, adapter)
    shaped = {name: flat.view(source.tensor(name).shape) for name, flat in found.items()}

    class Held:
        def tensor(self, name: str) -> torch.Tensor:
            return shaped[name]

    return trained(Held(), list(shaped), cfg, adapter)  # pyright: ignore[reportArgumentType]


def router_tokens(cfg: ModelConfig, adapter: AdapterConfig) -> list[float]:
    """How many tokens each layer's router counted in one step."""
    groups = here(ALL_DATA)
    source = AdapterSource(InitSource(cfg, seed=SEED), cfg, adapter, 5)
    engine = make_engine(cfg, EngineConfig(), OptimConfig(), groups, source, adapter=adapter)
    stage, book = NextToken(len(NAMES)), RouterBook(engine.chunks, len(NAMES))
    batches = my_parts(0, groups, ALL_DATA, 8)
    (count,) = groups.sum([stage.count(batches)])
    book.begin(1.0)
    engine.train_step(batches, stage.forward, count, LR)
    report = book.finish(lambda tensor: tensor)
    return [float(layer.tokens_C.sum()) for layer in report.layers.values()]
