"""What one process sees of a few training steps, written down with the place of every number in the whole.

The steps are those of ``trainer.loop``: the same engine, micro-batches, stage and metrics as in training.
Legend: T tokens of a micro-batch (those here, or with a place the whole), D hidden size.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from data.batch import MicroBatch
from models import Decoder, build
from models.config import ModelConfig
from models.init import InitSource
from models.routing import RouterBook
from parallel.context import token_ranges
from parallel.engine import Engine
from parallel.groups import Groups
from parallel.materialise import TensorSource
from parallel.sharding import Cut, Place, Shard, init_of, is_partial
from trainer.build import make_engine
from trainer.config import RunConfig
from trainer.logging.log import NullLog
from trainer.loop import Progress, Trainer
from trainer.pictures import picture_config
from trainer.verify.learning import preparation, stage_of
from trainer.verify.rows import MadeUpRows


@dataclass(frozen=True)
class Rows:
    """Rows of what a module gave for a micro-batch. The inputs of the model count as modules too."""

    module: str
    batch: int
    """The micro-batch's number in the global batch."""
    at: torch.Tensor
    """int64 [n]: which of the micro-batch's T tokens the rows belong to."""
    values: torch.Tensor
    """[n, ...]"""


@dataclass(frozen=True)
class Range:
    """A flat range of the part of a parameter that lies here."""

    name: str
    start: int
    values: torch.Tensor
    shard: Shard
    cut: Cut
    whole: tuple[int, ...]


@dataclass
class Record:
    """Everything one process has to tell."""

    rank: int
    place: Mapping[str, int]
    """Its rank on each axis."""
    rows: list[Rows] = field(default_factory=list)
    borders: dict[int, tuple[int, ...]] = field(default_factory=dict)
    """Document borders of each micro-batch."""
    start: list[Range] = field(default_factory=list)
    gradients: list[Range] = field(default_factory=list)
    """Of the first step, before clipping."""
    weights: list[Range] = field(default_factory=list)
    numbers: dict[str, float] = field(default_factory=dict)
    """Losses, norms and counts by name and step."""
    names: tuple[str, ...] = ()
    """Parameters here, in the order of the model."""
    partial: frozenset[str] = frozenset()
    """Those whose gradient each tp rank has a part of."""


def record(cfg: RunConfig, groups: Groups) -> Record:
    """Train ``cfg.run.steps`` steps on made-up rows in this process's place of ``groups``.

    ``cfg`` is one that ``trainer.verify.shrink`` made.
    """
    axes = {name: getattr(groups, name).rank for name in ("tp", "pp", "cp", "dp", "ep")}
    found = Record(groups.rank, axes)
    engine = make_engine(cfg.model, cfg.engine, cfg.optim, groups, UnevenSource(cfg.model, cfg.run.seed), cfg.parallel)
    named = list(engine.named_parameters())
    found.names = tuple(name for name, _ in named)
    found.partial = frozenset(name for name, param in named if is_partial(param))
    found.start = _ranges(engine, "master")
    watch = _Watch(engine.chunks, groups, groups.place(cfg.parallel), found)
    log = _Numbers(found)
    stage = stage_of(cfg, groups)
    rows = MadeUpRows(cfg.data, cfg.model.vocab_size, cfg.stage, picture_config(cfg.model))
    made_up: Any = rows
    trainer = Trainer(
        cfg=cfg,
        groups=groups,
        engine=engine,
        stage=stage,
        routers=RouterBook(engine.chunks, len(MadeUpRows.channels)),
        data=made_up,
        log=log,
        flops=_no_flops,
        save=functools.partial(_state_after, cfg, engine, watch, log, found),
        total_steps=cfg.run.steps or 0,
        prepare=preparation(cfg, groups, stage, engine, rows, UnevenSource(cfg.model, cfg.run.seed + 1)),
    )
    trainer.run(Progress())
    return found


def _no_flops(batch: MicroBatch) -> float:
    return 0.0


def _state_after(
    cfg: RunConfig, engine: Engine, watch: _Watch, log: _Numbers, found: Record, progress: Progress
) -> None:
    """What a checkpoint would be made of, instead of one."""
    if progress.step == 1:
        watch.close()
        # AdamW's first moment after one step is (1 - beta1) times the gradient, which the norm has clipped.
        norm, clip = log.norm, cfg.optim.clip
        clipped = min(1.0, clip / (norm + 1e-6)) if clip else 1.0
        found.gradients = _ranges(engine, "exp_avg", 1 / ((1 - cfg.optim.betas[0]) * clipped))
    if progress.step == cfg.run.steps:
        found.weights = _ranges(engine, "master")


