"""A run's config made small enough for a few CPU processes, with everything kept that a layout can get wrong."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

from models.config import MLAConfig, ModelConfig, MoEConfig
from parallel.config import ParallelConfig
from parallel.context import context_problems
from parallel.schedules import next_micro_batches
from trainer.config import RunConfig
from trainer.stages import DpoConfig, PolicyConfig, PpoConfig, StageConfig
from trainer.verify.shrink_vision import shrunk_sections, shrunk_vision, with_equal_sides

STEPS = 3
MOST_PROCESSES, CHEAP_PROCESSES = 8, 4
SEQ_LEN, MICRO_ROWS = 64, 2
HIDDEN, FEED_FORWARD, EXPERT, VOCABULARY, WINDOW = 48, 88, 24, 256, 24
"""Smallest sizes aimed at; what the layout divides is rounded up to it."""
LOSS_CHUNK = 48
"""Tokens whose logits exist at once: fewer than a micro-batch has, so that the loss is taken in several chunks."""


def processes_for(parallel: ParallelConfig, asked: int | None = None) -> int:
    """Processes to verify a layout on: the fewest it allows, with two data-parallel copies where that stays cheap.

    Raises:
        ValueError: they would be more than a workstation runs, and no number was asked for.
    """
    if asked is not None:
        return asked
    copies = parallel.ep // math.gcd(parallel.ep, parallel.cp)
    least = parallel.model_ranks * copies
    if least > MOST_PROCESSES:
        raise ValueError(_too_many(parallel, least))
    return least * 2 if least * 2 <= CHEAP_PROCESSES else least


def _too_many(parallel: ParallelConfig, least: int) -> str:
    axes = {name: getattr(parallel, name) for name in ("tp", "pp", "cp", "ep") if getattr(parallel, name) > 1}
    shown = " ".join(f"parallel.{name}={size}" for name, size in axes.items())
    small = dict.fromkeys(axes, 2)
    for name in axes:  # give back as much of each size as fits
        for size in range(axes[name], 2, -1):
            trial = dataclasses.replace(parallel, **(small | {name: size}))
            fits = trial.model_ranks * (trial.ep // math.gcd(trial.ep, trial.cp)) <= MOST_PROCESSES
            if axes[name] % size == 0 and fits:
                small[name] = size
                break
    words = [f"parallel.{name}={size}" for name, size in small.items() if size != axes[name]]
    if parallel.stage_layers is not None and "pp" in small and small["pp"] != parallel.pp:
        words.append("parallel.stage_layers=null")
    return (
        f"{shown} takes at least {least} processes, and here at most {MOST_PROCESSES} are started.\n"
        f"The same code runs with smaller sizes; add: {' '.join(words)}\n"
        f"or, on a machine with the memory for it, --processes {least} (about 0.5 GiB each)"
    )


@dataclasses.dataclass(frozen=True)
class Small:
    """The shrunk config, and what was changed, in words."""

    cfg: RunConfig
    world: int
    changes: tuple[str, ...]

    @property
    def alone(self) -> RunConfig:
        """The same training in one process: no layout, no ZeRO, nothing made again."""
        engine = dataclasses.replace(self.cfg.engine, zero=0, recompute="none", offload_optimizer=False)
        return dataclasses.replace(self.cfg, parallel=ParallelConfig(), engine=engine)


def shrunk(cfg: RunConfig, world: int) -> Small:
    """The config for ``world`` processes. What decides how things are cut, sent and counted stays; sizes go down."""
    rows = min(cfg.data.micro_batch_rows, MICRO_ROWS)
    dp = world // cfg.parallel.model_ranks
    wanted = cfg.parallel.pp + 1 if cfg.parallel.pp > 1 else 2  # so that the schedule has a steady part
    count = next_micro_batches(cfg.parallel.schedule, cfg.parallel.pp, wanted)
    seq_len = min(cfg.data.seq_len, SEQ_LEN)
    attention = "sdpa" if cfg.engine.attention == "flash_attn" else cfg.engine.attention
    parallel = dataclasses.replace(cfg.parallel, stage_layers=_stage_layers(cfg.parallel.stage_layers))
    model = shrunk_model(cfg.model, parallel, attention, seq_len / cfg.data.seq_len)
    small = dataclasses.replace(
        cfg,
        model=model,
        stage=_own_weights(cfg.stage),
        parallel=parallel,
        engine=dataclasses.replace(cfg.engine, precision="fp32", attention=attention, loss_chunk=LOSS_CHUNK),
        data=dataclasses.replace(
            cfg.data, seq_len=seq_len, micro_batch_rows=rows, global_batch_rows=rows * dp * count, sources=()
        ),
        # A large eps keeps Adam from blowing the rounding of vanishing gradients up to whole steps; clipping bites.
        optim=dataclasses.replace(
            cfg.optim,
            lr=1e-2,
            eps=1e-4,
            clip=min(cfg.optim.clip, 0.25),
            schedule="constant",
            warmup_steps=0,
            decay_steps=0,
        ),
        log=dataclasses.replace(cfg.log, every=1),
        run=dataclasses.replace(cfg.run, steps=STEPS, epochs=None, save_every=1, eval_every=0, hang_timeout=120.0),
        init_from=None,
    )
    return Small(small, world, tuple(_changes(cfg, small)))


def _own_weights(stage: StageConfig) -> StageConfig:
    """The stage with a reference of made-up weights, asked in every step."""
    if isinstance(stage, DpoConfig):
        return dataclasses.replace(stage, reference=None, precompute_reference=False)
    return stage


def shrunk_model(model: ModelConfig, parallel: ParallelConfig, attention: Any, shorter: float) -> ModelConfig:
    """A small model of the same family and options that the layout cuts in the same way.

    Args:
        shorter: how much shorter its rows are; lengths in the model go down with them.
    """
    tp = parallel.tp
    heads, groups = _heads(model, parallel, attention)
    full, dense, layers = _layers(model, parallel)
    mla = _latent(model.mla) if model.mla else None
    head_dim = mla.nope_dim + mla.rope_dim if mla else min(model.head_dim, 8)
    hidden = min(model.hidden_size, _up(HIDDEN, heads))
    if model.rope.sections or model.compares:  # families that have no heads of another size than their share
        hidden = heads * head_dim
    feed_forward = min(model.intermediate_size, _up(FEED_FORWARD, tp))
    moe = _experts(model.moe, model.intermediate_size, feed_forward, parallel, dense) if model.moe else None
    original = model.rope.original_max_seq_len
    rope = dataclasses.replace(
        model.rope,
        original_max_seq_len=None if original is None else max(8, round(original * shorter)),
        sections=shrunk_sections((mla.rope_dim if mla else head_dim) // 2) if model.rope.sections else (),
    )
    small = dataclasses.replace(
        model,
        vocab_size=min(model.vocab_size, VOCABULARY // tp * tp + model.vocab_size % tp),
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=groups,
        head_dim=head_dim,
        max_seq_len=max(SEQ_LEN, round(model.max_seq_len * shorter)),
        rope=rope,
        sliding_window=None if model.sliding_window is None else min(model.sliding_window, WINDOW),
        full_attention_layers=full,
        moe=moe,
        mla=mla,
        vision=shrunk_vision(model.vision, heads) if model.vision else None,
        init_std=0.1,  # about 1 / sqrt(hidden): with the small values of large models attention would be even
    )
    return with_equal_sides(small) if model.family == "bert" else small


def _up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def _heads(model: ModelConfig, parallel: ParallelConfig, attention: Any) -> tuple[int, int]:
    """The fewest query and key/value heads in the same proportion that tp and cp share in the same way."""
    tp, ratio, groups = parallel.tp, model.num_heads // model.num_kv_heads, model.num_kv_heads
    for few in range(1, groups):
        told = context_problems(few * ratio, few, tp, parallel.cp, parallel.context, attention)
        several = groups >= tp and few % tp == 0 and few // tp >= min(2, groups // tp)
        if groups % few == 0 and several and (few * ratio) % tp == 0 and not told:
            return few * ratio, few
    return model.num_heads, groups


def _layers(model: ModelConfig, parallel: ParallelConfig) -> tuple[int, int, int]:
    """``full_attention_layers``, ``moe.first_dense`` and the number of layers: one of each kind, and one a stage."""
    total, full = model.num_layers, model.full_attention_layers
    dense = model.moe.first_dense if model.moe else 0
    windowed = model.sliding_window is not None
    borders = sorted({b for b, used in ((full, windowed), (dense, model.moe is not None)) if used and 0 < b < total})
    stages = parallel.pp * parallel.stages_per_rank
    layers = sum(parallel.stage_layers) if parallel.stage_layers and parallel.pp > 1 else max(2, stages)
    layers = min(total, max(layers, len(borders) + 1))

    def moved(border: int) -> int:
        return borders.index(border) + 1 if border in borders else min(border, layers)

    return moved(full), moved(dense), layers


def _stage_layers(given: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """Stages given by hand stay uneven in the same way: one layer for the smallest, two for the others."""
    return None if given is None else tuple(min(2, 1 + sorted(set(given)).index(size)) for size in given)


def _latent(mla: MLAConfig) -> MLAConfig:
    return dataclasses.replace(
        mla,
        kv_rank=min(mla.kv_rank, 16),
        nope_dim=min(mla.nope_dim, 8),
        rope_dim=min(mla.rope_dim, 4),
        value_dim=min(mla.value_dim, 8 if mla.value_dim == mla.nope_dim else 6),
        q_rank=None if mla.q_rank is None else min(mla.q_rank, 24),
    )


def _experts(moe: MoEConfig, dense_size: int, feed_forward: int, parallel: ParallelConfig, dense: int) -> MoEConfig:
    top_k, groups = min(moe.top_k, 2), min(moe.groups, 4)
    kept = min(moe.groups_kept, max(1, groups // 2)) if moe.groups_kept < moe.groups else groups
    least = min(moe.num_experts, max(2 * top_k, 2 * parallel.ep, 2 * groups))
    numbers = (
        n
        for n in range(least, moe.num_experts)
        if n % parallel.ep == 0 and n % groups == 0 and n // groups * kept >= top_k
    )
    number = next(numbers, None)
    if number is None:
        number, top_k, groups, kept = moe.num_experts, moe.top_k, moe.groups, moe.groups_kept
    size = feed_forward if moe.expert_size == dense_size else min(moe.expert_size, _up(EXPERT, parallel.tp))
    several, uneven = divmod(moe.shared_size, moe.expert_size)  # shared experts are one of their summed size
    return dataclasses.replace(
        moe,
        num_experts=number,
        top_k=top_k,
        groups=groups,
        groups_kept=kept,
        expert_size=size,
        shared_size=min(moe.shared_size, _up(EXPERT + 16, parallel.tp)) if uneven else min(several, 2) * size,
        first_dense=dense,
        # Small factors would hide a mistake below the tolerance.
        bias_rate=max(moe.bias_rate, 0.01) if moe.bias_rate else 0.0,
        balance_loss=max(moe.balance_loss, 0.05) if moe.balance_loss else 0.0,
        z_loss=max(moe.z_loss, 0.01) if moe.z_loss else 0.0,
    )


# ---- in words ------------------------------------------------------------------------------------------------------

NAMES = {
    "num_layers": "layers",
    "hidden_size": "hidden",
    "intermediate_size": "feed-forward",
    "num_heads": "heads",
    "num_kv_heads": "kv heads",
    "head_dim": "head size",
    "vocab_size": "vocabulary",
    "vision.tower.hidden_size": "hidden of the tower",
    "vision.tower.num_layers": "layers of the tower",
    "sliding_window": "window",
    "full_attention_layers": "layers without window",
    "moe.num_experts": "experts",
    "moe.top_k": "top k",
    "moe.groups": "expert groups",
    "moe.expert_size": "expert size",
    "moe.first_dense": "dense layers",
}


def _changes(cfg: RunConfig, small: RunConfig) -> Iterator[str]:
    if isinstance(cfg.stage, PolicyConfig):
        yield "rollouts and rewards -> made-up samples and advantages, of which the policy's update alone is checked"
    if isinstance(cfg.stage, PpoConfig):
        yield "no critic"
    if isinstance(cfg.stage, DpoConfig) and cfg.stage.precompute_reference and cfg.stage.needs_reference:
        yield "the reference is asked in every step"
    if cfg.adapter is not None:
        yield f"adapter {cfg.adapter.name} -> none, all weights are trained"
    for key, word in NAMES.items():
        old, new = _value(cfg.model, key), _value(small.model, key)
        if old != new:
            yield f"{word} {old:,} -> {new:,}"
    if small.data.seq_len != cfg.data.seq_len:
        yield f"row length {cfg.data.seq_len:,} -> {small.data.seq_len}"
    if small.parallel.stage_layers != cfg.parallel.stage_layers:
        yield f"stage_layers {_list(cfg.parallel.stage_layers)} -> {_list(small.parallel.stage_layers)}"
    if cfg.engine.precision != "fp32":
        yield f"{cfg.engine.precision} -> fp32, which alone can be compared to the last digits"
    if small.engine.attention != cfg.engine.attention:
        yield f"attention {cfg.engine.attention} -> {small.engine.attention}"


def _value(model: ModelConfig, key: str) -> Any:
    node: Any = model
    for name in key.split("."):
        node = None if node is None else getattr(node, name)
    return node


def _list(values: Sequence[int] | None) -> str:
    return str(list(values or ())).replace(" ", "")
