"""What `parallel.traffic_formula` asks for, read off a configured model, its engine and its micro-batches."""

from __future__ import annotations

from data.batch import MicroBatch
from models import ModelConfig
from parallel.config import EngineConfig, ParallelConfig
from parallel.context import lengths_here, token_ranges
from parallel.engine import Engine
from parallel.gradients import local_shape, shared_ranges
from parallel.groups import Groups
from parallel.schedules import stage_ids
from parallel.sharding import is_partial, shard_of
from parallel.traffic_formula import FP32, Micro, Part, Step


def part_of(cfg: ModelConfig, layout: ParallelConfig, engine: Engine, groups: Groups) -> Part:
    """What of the model is on this rank.

    Raises:
        ValueError: latent attention sends other things round than keys and values, and has no formula here.
    """
    if cfg.mla is not None and layout.cp > 1:
        raise ValueError("the formula for cp > 1 knows grouped-query attention only, not latent attention")
    experts = dense = summed = tied = 0
    for _, param in engine.named_parameters():
        elements = 1
        for size in local_shape(param):
            elements *= size
        if shard_of(param).experts and layout.ep > 1:
            experts += FP32 * elements
        else:
            dense += FP32 * elements
        summed += FP32 * elements * is_partial(param)
        summed += sum(FP32 * (b - a) * layout.tp // copies for a, b, copies, _ in shared_ranges(param, groups.tp))
        tied += FP32 * elements * ("twin" in vars(param))
    chunks = [chunk.chunk for chunk in engine.chunks]
    layers = [i for chunk in chunks for i in range(chunk.first, chunk.stop)]
    stages = _stages(layout, groups)
    both_ends = any(c.embeds for c in chunks) and any(c.heads for c in chunks)
    return Part(
        hidden=cfg.hidden_size,
        heads=cfg.num_heads,
        kv_heads=cfg.num_kv_heads,
        head_dim=cfg.head_dim,
        layers=len(layers),
        embeds=any(c.embeds for c in chunks),
        makes_loss=any(c.heads for c in chunks),
        sends_forward=sum(there != groups.pp.rank for _, there in stages if there is not None),
        sends_backward=sum(there != groups.pp.rank for there, _ in stages if there is not None),
        dense_bytes=dense,
        expert_bytes=experts,
        summed_bytes=summed,
        tied_bytes=0 if both_ends else tied,
        moe_layers=sum(cfg.is_moe(i) for i in layers),
        experts=cfg.moe.num_experts if cfg.moe else 0,
        top_k=cfg.moe.top_k if cfg.moe else 0,
        shared_gate=bool(cfg.moe and cfg.moe.shared_gate),
    )


def _stages(layout: ParallelConfig, groups: Groups) -> list[tuple[int | None, int | None]]:
    """For each stage of this rank the pipeline ranks of the stages before and behind it, None at the model's ends."""
    vpp = layout.stages_per_rank
    owner = {stage: rank for rank in range(layout.pp) for stage in stage_ids(layout.schedule, layout.pp, vpp, rank)}
    return [(owner.get(s - 1), owner.get(s + 1)) for s, rank in owner.items() if rank == groups.pp.rank]


def micro_of(batch: MicroBatch, layout: ParallelConfig, groups: Groups) -> Micro:
    """What of a micro-batch is on this rank."""
    borders = batch.cu_seqlens.tolist()
    passed: list[int] = []
    brought: list[int] = []
    cp, rank = groups.cp.size, groups.cp.rank
    if cp > 1 and layout.context == "ring":
        held = [lengths_here(borders, ranges) for ranges in token_ranges(borders, cp, "ring")]
        shared = [doc for doc in range(len(borders) - 1) if sum(lengths[doc] > 0 for lengths in held) > 1]
        blocks = [max(sum(lengths[doc] for doc in shared), 1) for lengths in held]
        if shared:
            passed = [blocks[(rank - i) % cp] for i in range(cp - 1)]
            brought = [blocks[(rank - i) % cp] for i in range(1, cp)]
    return Micro(batch.tokens_T.numel(), borders[-1], batch.num_targets, tuple(passed), tuple(brought))


def step_of(layout: ParallelConfig, engine: EngineConfig, groups: Groups) -> Step:
    """The layout of the run."""
    return Step(layout, engine, groups.world, "cuda" if groups.device.type == "cuda" else "cpu")
