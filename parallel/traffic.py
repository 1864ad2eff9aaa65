"""What a rank sends: every collective and message that reaches torch's process groups, by kind and group.

Counted only while a `Traffic` is entered, whoever calls: layers, DeepSpeed, pipeline schedules. `traffic_formula.py`
says what the textbook wants.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from parallel.group_names import names_by_ranks
from parallel.groups import Groups


@dataclass(frozen=True)
class Operator:
    """One of torch's c10d operators."""

    kind: str
    argument: int
    """Which argument holds the whole tensor: what an all-gather gives, what the others take."""


OPERATORS = {
    "allreduce_": Operator("all_reduce", 0),
    "allreduce_coalesced_": Operator("all_reduce", 0),
    "allgather_": Operator("all_gather", 0),
    "allgather_coalesced_": Operator("all_gather", 0),
    "_allgather_base_": Operator("all_gather", 0),
    "allgather_into_tensor_coalesced_": Operator("all_gather", 0),
    "reduce_scatter_": Operator("reduce_scatter", 1),
    "_reduce_scatter_base_": Operator("reduce_scatter", 1),
    "reduce_scatter_tensor_coalesced_": Operator("reduce_scatter", 1),
    "alltoall_": Operator("all_to_all", 1),
    "alltoall_base_": Operator("all_to_all", 1),
    "reduce_": Operator("reduce", 0),
    "broadcast_": Operator("broadcast", 0),
    "send": Operator("send", 0),
    "recv_": Operator("recv", 0),
    "recv_any_source_": Operator("recv", 0),
    "barrier": Operator("barrier", 0),
}

RING_SHARE = {
    "all_reduce": 2.0,
    "all_gather": 1.0,
    "reduce_scatter": 1.0,
    "all_to_all": 1.0,
    "reduce": 1.0,
    "broadcast": 1.0,
}
"""How often a collective moves its tensor over a rank's wire, times (N - 1) / N for N ranks: ring algorithms
(Patarasuk and Yuan 2009), pairwise exchange."""


@dataclass
class Counted:
    """Calls, and the bytes of their tensors as they were called."""

    calls: int = 0
    bytes: int = 0


class Traffic(TorchDispatchMode):
    """Adds up the collectives called while it is entered.

    Args:
        groups: the run's groups: a group goes by the axes that have its ranks, whoever made it.

    Raises:
        ValueError: an operator moves data in a way that is not known here.
    """

    def __init__(self, groups: Groups):
        super().__init__()
        self.names = names_by_ranks(groups)
        self.sizes: dict[str, int] = {}
        self.rows: dict[tuple[str, str], Counted] = {}
        """(kind, group) -> what was called."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Count, then go on."""
        if func.namespace in ("c10d", "_c10d_functional"):
            self._count(func.name().split("::")[1].split(".")[0], args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: tuple) -> None:
        if name == "wait_tensor":
            return
        operator, group = operator_of(name), _group_of(args)
        if group.size() == 1:  # DeepSpeed asks for it; nothing goes anywhere
            return
        ranks = tuple(sorted(dist.get_process_group_ranks(group)))
        label = self.names.get(ranks, f"ranks {ranks}")
        self.sizes[label] = len(ranks)
        row = self.rows.setdefault((operator.kind, label), Counted())
        row.calls += 1
        row.bytes += 0 if operator.kind == "barrier" else tensor_bytes(args[operator.argument])

    def table(self) -> str:
        """Lines of kind, group, calls, bytes as called, and the bytes a rank puts on the wire for them."""
        lines = [f"{'kind':<16}{'group':<24}{'ranks':>5}{'calls':>7}{'bytes':>16}{'on the wire':>16}"]
        for (kind, label), row in sorted(self.rows.items()):
            size = self.sizes[label]
            wire = on_the_wire(kind, row.bytes, size)
            lines.append(f"{kind:<16}{label:<24}{size:>5}{row.calls:>7}{row.bytes:>16,}{wire:>16,.0f}")
        return "\n".join(lines)


def operator_of(name: str) -> Operator:
    """What a c10d operator does.

    Raises:
        ValueError: it is not known here.
    """
    if name not in OPERATORS:
        raise ValueError(f"c10d::{name} is not counted yet; add it to OPERATORS")
    return OPERATORS[name]


def on_the_wire(kind: str, size_bytes: float, ranks: int) -> float:
    """Bytes one rank sends for a collective on a tensor of so many bytes; what it receives is as much."""
    if kind in ("send", "recv", "barrier"):
        return size_bytes if kind == "send" else 0.0
    return RING_SHARE[kind] * (ranks - 1) / ranks * size_bytes


def tensor_bytes(value: Any) -> int:
    """Bytes of all tensors in a tensor or nested lists of them."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(tensor_bytes(item) for item in value)


def _group_of(args: tuple) -> Any:
    for value in args:
        if isinstance(value, torch.ScriptObject):
            try:
                return dist.ProcessGroup.unbox(value)
            except RuntimeError:
                continue  # a reduction's kind is a script object too
    raise ValueError("a collective without a process group")
