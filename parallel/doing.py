"""What this rank is doing now, seen from outside while it runs: what it waits for, and where its Python stands.

Nothing is patched and nothing is paid on the way. torch keeps the last collectives of all groups in its flight
recorder (2,000, on a CPU 64: `parallel/host_memory.py`), with sizes and the Python lines that called them. Messages
between two ranks are not in it; they are found among the variables of the thread that waits.
"""

from __future__ import annotations

import math
import os
import pickle
import re
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch.distributed as dist
from torch._C import _distributed_c10d

from parallel import stacks
from parallel.stacks import Frames

c10d: Any = _distributed_c10d
"""torch's stubs leave out most of it."""

PIPELINING = os.path.join("torch", "distributed", "pipelining")
DTYPES = {
    "Float": ("float32", 4),
    "Double": ("float64", 8),
    "Half": ("float16", 2),
    "BFloat16": ("bfloat16", 2),
    "Long": ("int64", 8),
    "Int": ("int32", 4),
    "Short": ("int16", 2),
    "Char": ("int8", 1),
    "Byte": ("uint8", 1),
    "Bool": ("bool", 1),
}
"""The flight recorder's names of types: ours, and the bytes of an element."""

MESSAGES = ("send", "recv", "recv and send", "recvanysource")

CODE_CACHE = "torch._inductor.codecache"
"""torch imports this to name the lines in its recorder: seconds that a job in trouble may not have. Only where it is
there already are the lines asked for. Else the stacks tell them, of all but collectives that were started before."""

GroupNames = Mapping[str, tuple[str, list[int]]]
"""torch's name of a process group -> (name of the axis, its ranks)."""


@dataclass(frozen=True)
class Call:
    """A collective, or a message between two ranks, that this rank waits in."""

    kind: str
    group: str
    """Name of the group's axis."""
    ranks: list[int]
    number: int | None
    """The how many-th collective of its group this is; None where that is not known."""
    what: str
    """Type, shape and bytes of the tensor; of a message also its other end."""
    seconds: float | None
    where: list[str]
    """Lines of code that called it, innermost first."""

    def title(self) -> str:
        """Kind, number and group in words."""
        number = f" no. {self.number}" if self.number is not None else ""
        return f"{self.kind}{number} of {group_words(self.group, self.ranks) or 'two ranks'}"


@dataclass(frozen=True)
class Doing:
    """One rank's answer to what it is doing."""

    rank: int
    host: str
    pid: int
    calls: list[Call] = field(default_factory=list)
    stack: list[str] = field(default_factory=list)
    """Where the main thread stands, innermost first."""
    last: str = ""
    """The last collective that has ended."""
    called: dict[str, int] = field(default_factory=dict)
    """Collectives this rank has called so far, of each group."""
    error: str = ""
    """What a broken connection said."""


def doing(rank: int, host: str, names: GroupNames, lost: BaseException | None = None) -> Doing:
    """What this process is doing.

    Args:
        names: the groups that have a name of ours.
        lost: what was raised when a connection broke; then this tells where the rank had waited.
    """
    threads = [stacks.raised_in(lost)] if lost else stacks.threads()
    waits = [wait for frames in threads if (wait := waiting_in(frames, names))]
    calls, last, called = recorded(names)
    if lost and last and not calls and not any(wait.kind in MESSAGES for wait in waits):
        calls = [replace(last, where=last.where or stacks.lines(threads[0]))]  # to the recorder it has ended
    calls = [_placed(call, waits) for call in calls] + [wait for wait in waits if wait.kind in MESSAGES]
    if not calls:
        calls = waits[:1]
    before = f"{last.title()}, called {last.seconds:.1f} s ago" if last else ""
    said = _said(lost) if lost else ""
    return Doing(rank, host, os.getpid(), calls, stacks.lines(threads[0]), before, called, said)


def _placed(call: Call, waits: list[Call]) -> Call:
    """A recorded collective with what the stack knows better: its name in Python, and where it was called."""
    same = [wait for wait in waits if (wait.group, wait.ranks) == (call.group, call.ranks)]
    return replace(call, kind=same[0].kind, where=same[0].where) if same and not call.where else call


def _said(error: BaseException) -> str:
    """The first sentence of an error, without the place in gloo's source."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return re.sub(r"^\[[^]]*\.cc:\d+\] ", "", line).split(". ")[0]


# ---- the flight recorder -------------------------------------------------------------------------------------------


def progress() -> tuple[tuple[str, int, int], ...]:
    """(group, number of the last collective called, of the last one ended) of every group; takes microseconds."""
    return tuple(
        (group, seen["last_enqueued_collective"], seen["last_completed_collective"])
        for dump in _dumps()
        for group, seen in sorted(pickle.loads(dump(False, False, False)).get("pg_status", {}).items())
    )


def _dumps() -> list[Callable[[bool, bool, bool], bytes]]:
    """The flight recorders of this build of torch: that of the CPU's groups, that of NCCL."""
    found = (getattr(c10d, name, None) for name in ("_dump_fr_trace", "_dump_nccl_trace"))
    return [dump for dump in found if dump is not None]


def recorded(names: GroupNames) -> tuple[list[Call], Call | None, dict[str, int]]:
    """Every collective that has not ended, the last one that has, and how many each group has seen."""
    now, waiting, called = time.time_ns(), [], {}
    last: Call | None = None
    for dump in _dumps():
        for entry in pickle.loads(dump(True, CODE_CACHE in sys.modules, False)).get("entries", []):
            call = _call(entry, now, names)
            group = group_words(call.group, call.ranks)
            called[group] = max(entry["collective_seq_id"], called.get(group, 0))
            if not entry["retired"] and entry["state"] != "completed":
                waiting.append(call)
            else:
                last = call
    return waiting, last, called