def _ranges(engine: Engine, kind: str, factor: float = 1.0) -> list[Range]:
    """All that lies here of the weights or an optimizer state, also what other ranks have too."""
    found = []
    for piece in engine.fragments(once=False):
        view = piece.master if kind == "master" else piece.states.get(kind)
        if view is not None:
            values = view.detach().float().cpu() * factor
            found.append(Range(piece.name, piece.start, values, piece.shard, piece.cut, piece.whole))
    return found


class UnevenSource(TensorSource):
    """Fresh weights in which norms are not all 1 and biases not all 0: those would hide a bias that is added twice."""

    def __init__(self, cfg: ModelConfig, seed: int) -> None:
        self._fresh, self._seed = InitSource(cfg, seed), seed
        self._plain = {name for name, p in build(cfg).named_parameters() if init_of(p) in ("ones", "zeros")}

    def tensor(self, name: str) -> torch.Tensor:
        """The whole tensor of a parameter."""
        fresh = self._fresh.tensor(name)
        if name not in self._plain:
            return fresh
        seed = self._seed + sum(i * ord(letter) for i, letter in enumerate(name, 1))
        return fresh + 0.1 * torch.randn(fresh.shape, generator=torch.Generator().manual_seed(seed))


class _Numbers(NullLog):
    """A log that keeps losses, counts and norms."""

    def __init__(self, found: Record) -> None:
        self.found, self.norm = found, 0.0

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        self.norm = metrics["train/grad_norm"]
        self._keep(f"step {step}", metrics)

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        self._keep(f"evaluation after step {step}", metrics)

    def _keep(self, when: str, metrics: Mapping[str, float]) -> None:
        for key, value in metrics.items():
            if not key.startswith("perf/") and key != "train/lr":
                self.found.numbers[f"{key} {when}"] = value


class _Watch:
    """Hooks that write down what modules give in the forward of the first training step."""

    def __init__(self, chunks: list[Any], groups: Groups, place: Place, found: Record) -> None:
        self.groups, self.place, self.found = groups, place, found
        self.batch, self.tokens = -1, 0
        self.at = torch.arange(0)
        self._handles = []
        for chunk in chunks:
            counter = {"calls": 0}
            begin = functools.partial(self._begin, counter)
            self._handles.append(chunk.register_forward_pre_hook(begin, with_kwargs=True))
            self._handles.append(chunk.register_forward_hook(self._end, always_call=True))
            for name, module in _watched(chunk).items():
                self._handles.append(module.register_forward_hook(functools.partial(self._output, name)))

    def close(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def _begin(self, counter: dict[str, int], chunk: Any, args: Any, given: dict[str, Any]) -> None:
        if not chunk.training:
            return
        # Micro-batches are dealt out in turn over dp; every stage takes a rank's in order.
        self.batch = self.groups.dp.rank + counter["calls"] * self.groups.dp.size
        counter["calls"] += 1
        borders = tuple(int(border) for border in given["cu_seqlens"])
        self.tokens = given["tokens_T"].shape[0]
        ranges = token_ranges(borders, self.place.cp.size, self.place.context)[self.place.cp.rank]
        whole = self.place.cp.size == 1
        self.at = torch.arange(self.tokens) if whole else torch.cat([torch.arange(a, b) for a, b in ((0, 0), *ranges)])
        self.found.borders[self.batch] = borders
        for key in ("tokens_T", "positions_T", "targets_T"):
            if given.get(key) is not None:
                self._keep(key, given[key])

    def _end(self, chunk: Any, args: Any, output: Any) -> None:
        self.batch = -1  # a layer that runs again in the backward is not written down

    def _output(self, name: str, module: Any, args: Any, output: Any) -> None:
        if self.batch >= 0:
            # A norm also gives how to make it again; the head gives the loss, and that of each token, or the
            # log-probability of each, and the entropy.
            several = isinstance(output, tuple)
            self._keep(name, output[int(output[0].dim() == 0)] if several else output)

    def _keep(self, name: str, values: torch.Tensor) -> None:
        values = values.detach().cpu().clone()
        cut = self.place.splits_rows and name not in ("head", "tokens_T", "positions_T", "targets_T")
        first = self.place.tp.rank * values.shape[0] if cut else 0
        here = max(0, min(values.shape[0], self.tokens - first))  # behind them is padding
        self.found.rows.append(Rows(name, self.batch, self.at[first : first + here], values[:here]))


def _watched(chunk: nn.Module) -> dict[str, nn.Module]:
    """The modules whose outputs are compared, by name, in the order they run; of a pair of encoders none."""
    if not isinstance(chunk, Decoder):
        return {}
    found: dict[str, nn.Module | None] = {"embed": chunk.embed}
    for index, layer in chunk.layers.items():
        found[f"layers.{index}.attn"] = layer.get_submodule("attn")
        found[f"layers.{index}.mlp"] = layer.get_submodule("mlp")
    found |= {"norm": chunk.norm, "head": chunk.head}
    return {name: module for name, module in found.items() if module is not None}
