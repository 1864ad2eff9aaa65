"""What the pools run to test context parallel: attention over cut packs, and the tiny decoder on its part of one."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from data.batch import Document, MicroBatch, collate
from models import ModelConfig, build
from models.blocks.attention import BACK_ENDS, Heads, Packing, attention, eager
from models.blocks.context import Context
from models.blocks.rope import Rope
from models.config import Runtime
from models.init import InitSource
from parallel.config import ParallelConfig
from parallel.context import Kind, places
from parallel.groups import Groups, LauncherRanks, build_groups
from parallel.materialise import materialise
from parallel.sharding import WHOLE, Axis
from tests.cases import NAMES, TINY
from trainer.context import local_part
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
_made: dict[tuple[int, Any], Groups] = {}


def groups_of(cp: int, **layout: Any) -> Groups:
    """This pool's groups with cp ranks sharing tokens; made once a process."""
    key = (cp, tuple(sorted(layout.items())))
    if key not in _made:
        rank, size = dist.get_rank(), dist.get_world_size()
        _made[key] = build_groups(LauncherRanks(rank, size, rank), 60, ParallelConfig(cp=cp, **layout))
    return _made[key]


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
    axis = groups_of(cp).cp
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


# ---- the tiny decoder ------------------------------------------------------------------------------------------------

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


def decode(cp: int, kind: Kind, model: dict[str, Any], recompute: Any = "none", **layout: Any) -> dict[str, Any]:
    """Loss sums by channel, and gradients summed over the cp ranks, of the tiny decoder on this rank's tokens."""
    groups = groups_of(cp, context=kind, **layout) if cp > 1 else Groups(0, 1, torch.device("cpu"), Axis())
    cfg = dataclasses.replace(TINY, **model)
    decoder = build(cfg, groups.place(ParallelConfig(cp=cp, context=kind)), Runtime(recompute=recompute))
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
