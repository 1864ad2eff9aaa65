"""What the pools run to test context parallel: attention over cut packs, and the tiny decoder on its part of one."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist

from data.batch import Document, MicroBatch, Row, collate, split_rows
from models import ModelConfig, build
from models.blocks.attention import BACK_ENDS, Heads, Packing, attention, eager
from models.blocks.context import Context
from models.blocks.rope import Rope
from models.config import Runtime
from models.init import InitSource
from parallel import context as collectives
from parallel.config import EngineConfig, ParallelConfig
from parallel.context import Kind, places
from parallel.groups import Groups
from parallel.materialise import materialise
from parallel.sharding import WHOLE, Axis
from tests.cases import NAMES, TINY, here, whole
from trainer import channels
from trainer.build import make_engine
from trainer.context import local_part
from trainer.optim import OptimConfig
from trainer.stages.next_token import NextToken

UNEVEN = (0, 300, 350, 397, 430, 447, 460, 467, 472, 475, 477, 478, 479)
"""Documents of 300, 50, 47, 33, 17, 13, 7, 5, 3, 2, 1 and 1 tokens."""
PACKS: dict[str, tuple[int, ...]] = {
    "uneven": UNEVEN,
    "one long": (0, 97),
    "equal": (0, 24, 48, 72, 96),
    "shorter than ranks": (0, 1, 2, 4, 5),
    "fewer tokens than ranks": (0, 2),
    "one token": (0, 1),
}


def whole_rows(tokens: int, heads: Heads) -> tuple[torch.Tensor, torch.Tensor]:
    """q|k|v rows and the gradient of the result, of all tokens."""
    random = torch.Generator().manual_seed(5)
    qkv = torch.randn(tokens, sum(heads.parts), generator=random)
    return qkv.double(), torch.randn(tokens, heads.parts[0], generator=random).double()


def _tables(heads: Heads, lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    cfg = ModelConfig("qwen2", 8, 8, 8, 1, heads.queries, heads.groups, heads.dim, 1024)
    cos, sin = Rope(cfg).tables(torch.cat([torch.arange(n) for n in lengths]), lengths)
    return cos.double(), sin.double()


def reference(borders: tuple[int, ...], heads: Heads) -> tuple[torch.Tensor, torch.Tensor]:
    """Result and gradient of the rows in one process, in float64, with every score written out and masked."""
    qkv, grad = whole_rows(borders[-1], heads)
    cos, sin = _tables(heads, [b - a for a, b in pairwise(borders)])
    leaf = qkv.requires_grad_()
    out = eager(leaf * 1.0, Packing.of(cos, sin, borders, {heads.window}), heads)
    out.backward(grad)
    assert leaf.grad is not None
    return out.detach(), leaf.grad


def attend(
    cp: int, kind: Kind, borders: tuple[int, ...], heads: Heads, back_end: str = "sdpa", dtype: Any = torch.float64
) -> Any:
    """This rank's tokens, and their result and gradient."""
    axis = here(ParallelConfig(cp=cp)).cp
    context = Context.of(axis, kind, borders, {heads.window}, torch.device("cpu"))
    place = places(context.placement[axis.rank])
    cos, sin = _tables(heads, [b - a for a, b in pairwise(borders)])
    tables = (cos, sin) if kind == "ulysses" else (cos[place], sin[place])
    packing = Packing.of(*tables, borders, {heads.window}, context)
    qkv, grad = (x[place].to(dtype) for x in whole_rows(borders[-1], heads))
    leaf = qkv.requires_grad_()
    out = attention(leaf * 1.0, packing, heads, BACK_ENDS[back_end])
    out.backward(grad)
    return place, out.detach(), leaf.grad


# ---- the tiny decoder and its training ------------------------------------------------------------------------------

CHANNEL_LENGTHS = ((0, 37), (1, 19), (0, 23), (2, 1), (1, 2), (2, 11), (0, 3))
"""Channel and length of each document of `pack`."""


