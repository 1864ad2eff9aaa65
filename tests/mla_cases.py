"""What the pools run for latent attention: a decoder in some layout, with all that must not depend on the layout."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist

from models import ModelConfig, RopeConfig, Runtime, build
from models.config import MLAConfig, MoEConfig
from models.init import InitSource
from parallel.collectives import all_reduce
from parallel.config import ParallelConfig
from parallel.context import token_ranges
from parallel.groups import Groups, LauncherRanks, build_groups
from parallel.materialise import materialise
from parallel.sharding import SINGLE, is_partial

BORDERS = (0, 9, 10, 23)
YARN = RopeConfig(scaling="yarn", factor=8.0, original_max_seq_len=16, mscale=1.0, mscale_all_dim=0.7)
LATENT = ModelConfig(
    family="deepseek_v3",
    vocab_size=32,
    hidden_size=24,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_dim=10,
    max_seq_len=64,
    norm_eps=1e-6,
    rope=YARN,
    mla=MLAConfig(kv_rank=12, nope_dim=6, rope_dim=4, value_dim=8, q_rank=14),
    init_std=0.15,
)
EXPERTS = MoEConfig(
    num_experts=8,
    top_k=2,
    expert_size=8,
    shared_size=8,
    first_dense=1,
    score="sigmoid",
    scale=2.5,
    groups=4,
    groups_kept=2,
    group_score="top2_sum",
    correction_bias=True,
)
OPTIONS: dict[str, ModelConfig] = {
    "latent_queries": LATENT,
    "plain_queries": dataclasses.replace(
        LATENT, family="deepseek_v2", mla=MLAConfig(kv_rank=12, nope_dim=6, rope_dim=4, value_dim=8)
    ),
    "biases": dataclasses.replace(LATENT, qkv_bias=True, attention_out_bias=True),
    "experts": dataclasses.replace(LATENT, moe=EXPERTS),
}


_made: dict[ParallelConfig, Groups] = {}


def groups_of(layout: ParallelConfig) -> Groups:
    """This pool's groups in a layout; made once a process."""
    if layout not in _made:
        rank, size = dist.get_rank(), dist.get_world_size()
        _made[layout] = build_groups(LauncherRanks(rank, size, rank), 60, layout)
    return _made[layout]


def run(option: str, layout: ParallelConfig | None, recompute: Any = "none") -> dict[str, torch.Tensor]:
    """Loss, logits and whole sums of this rank's gradients, of the decoder in a layout of the pool or in one piece.

    `here` are the tokens of this rank, of which `losses` and `logits` are.
    """
    cfg = OPTIONS[option]
    place = SINGLE if layout is None else groups_of(layout).place(layout)
    model = build(cfg, place, Runtime(recompute=recompute))
    materialise(model, InitSource(cfg, 3), place.cut, torch.device("cpu"))
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 32, (BORDERS[-1],), generator=draw)
    targets = torch.randint(0, 32, (BORDERS[-1],), generator=draw)
    targets[::4] = -100
    positions = torch.cat([torch.arange(b - a) for a, b in pairwise(BORDERS)])
    ranges = token_ranges(BORDERS, place.cp.size, place.context)[place.cp.rank]
    here = torch.cat([torch.arange(a, b) for a, b in ranges])
    loss, losses = model(tokens[here], positions[here], BORDERS, 13, targets[here], 0.1)
    loss.backward()
    found = {"here": here, "loss": all_reduce(loss.detach().clone(), place.cp), "losses": losses}
    with torch.no_grad():
        found["logits"] = model(tokens[here], positions[here], BORDERS, 13, output="head")[: len(here)]
    for name, param in model.named_parameters():
        assert param.grad is not None, name
        grad = all_reduce(param.grad, place.tp) if is_partial(param) else param.grad
        found[name] = all_reduce(grad, place.cp)
    return found
