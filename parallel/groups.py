"""Process groups, built once at the start and passed down; the only place that reads the launcher's ranks."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from parallel.config import ParallelConfig
from parallel.host_memory import keep_few_products, keep_freed_memory, record_few_collectives
from parallel.sharding import Axis, Place

ALL_DATA = ParallelConfig()
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class LauncherRanks:
    """What torchrun, deepspeed or slurm said about this process."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @staticmethod
    def read() -> LauncherRanks:
        """Read the launcher's variables; a process started by hand is rank 0 of 1."""
        if "RANK" not in os.environ:
            return LauncherRanks()
        missing = [name for name in LAUNCHER_VARIABLES if name not in os.environ]
        if missing:
            raise ValueError(
                f"RANK is set but {', '.join(missing)} is not, so the other processes cannot be found. "
                "Start with torchrun, deepspeed or scripts/launch, or unset RANK to run one process."
            )
        env = os.environ
        return LauncherRanks(int(env["RANK"]), int(env["WORLD_SIZE"]), int(env["LOCAL_RANK"]))


@dataclass(frozen=True)
class Groups:
    """The axes of the run. Ranks count tp fastest, then cp, then dp, then pp."""

    rank: int
    world: int
    device: torch.device
    dp: Axis
    """Ranks with the same weights and different rows."""
    tp: Axis = field(default_factory=Axis)
    """Ranks that share each layer."""
    pp: Axis = field(default_factory=Axis)
    """Ranks that hold consecutive stages of the model."""
    cp: Axis = field(default_factory=Axis)
    """Ranks that share the tokens of a micro-batch."""
    data: Axis = field(default_factory=Axis)
    """dp x cp: ranks with the same weights and different tokens, over which gradients are summed."""
    ep: Axis = field(default_factory=Axis)
    """Ranks of `data`, neighbours, that share the experts."""
    expert_data: Axis = field(default_factory=Axis)
    """Ranks of `data` that hold the same experts."""
    model: Axis = field(default_factory=Axis)
    """tp x pp: ranks that hold different parts of the weights."""
    ends: Axis = field(default_factory=Axis)
    """The first and the last pp rank, who both hold a tied embedding; alone for those between."""

    @property
    def is_main(self) -> bool:
        """True on the one rank that prints and writes shared files."""
        return self.rank == 0

    def place(self, layout: ParallelConfig = ALL_DATA) -> Place:
        """Where this rank's layers run."""
        return Place(self.tp, self.cp, self.ep, layout.sequence_parallel, layout.context)

    def all_gather(self, value: Any) -> list[Any]:
        """Every rank's ``value``, in rank order (``all_gather_object``; keys may differ between ranks)."""
        if self.world == 1:
            return [value]
        gathered: list[Any] = [None] * self.world
        dist.all_gather_object(gathered, value)
        return gathered

    def gather_stages(self, value: Any) -> list[Any]:
        """``value`` of every pipeline stage of this rank's column, in order."""
        if self.pp.size == 1:
            return [value]
        gathered: list[Any] = [None] * self.pp.size
        dist.all_gather_object(gathered, value, group=self.pp.group)
        return gathered

    def sum(self, values: list[float]) -> list[float]:
        """Element-wise sum over the ranks with different tokens (dp x cp), in float64."""
        if self.data.size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total, group=self.data.group)
        return total.tolist()

    def sum_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor`` summed in place over the ranks with different tokens (dp x cp)."""
        if self.data.size > 1:
            dist.all_reduce(tensor, group=self.data.group)
        return tensor

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.world > 1:
            dist.barrier()


def build_groups(
    ranks: LauncherRanks, timeout_s: float, layout: ParallelConfig = ALL_DATA, micro_batch_tokens: int = 2048
) -> Groups:
    """Join the process group and lay the axes over it.

    Args:
        ranks: what the launcher said.
        layout: the parallel section; what it leaves over of the ranks is data parallel.
        timeout_s: seconds a collective may wait before the job ends with an error.
        micro_batch_tokens: sizes what a CPU keeps for the shapes of a micro-batch.
    """
    use_cuda = torch.cuda.is_available()
    device = torch.device("cuda", ranks.local_rank) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(device)
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # what DeepSpeed would find out itself, with a warning a rank
        keep_freed_memory()
        keep_few_products(micro_batch_tokens)
        record_few_collectives()
    os.environ.setdefault("LOCAL_RANK", str(ranks.local_rank))  # DeepSpeed insists on it, also for one process
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if use_cuda else "gloo"
        dist.init_process_group(
            backend,
            store=dist.HashStore() if ranks.world == 1 else None,  # else the launcher's rendezvous
            rank=ranks.rank,
            world_size=ranks.world,
            timeout=timedelta(seconds=timeout_s),
        )
    return Groups(ranks.rank, ranks.world, device, **_axes(ranks, layout, timedelta(seconds=timeout_s)))


def _axes(ranks: LauncherRanks, layout: ParallelConfig, timeout: timedelta) -> dict[str, Axis]:
    """Every axis of this rank. All ranks make all process groups, in the same order."""
    assert ranks.world % layout.model_ranks == 0, f"{layout} does not divide {ranks.world} ranks"
    dp = ranks.world // layout.model_ranks
    assert dp * layout.cp % layout.ep == 0, f"{layout} does not divide {dp * layout.cp} ranks with different tokens"
    grid = torch.arange(ranks.world).view(layout.pp, dp, layout.cp, layout.tp)
    by_tokens = grid.flatten(1, 2)  # [pp, dp x cp, tp]
    experts = by_tokens.unflatten(1, (-1, layout.ep))  # [pp, expert data, ep, tp]
    lines = {
        "tp": grid.flatten(0, 2),
        "cp": grid.transpose(2, 3).flatten(0, 2),
        "dp": grid.permute(0, 2, 3, 1).flatten(0, 2),
        "pp": grid.permute(1, 2, 3, 0).flatten(0, 2),
        "data": by_tokens.transpose(1, 2).flatten(0, 1),
        "ep": experts.transpose(2, 3).flatten(0, 2),
        "expert_data": experts.permute(0, 2, 3, 1).flatten(0, 2),
        "model": grid.permute(1, 2, 0, 3).flatten(0, 1).flatten(1),
        "ends": grid.permute(1, 2, 3, 0).flatten(0, 2)[:, [0, -1]] if layout.pp > 1 else grid.view(-1, 1),
    }
    return {name: _axis(name, lines[name].tolist(), ranks, timeout) for name in lines}


def _axis(name: str, lines: list[list[int]], ranks: LauncherRanks, timeout: timedelta) -> Axis:
    """The one of `lines` that this rank is on, as an axis with its process group.

    A line of one rank needs no group, except where DeepSpeed asks for one.
    """
    mine = next((line for line in lines if ranks.rank in line), [ranks.rank])
    if len(lines[0]) == 1 and name not in ("data", "expert_data", "model"):
        return Axis()
    if len(mine) == ranks.world and mine == sorted(mine):
        return Axis(len(mine), mine.index(ranks.rank), dist.group.WORLD)
    groups: list[Any] = [dist.new_group(line, timeout=timeout) for line in lines]
    return Axis(len(mine), mine.index(ranks.rank), groups[lines.index(mine)] if mine in lines else None)


def neighbours(groups: Groups, size: int, timeout_s: float) -> Axis:
    """The ``size`` consecutive ranks that this one is among, as an axis; every rank calls, with the same numbers."""
    if size == groups.tp.size:
        return groups.tp
    lines = torch.arange(groups.world).view(-1, size).tolist()
    return _axis("generator", lines, LauncherRanks(groups.rank, groups.world), timedelta(seconds=timeout_s))


def leave_groups() -> None:
    """Leave the process group, at the very end of the program.

    Its threads would otherwise still run while the interpreter is taken down, which now and then aborts the process
    ("terminate called without an active exception") after a run that ended well.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