def _call(entry: dict[str, Any], now_ns: int, names: GroupNames) -> Call:
    frames = [(frame["filename"], frame["line"], frame["name"]) for frame in entry.get("frames", [])]
    asked = [name for file, _, name in frames if file.endswith(stacks.C10D)]
    torch_name, description = entry["process_group"]
    name, ranks = group_of(torch_name, description, names)
    return Call(
        kind=asked[0] if asked else entry["profiling_name"].split(":")[-1],
        group=name,
        ranks=ranks,
        number=entry["collective_seq_id"],
        what=_tensors(entry["input_sizes"], entry["input_dtypes"]),
        seconds=(now_ns - entry["time_created_ns"]) / 1e9,
        where=stacks.program_lines(frames),
    )


def _tensors(shapes: list[list[int]], dtypes: list[str]) -> str:
    if not shapes:
        return ""
    name, size = DTYPES.get(dtypes[0], (dtypes[0], 0))
    more = f" and {len(shapes) - 1} more" if len(shapes) > 1 else ""
    return f"{name} {shapes[0]}{more}, {sum(size * math.prod(shape) for shape in shapes):,} bytes"


def group_of(torch_name: str, description: str, names: GroupNames) -> tuple[str, list[int]]:
    """Our name of a process group and its ranks, as far as they can be known."""
    if torch_name in names:
        return names[torch_name]
    known = dist.distributed_c10d._world.pg_group_ranks.items()
    ranks = next((sorted(ranks) for group, ranks in known if str(group.group_name) == torch_name), [])
    return (f"group {torch_name}" if description in ("", "undefined") else description), ranks


def group_words(name: str, ranks: list[int]) -> str:
    """A group in words: its axis and its ranks."""
    return f"{name} (ranks {rank_words(ranks)})" if ranks else name


def rank_words(ranks: list[int]) -> str:
    """Ranks as few words: 0-3, 8, 10-11."""
    words, ranks = [], sorted(ranks)
    start = 0
    for i in range(1, len(ranks) + 1):
        if i == len(ranks) or ranks[i] != ranks[i - 1] + 1:
            first, last = ranks[start], ranks[i - 1]
            words.append(str(first) if first == last else f"{first}-{last}")
            start = i
    return ", ".join(words)


# ---- waits that are not in it ----------------------------------------------------------------------------------------


def waiting_in(frames: Frames, names: GroupNames) -> Call | None:
    """The call a stack waits in, from the variables of its frames: a message, or a collective that broke."""
    near = [(frame.f_code, dict(frame.f_locals)) for frame, _ in frames[: stacks.DEPTH]]
    for i, (code, found) in enumerate(near):
        if code.co_filename.endswith(stacks.C10D) and not code.co_name.startswith("_"):
            name, ranks = _group_in(found.get("group"), names)
            return Call(code.co_name, name, ranks, None, _tensor_words(code.co_name, found), None, stacks.lines(frames))
        held = [*found.values(), *getattr(found.get("self"), "__dict__", {}).values()]
        kinds = {_kind(value) for value in held if isinstance(value, dist.Work)}
        if kinds and i == 0:  # `wait` itself has no frame in Python
            ops = [op for _, variables in near for op in _messages(variables)]
            name, ranks = _group_in(ops[0].group, names) if ops else ("", [])
            words = [*(_message_words(op) for op in ops), *_action(frames)]
            return Call(" and ".join(sorted(kinds)), name, ranks, None, ", ".join(words), None, stacks.lines(frames))
    return None


def _group_in(group: Any, names: GroupNames) -> tuple[str, list[int]]:
    group = group or dist.group.WORLD
    return group_of(group.group_name, group.group_desc, names)


def _tensor_words(kind: str, found: dict[str, Any]) -> str:
    tensor, words = found.get("tensor"), []
    if kind in MESSAGES:
        key, way = ("dst", "to") if kind == "send" else ("src", "from")
        peer = found.get(key) if found.get(key) is not None else found.get(f"group_{key}")
        words = [f"{way} rank {'any' if peer is None else peer}"]
    if tensor is not None:
        words.append(f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}, {tensor.nbytes:,} bytes")
    return ", ".join(words)


def _kind(work: Any) -> str:
    kinds = {int(value): name.lower().strip("_") for name, value in c10d.OpType.__members__.items()}
    return kinds.get(int(work._get_op_type()), "work")


def _messages(found: dict[str, Any]) -> list[dist.P2POp]:
    """Messages held by the variables of a frame."""
    return [op for value in found.values() if isinstance(value, list) for op in value if isinstance(op, dist.P2POp)]


def _message_words(op: dist.P2POp) -> str:
    way = "to" if op.op is dist.isend else "from"
    return f"{way} rank {op.peer} {str(op.tensor.dtype).removeprefix('torch.')} {list(op.tensor.shape)}"


def _action(frames: Frames) -> list[str]:
    """What torch's pipeline schedule is at, where it is on the stack."""
    for frame, _ in frames:
        if PIPELINING in frame.f_code.co_filename and frame.f_locals.get("action") is not None:
            return [f"pipeline action {frame.f_locals['action']}"]
    return []