def pack(lengths: tuple[tuple[int, int], ...] = CHANNEL_LENGTHS) -> MicroBatch:
    """Documents of three channels, their first tokens without a target."""
    random = np.random.default_rng(13)
    docs = []
    for channel, length in lengths:
        learn = np.ones(length, dtype=bool)
        learn[: length // 3] = False
        docs.append(Document(random.integers(0, TINY.vocab_size, size=length), learn, channel))
    return collate(docs)


def decode(cp: int, kind: Kind, model: dict[str, Any], recompute: Any = "none") -> dict[str, Any]:
    """Loss sums by channel, and gradients summed over the cp ranks, of the tiny decoder on this rank's tokens."""
    layout = ParallelConfig(cp=cp, context=kind)
    groups = here(layout) if cp > 1 else Groups(0, 1, torch.device("cpu"), Axis())
    cfg = dataclasses.replace(TINY, **model)
    decoder = build(cfg, groups.place(layout), Runtime(recompute=recompute))
    materialise(decoder, InitSource(cfg, seed=3), WHOLE, torch.device("cpu"))
    batch = local_part(pack(), groups.cp, kind)
    stage = NextToken(len(NAMES))
    loss, sums = stage.forward(decoder, batch, 1 / 30)
    loss.backward()
    with torch.no_grad():
        again = stage.forward(decoder.eval(), batch, 1.0)[1]
    grads = {name: param.grad for name, param in decoder.named_parameters()}
    tensors = [loss.detach(), sums, again, torch.tensor(stage.count([batch])), *grads.values()]
    if cp > 1:
        for tensor in tensors:
            assert tensor is not None
            dist.all_reduce(tensor, group=groups.cp.group)
    return {"loss": tensors[0], "sums": sums, "evaluated": again, "count": float(tensors[3]), "grads": grads}


def train(zero: Any, layout: ParallelConfig, clip: float = 1.0) -> dict[str, Any]:
    """Three steps of the tiny model: four packs of very different sizes each, the smallest of a single token."""
    groups = here(layout)
    optim = OptimConfig(lr=1e-2, clip=clip, eps=1e-4)
    engine = make_engine(TINY, EngineConfig(zero=zero), optim, groups, InitSource(TINY, seed=3), layout)
    stage = NextToken(len(NAMES))
    out: dict[str, Any] = {"metrics": [], "norm": []}
    for step in range(3):
        packs = [((step % 3, 1),), CHANNEL_LENGTHS, ((0, 60 + step),), ((1, 2), (2, 9))]
        rows = [Row((i,), tuple(length for _, length in of_row)) for i, of_row in enumerate(packs)]
        mine = [part[0].pieces[0] for part in split_rows(rows, groups.dp.rank, groups.dp.size, 1)]
        batches = [local_part(pack(packs[i]), groups.cp, layout.context) for i in mine]
        (count,) = groups.sum([stage.count(batches)])
        result = engine.train_step(batches, stage.forward, count, optim.lr)
        out["metrics"].append(channels.metrics(result.metrics, NAMES, groups.all_gather, "train"))
        out["norm"].append(result.grad_norm)
        if step == 0:
            out["grads"] = whole(engine, groups, "exp_avg")
    out["weights"] = whole(engine, groups, "master")
    return out


# ---- what goes over the wire -----------------------------------------------------------------------------------------


def elements_sent(cp: int, kind: Kind, borders: tuple[int, ...], heads: Heads) -> dict[str, int]:
    """Elements this rank hands to other ranks in one forward and backward of attention, by collective."""
    sent = {"all_to_all": 0, "send": 0}
    exchange, pass_on = collectives.dist.all_to_all_single, collectives.dist.batch_isend_irecv
    rank = here(ParallelConfig(cp=cp)).cp.rank

    def all_to_all(got: torch.Tensor, rows: torch.Tensor, received: list[int], sizes: list[int], **how: Any) -> None:
        sent["all_to_all"] += (sum(sizes) - sizes[rank]) * rows.shape[1]
        exchange(got, rows, received, sizes, **how)

    def send(ops: list[Any]) -> list[Any]:
        sent["send"] += ops[0].tensor.numel()
        return pass_on(ops)

    with mock.patch.multiple(collectives.dist, all_to_all_single=all_to_all, batch_isend_irecv=send):
        attend(cp, kind, borders, heads)
    return sent
