"""Process groups, built once at the start and passed down; the only place that reads the launcher's ranks."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from parallel.host_memory import keep_freed_memory
from parallel.sharding import Axis

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
    """The axes of the run. ``dp`` holds ranks with the same weights and different data; ``tp`` cuts a layer."""

    rank: int
    world: int
    device: torch.device
    dp: Axis
    tp: Axis = field(default_factory=Axis)

    @property
    def is_main(self) -> bool:
        """True on the one rank that prints and writes shared files."""
        return self.rank == 0

    def all_gather(self, value: Any) -> list[Any]:
        """Every rank's ``value``, in rank order (``all_gather_object``; keys may differ between ranks)."""
        if self.world == 1:
            return [value]
        gathered: list[Any] = [None] * self.world
        dist.all_gather_object(gathered, value)
        return gathered

    def sum(self, values: list[float]) -> list[float]:
        """Element-wise sum over the data-parallel ranks, in float64."""
        if self.dp.size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total, group=self.dp.group)
        return total.tolist()

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.world > 1:
            dist.barrier()


def build_groups(ranks: LauncherRanks, timeout_s: float) -> Groups:
    """Join the process group and lay the axes over it.

    Args:
        ranks: what the launcher said.
        timeout_s: seconds a collective may wait before the job ends with an error.
    """
    use_cuda = torch.cuda.is_available()
    device = torch.device("cuda", ranks.local_rank) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(device)
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # what DeepSpeed would find out itself, with a warning a rank
        keep_freed_memory()
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
    dp = Axis(size=ranks.world, rank=ranks.rank, group=dist.group.WORLD)
    return Groups(rank=ranks.rank, world=ranks.world, device=device, dp=dp)


def leave_groups() -> None:
    """Leave the process group, at the very end of the program.

    Its threads would otherwise still run while the interpreter is taken down, which now and then aborts the process
    ("terminate called without an active exception") after a run that ended well.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
