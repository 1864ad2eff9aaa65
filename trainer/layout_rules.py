"""The rules a layout of the processes must keep, each a small function over sizes; no process group and no device."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from data.config import DataConfig
from models.config import ModelConfig
from parallel.config import EngineConfig, ParallelConfig
from parallel.context import context_problems


class Fault(NamedTuple):
    """A rule that a layout breaks."""

    key: str
    value: object
    reason: str


@dataclass(frozen=True)
class Layout:
    """What decides whether a layout is legal."""

    model: ModelConfig
    parallel: ParallelConfig
    engine: EngineConfig
    data: DataConfig

    def dp(self, world: int) -> int:
        """Ranks with different rows; 0 when the layout does not divide the processes."""
        return 0 if world % self.parallel.model_ranks else world // self.parallel.model_ranks

    def micro_batches(self, world: int) -> int:
        """Micro-batches of one rank in one step; 0 when the rows cannot be shared out evenly."""
        together = self.data.micro_batch_rows * self.dp(world)
        return 0 if not together or self.data.global_batch_rows % together else self.data.global_batch_rows // together

    def get(self, key: str) -> Any:
        """The value of one of ``trainer.layouts.KEYS``."""
        section, _, name = key.partition(".")
        return getattr(getattr(self, section), name)

    def with_(self, key: str, value: object) -> Layout:
        """The same layout with another value of one of ``trainer.layouts.KEYS``."""
        section, _, name = key.partition(".")
        changes: dict[str, Any] = {section: dataclasses.replace(getattr(self, section), **{name: value})}
        return dataclasses.replace(self, **changes)


def broken(layout: Layout, world: int) -> Iterator[Fault]:
    """The rules a layout breaks, cheapest to tell first."""
    for rule in (_processes, _tensor, _schedule, _stages, _micro_batches, _context, _experts, _zero):
        yield from rule(layout, world)


def _processes(layout: Layout, world: int) -> Iterator[Fault]:
    sizes = {f"parallel.{name}": getattr(layout.parallel, name) for name in ("tp", "pp", "cp")}
    used = {key: size for key, size in sizes.items() if size > 1}
    if world % layout.parallel.model_ranks:
        copy, started = layout.parallel.model_ranks, "1 was" if world == 1 else f"{world} were"
        reason = f"one copy of the model takes {copy} processes, and {started} started, which is no multiple of that"
        yield Fault(" x ".join(used), math.prod(used.values()), reason)


def _tensor(layout: Layout, world: int) -> Iterator[Fault]:
    model, tp = layout.model, layout.parallel.tp
    shared = [("model.num_heads", model.num_heads)]
    if model.moe is None or model.moe.first_dense > 0:
        shared.append(("model.intermediate_size", model.intermediate_size))
    if model.moe is not None:
        shared += [("model.moe.expert_size", model.moe.expert_size), ("model.moe.shared_size", model.moe.shared_size)]
    if model.vision is not None:
        shared += [(f"model.vision.{key}", size) for key, size in model.vision.shared]
    uneven = [f"{key}={size}" for key, size in shared if size % tp]
    reasons = [f"does not divide {', '.join(uneven)}, of which every rank takes an equal share"] if uneven else []
    groups = model.num_kv_heads
    if groups % tp and tp % groups:
        reasons.append(f"model.num_kv_heads={groups} is neither a multiple nor a divisor of it")
    if reasons:
        yield Fault("parallel.tp", tp, "; ".join(reasons))


def _schedule(layout: Layout, world: int) -> Iterator[Fault]:
    if layout.parallel.pp == 1 or layout.parallel.vpp is None:
        return
    from parallel.schedules import allowed_stages  # brings torch's pipelines in, more than a second to import

    stages, (fewest, most) = layout.parallel.vpp, allowed_stages(layout.parallel.schedule)
    if stages < fewest or (most is not None and stages > most):
        needs = f"exactly {fewest}" if fewest == most else f"at least {fewest}"
        reason = f"parallel.schedule={layout.parallel.schedule} has {needs} stage{'s' * (fewest > 1)} on each rank"
        yield Fault("parallel.vpp", stages, reason)


def _stages(layout: Layout, world: int) -> Iterator[Fault]:
    parallel, layers = layout.parallel, layout.model.num_layers
    stages = parallel.pp * parallel.stages_per_rank
    if parallel.pp == 1:
        return
    if layout.model.compares:
        yield Fault("parallel.pp", parallel.pp, "makes stages of a decoder, and the model is a pair of encoders")
        return
    if layout.model.vision is not None and layout.model.vision.cross is not None:
        reason = "keeps features on the first stage, and layers of all stages would read them (model.vision.cross)"
        yield Fault("parallel.pp", parallel.pp, reason)
        return
    if stages > layers:
        made = f"{parallel.pp} ranks x {parallel.stages_per_rank} stages ({parallel.schedule}) = {stages} stages"
        key = "parallel.vpp" if parallel.vpp is not None and parallel.pp <= layers else "parallel.pp"
        yield Fault(key, layout.get(key), f"{made} share model.num_layers={layers}, and each needs at least one")
    given = parallel.stage_layers
    if given is None:
        return
    reasons = []
    if len(given) != stages:
        reasons.append(f"says {len(given)} stages, and the pipeline has {stages}")
    if sum(given) != layers:
        reasons.append(f"its sum is {sum(given)}, and the model has {layers} layers")
    if layout.model.vision is not None and given and given[0] == 0:
        given = given[1:]  # tower and connector are a stage by themselves
    if min(given, default=1) < 1:
        only = " (the first may have none where the model sees)" if layout.model.vision is not None else ""
        reasons.append(f"each stage needs at least one layer{only}")
    if reasons:
        yield Fault("parallel.stage_layers", list(given), "; ".join(reasons))


def _micro_batches(layout: Layout, world: int) -> Iterator[Fault]:
    count = layout.micro_batches(world)
    wanted = feeds(layout.parallel, count) if count else None
    if wanted is not None:
        rows, micro, dp = layout.data.global_batch_rows, layout.data.micro_batch_rows, layout.dp(world)
        reason = (
            f"makes {rows} / (data.micro_batch_rows={micro} x {dp} data parallel) = {count} micro-batches a step, and "
            f"parallel.schedule={layout.parallel.schedule} with parallel.pp={layout.parallel.pp} {wanted}"
        )
        yield Fault("data.global_batch_rows", rows, reason)


def feeds(parallel: ParallelConfig, count: int) -> str | None:
    """What a schedule asks of the number of micro-batches when ``count`` is not good; None when it is."""
    if parallel.pp == 1:
        return None
    from parallel.schedules import fewest_micro_batches, next_micro_batches

    fewest = fewest_micro_batches(parallel.schedule, parallel.pp)
    if count < fewest:
        return f"needs at least {fewest}"
    if next_micro_batches(parallel.schedule, parallel.pp, count) != count:
        return f"sends them in {count // parallel.pp} rounds of equal size"
    return None


def _context(layout: Layout, world: int) -> Iterator[Fault]:
    model, parallel = layout.model, layout.parallel
    if model.vision is not None and parallel.cp > 1:
        reason = "cuts the tokens of a document, and those that stand for one picture are not cut (model.vision)"
        yield Fault("parallel.cp", parallel.cp, reason)
        return
    told = context_problems(
        model.num_heads, model.num_kv_heads, parallel.tp, parallel.cp, parallel.context, layout.engine.attention
    )
    for key, value, reason, _ in told:
        yield Fault(key, value, reason)


def _experts(layout: Layout, world: int) -> Iterator[Fault]:
    ep, moe, tokens = layout.parallel.ep, layout.model.moe, layout.dp(world) * layout.parallel.cp
    if ep == 1:
        return
    reasons = []
    if moe is None:
        reasons.append("the model has no experts to share out")
    elif moe.num_experts % ep:
        reasons.append(f"it does not divide model.moe.num_experts={moe.num_experts}")
    if tokens % ep:
        reasons.append(f"its ranks are among those with different tokens, {tokens} here (data parallel x parallel.cp)")
    if reasons:
        yield Fault("parallel.ep", ep, "; ".join(reasons))


def _zero(layout: Layout, world: int) -> Iterator[Fault]:
    zero, pp, ep = layout.engine.zero, layout.parallel.pp, layout.parallel.ep
    if zero > 1 and pp > 1:
        reason = (
            f"shards gradients as each backward ends, and parallel.pp={pp} has those of several micro-batches under way"
        )
        yield Fault("engine.zero", zero, reason)
    elif zero == 3 and ep > 1:
        reason = f"shards every weight over all data-parallel ranks, and parallel.ep={ep} gives them different experts"
        yield Fault("engine.zero", zero, reason)
