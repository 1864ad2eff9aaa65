"""What the pools run to test mixtures of experts: loss, gradients and counts of a model cut in a given layout."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from models import ModelConfig, Runtime, build
from models.config import MoEConfig
from models.init import InitSource
from models.routing import RouterBook, RouterReport
from parallel.config import ParallelConfig
from parallel.context import token_ranges
from parallel.groups import Groups, LauncherRanks, build_groups
from parallel.materialise import TensorSource, materialise
from parallel.sharding import SINGLE, WHOLE, Cut, Place, is_partial, shard_of

MIXTRAL = MoEConfig(num_experts=8, top_k=2, expert_size=24, balance_loss=0.1, z_loss=0.01)
QWEN2 = MoEConfig(8, 3, 16, shared_size=40, shared_gate=True, first_dense=1, normalize=False, balance_loss=0.1)
DEEPSEEK = MoEConfig(
    num_experts=8, top_k=2, expert_size=16, shared_size=32, score="sigmoid", scale=1.5, groups=4, groups_kept=2,
    group_score="top2_sum", correction_bias=True, bias_rate=0.01, balance_loss=0.1, balance_over="sequence",
    z_loss=0.01,
)  # fmt: skip
FULL = dataclasses.replace(DEEPSEEK, groups=1, groups_kept=1, capacity=1.0)
KINDS = {"mixtral": MIXTRAL, "qwen2": QWEN2, "deepseek": DEEPSEEK, "capacity": FULL}
LENGTHS = (17, 5, 23, 9, 1, 12, 30, 8)
"""Of the documents, two a micro-batch."""
CHANNELS = 2


def config(moe: MoEConfig) -> ModelConfig:
    return ModelConfig("qwen3_moe", 64, 32, 48, 2, 4, 2, 8, 64, moe=moe, init_std=0.2)


class BiasedSource(TensorSource):
    """Fresh weights, with correction biases that send tokens where `bias` says (all layers alike)."""

    def __init__(self, cfg: ModelConfig, bias: Sequence[float] | None) -> None:
        self.source, self.bias = InitSource(cfg, 3), bias

    def tensor(self, name: str) -> torch.Tensor:
        whole = self.source.tensor(name)
        return torch.tensor(self.bias) if name.endswith("router.bias") and self.bias is not None else whole


def micro_batches(place: Place) -> list[dict[str, Any]]:
    """Pairs of the documents; under context parallel this rank's tokens of them."""
    draw = torch.Generator().manual_seed(0)
    batches = []
    for pair in zip(LENGTHS[::2], LENGTHS[1::2], strict=True):
        total, borders = sum(pair), [0, pair[0], sum(pair)]
        batch = {
            "tokens_T": torch.randint(0, 64, (total,), generator=draw),
            "positions_T": torch.cat([torch.arange(n) for n in pair]),
            "targets_T": torch.randint(0, 64, (total,), generator=draw),
            "channel_T": torch.tensor([0, 1]).repeat_interleave(torch.tensor(pair)),
        }
        ranges = token_ranges(borders, place.cp.size, place.context)[place.cp.rank]
        here = torch.cat([torch.arange(a, b) for a, b in ranges])
        batches.append({key: value[here] for key, value in batch.items()} | {"cu_seqlens": borders})
    return batches


def step(
    moe: MoEConfig,
    layout: ParallelConfig | None = None,
    recompute: Any = "none",
    bias: Sequence[float] | None = None,
    steps: int = 1,
) -> dict[str, Any]:
    """Forward and backward over all micro-batches, `steps` times over the same weights; of the last: the loss, reduced
    local gradients with the cut this rank holds, and the routers' report."""
    groups: Groups | None = None
    if layout is not None:
        groups = build_groups(LauncherRanks(dist.get_rank(), dist.get_world_size(), dist.get_rank()), 120, layout)
    place = groups.place(layout) if groups and layout else SINGLE
    cfg = config(moe)
    model = build(cfg, place, Runtime(recompute=recompute))
    materialise(model, BiasedSource(cfg, bias), place.cut, torch.device("cpu"))
    book = RouterBook([model], CHANNELS)
    batches = micro_batches(place)
    mine = batches[groups.dp.rank :: groups.dp.size] if groups else batches
    report, loss = RouterReport({}), torch.zeros(())
    for _ in range(steps):
        model.zero_grad()
        book.begin(1 / sum(LENGTHS))
        loss = torch.zeros(())
        for batch in mine:
            part, _ = model(**batch, loss_weight=1 / sum(LENGTHS))
            part.backward()
            loss += part.detach()
        report = book.finish(lambda x: _sum(x, groups.data) if groups else x)
    grads = {name: p.grad for name, p in model.named_parameters()}
    assert all(grad is not None for grad in grads.values())
    biases = {name: buffer.clone() for name, buffer in model.named_buffers()}
    if groups:
        _sum(loss, groups.data)
        for param in model.parameters():
            assert param.grad is not None
            _sum(param.grad, groups.expert_data if shard_of(param).experts else groups.data)
            if is_partial(param):
                _sum(param.grad, groups.tp)
    cut = place.cut if groups else WHOLE
    return {"loss": loss, "grads": grads, "cut": cut, "report": report, "biases": biases, "state": book.state()}


def _sum(tensor: torch.Tensor, axis: Any) -> torch.Tensor:
    if axis.size > 1:
        dist.all_reduce(tensor, group=axis.group)
    return tensor


def merged_gradients(moe: MoEConfig, ranks: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Whole gradients from those of all ranks; of ranks that hold the same part, the last."""
    found = {}
    for name, param in build(config(moe)).named_parameters():
        shard = shard_of(param)
        parts: dict[Cut, torch.Tensor] = {shard.own(rank["cut"]): rank["grads"][name] for rank in ranks}
        found[name] = shard.merge(parts)
    return found
