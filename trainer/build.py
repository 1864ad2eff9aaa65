"""The models of a run: this rank's part of each, filled, and handed to the engine or frozen."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import models
from convert.loom_files import Checkpoint
from convert.source import Source
from models.adapters.attach import ask_for_input_gradients, attach
from models.adapters.config import AdapterConfig
from models.balance import chunks_of
from models.config import ModelConfig
from models.decoder import Decoder, Layer
from models.init import InitSource
from models.parts import ALL, PartsConfig, freeze, give_idle, trained_of
from models.vision.tower_layers import Layer as TowerLayer
from parallel.config import EngineConfig, ParallelConfig
from parallel.engine import Engine, Forward
from parallel.frozen import Frozen
from parallel.groups import ALL_DATA, Groups
from parallel.materialise import TensorSource
from trainer import adapters, folders, parts
from trainer.config import RunConfig
from trainer.optim import OptimConfig, decay_groups

CPU_LOGITS_BYTES, GPU_LOGITS_BYTES = 24 * 2**20, 512 * 2**20
"""fp32 logits in the loss at one time. On a CPU below what malloc serves from the heap: a larger block would be mapped
and page-faulted anew for every micro-batch."""
CPU_KEPT_BYTES, GPU_KEPT_BYTES = 256 * 2**20, 1024 * 2**20
"""fp32 probabilities that log-probabilities keep from the forward to the backward, on each rank."""


def make_engine(
    model_cfg: ModelConfig,
    engine_cfg: EngineConfig,
    optim: OptimConfig,
    groups: Groups,
    source: TensorSource,
    layout: ParallelConfig = ALL_DATA,
    row_length: int | None = None,
    adapter: AdapterConfig | None = None,
    seed: int = 0,
) -> Engine:
    """This rank's part of the model on the meta device, filled from ``source`` and handed to DeepSpeed.

    ``row_length`` is the usual number of tokens of a row, by which pipeline stages are balanced. With an ``adapter``
    nothing else is trained; its dropout follows from ``seed``.
    """
    chunks = make_chunks(model_cfg, engine_cfg, groups, layout, row_length, optim.parts if adapter is None else ALL)
    if adapter is None:
        for chunk in chunks:
            freeze(chunk, optim.parts, engine_cfg.zero == 3)
        if not any(param.requires_grad for chunk in chunks for param in chunk.parameters()):
            give_idle(chunks[0])
    else:
        for chunk in chunks:
            assert isinstance(chunk, Decoder), "adapters are for decoders"
            attach(chunk, adapter, seed)
            if engine_cfg.zero == 3 or model_cfg.moe is not None:
                ask_for_input_gradients(chunk)
    adamw = functools.partial(_adamw, optim)
    width, whole = model_cfg.hidden_size, units(model_cfg)
    return Engine(chunks, source, adamw, engine_cfg, optim.clip, groups, layout, width, whole)


def make_frozen(
    model_cfg: ModelConfig,
    engine_cfg: EngineConfig,
    groups: Groups,
    source: TensorSource,
    layout: ParallelConfig = ALL_DATA,
    row_length: int | None = None,
    offload: bool = False,
    adapter: AdapterConfig | None = None,
) -> Frozen:
    """This rank's part of a model that is not trained (a reference, a reward model), in the layout of the run; with an
    ``adapter`` that ``source`` has too."""
    chunks = make_chunks(model_cfg, engine_cfg, groups, layout, row_length)
    if adapter is not None:
        for chunk in chunks:
            assert isinstance(chunk, Decoder), "adapters are for decoders"
            attach(chunk, adapter)
    return Frozen(chunks, source, engine_cfg, groups, layout, model_cfg.hidden_size, units(model_cfg), offload)


@dataclass(frozen=True)
class WithoutAdapter:
    """The model that an adapter is put on, as it was: the trained model's own weights. Scores as ``Frozen`` does."""

    engine: Engine

    def score(self, micro_batches: Sequence[Any], forward: Forward) -> list[Any]:
        """As ``Engine.score``."""
        with self.engine.adapters_off():
            return self.engine.score(micro_batches, forward)


def make_chunks(
    model_cfg: ModelConfig,
    engine_cfg: EngineConfig,
    groups: Groups,
    layout: ParallelConfig = ALL_DATA,
    row_length: int | None = None,
    parts: PartsConfig = ALL,
) -> list[models.Model]:
    """The pipeline stages of this rank, or the model, on the meta device; balanced for training ``parts`` of it."""
    on_gpu, token_bytes = groups.device.type == "cuda", 4 * model_cfg.vocab_size
    chunk = engine_cfg.loss_chunk or max((GPU_LOGITS_BYTES if on_gpu else CPU_LOGITS_BYTES) // token_bytes, 64)
    keep = (GPU_KEPT_BYTES if on_gpu else CPU_KEPT_BYTES) * groups.tp.size // token_bytes
    runtime = models.Runtime(engine_cfg.attention, engine_cfg.recompute, chunk, keep)
    whole = [models.Chunk.whole(model_cfg)]
    trained = trained_of(model_cfg, parts)
    chosen = chunks_of(model_cfg, layout, groups.pp.rank, row_length, trained) if layout.pp > 1 else whole
    return [models.build(model_cfg, groups.place(layout), runtime, part) for part in chosen]


def units(model_cfg: ModelConfig) -> list[type[nn.Module]]:
    """The modules that ZeRO-3 gathers as a whole."""
    return [TowerLayer] if model_cfg.compares else [Layer]


def _adamw(optim: OptimConfig, model: nn.Module) -> torch.optim.Optimizer:
    groups = decay_groups(model, optim.weight_decay)
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)


def weights_of(cfg: RunConfig, saved: Checkpoint | None) -> TensorSource:
    """The weights to train: those of the checkpoint a run goes on from, or what it starts from; with an adapter,
    or where only parts are trained, both.

    Raises:
        ValueError: the tensors in init_from are not the model's.
    """
    if cfg.adapter is not None:
        return adapters.weights(cfg, fresh_weights(cfg), saved)
    return parts.weights(cfg, functools.partial(fresh_weights, cfg), saved)


def fresh_weights(cfg: RunConfig) -> TensorSource:
    """What a run starts from: the weights of init_from, or fresh ones.

    Raises:
        ValueError: the tensors in init_from are not the model's.
    """
    if cfg.init_from is None and not cfg.init_parts.folders:
        return InitSource(cfg.model, cfg.run.seed)
    opened = parts.composed_start(cfg) if cfg.init_from is None else folders.opened(cfg.init_from)
    source = Source(opened, cfg.model, cfg.run.seed)
    source.check()
    return source
