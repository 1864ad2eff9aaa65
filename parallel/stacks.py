"""Python stacks read from outside: where a thread stands, in the lines of the program rather than of its libraries."""

from __future__ import annotations

import os
import sys
import sysconfig
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType

ROOT = str(Path(__file__).resolve().parents[1]) + os.sep
LIBRARIES = tuple({path + os.sep for path in sysconfig.get_paths().values()} | {str(Path(os.__file__).parent) + os.sep})
C10D = os.path.join("torch", "distributed", "distributed_c10d.py")
WRAPPERS = (
    C10D,
    os.path.join("torch", "distributed", "c10d_logger.py"),
    os.path.join("torch", "autograd", "function.py"),
    ROOT + os.path.join("parallel", "collectives.py"),
    ROOT + os.path.join("parallel", "watch.py"),
)
"""Files whose lines say less than those that called them."""

DEPTH = 6
"""Lines of a stack that are shown, and frames in which a wait is looked for."""

Frames = list[tuple[FrameType, int]]
"""(frame, line) innermost first."""


def main_thread() -> Frames:
    """The stack of the main thread as it stands now."""
    return list(_outwards(sys._current_frames().get(threading.main_thread().ident or 0)))


def threads() -> list[Frames]:
    """The stacks of all threads but the one that asks, the main one first."""
    found, main = sys._current_frames(), threading.main_thread().ident
    asking = threading.get_ident()
    return [list(_outwards(found[i])) for i in sorted(found, key=lambda i: i != main) if i != asking]


def raised_in(error: BaseException) -> Frames:
    """The stack an error came from."""
    found, at = [], error.__traceback__
    while at is not None:
        found.append((at.tb_frame, at.tb_lineno))
        at = at.tb_next
    return found[::-1]


def position() -> tuple[tuple[str, int], ...]:
    """Where the main thread stands, to compare with later. Reads no variable: that would keep tensors alive."""
    return tuple((frame.f_code.co_filename, frame.f_lasti) for frame, _ in main_thread()[:DEPTH])


def lines(frames: Frames) -> list[str]:
    """`program_lines` of frames."""
    return program_lines((frame.f_code.co_filename, line, frame.f_code.co_name) for frame, line in frames)


def program_lines(frames: Iterable[tuple[str, int, str]]) -> list[str]:
    """The innermost line, whoever wrote it, then those of the program; (file, line, function) innermost first."""
    seen = [frame for frame in frames if not frame[0].endswith(WRAPPERS)]
    ours = [frame for frame in seen if not frame[0].startswith(("<", *LIBRARIES)) and frame[2] != "<module>"]
    if seen and seen[0] not in ours:
        ours.insert(0, seen[0])
    return [f"{_short(file)}:{line} in {name}" for file, line, name in ours[:DEPTH]]


def _outwards(frame: FrameType | None) -> Iterator[tuple[FrameType, int]]:
    while frame is not None:
        yield frame, frame.f_lineno
        frame = frame.f_back


def _short(file: str) -> str:
    """A path from the project's root, or from where its package is installed."""
    for start in (ROOT, *sorted(LIBRARIES, key=len, reverse=True)):
        if file.startswith(start):
            return file.removeprefix(start)
    return file
