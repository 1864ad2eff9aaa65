"""A process that runs functions which may hang or crash, started by `crew.py`.

It is a fresh interpreter that imports neither torch nor anything of a run: it belongs to no process group, holds no
GPU, and does not know that it was started on some rank. It reads jobs from the connection whose number is its
argument, and writes an outcome for each; what functions print goes to stderr.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from trainer.rollout.functions import Value, load, split
from trainer.rollout.reward_functions import FUNCTIONS, PACKAGES
from trainer.rollout.task_functions import TASKS
from trainer.rollout.types import Answer

KNOWN: dict[str, Callable[..., Any]] = {**FUNCTIONS, **TASKS}
_OF_A_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Call:
    """A function with the arguments of the config."""

    function: str
    arguments: tuple[tuple[str, Value], ...]

    @staticmethod
    def of(function: str, arguments: dict[str, Value]) -> Call:
        """Of what stands in the config."""
        return Call(function, tuple(arguments.items()))


@dataclass(frozen=True)
class Outcome:
    """What a job came to."""

    value: float | str | Answer | None = None
    error: str = ""
    """Why there is no value, with the line of the user's file where there is one."""
    trace: str = ""
    """The whole of it, for whoever wrote the function; empty for ours."""


def attempt(call: Call, given: tuple[Any, ...] | None) -> Outcome:
    """Run a function, or with None only load it. Whatever it raises is an outcome."""
    try:
        function = load(call.function, KNOWN)
        if given is not None:
            return Outcome(_plain(function(*given, **dict(call.arguments))))
        if call.function in PACKAGES:  # takes seconds, which the first text shall not pay for
            importlib.import_module(PACKAGES[call.function][0])
        return Outcome()
    except (Exception, SystemExit) as error:
        own = split(call.function)[0] is not None
        return Outcome(None, told(error, call.function), traceback.format_exc() if own else "")


def _plain(value: Any) -> float | str | Answer | None:
    """What a function returned, of a type that every process knows.

    Raises:
        TypeError: it is neither a number nor a text nor an answer.
    """
    if value is None or type(value) is str:
        return value
    if isinstance(value, Answer):
        text, reward = _plain(value.text), _plain(value.reward)
        if (text is None or isinstance(text, str)) and isinstance(reward, float):
            return Answer(text, reward)
    elif isinstance(value, str):
        return str(value)
    elif hasattr(type(value), "__float__"):  # numbers of numpy and torch too
        return float(value)
    raise TypeError(f"it returned {str(value)[:40]!r} ({type(value).__name__})")


def told(error: BaseException, function: str) -> str:
    """An error in one line, with the last line of the user's file that it came through."""
    text = f"{type(error).__name__}: {error}" if isinstance(error, SyntaxError | SystemExit) else _named(error)
    file, _ = split(function)
    if file is None:
        return text
    path = str(Path(file).expanduser().resolve())
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    return f"{text} ({file}:{lines[-1]})" if lines else f"{text} ({file})"


def _named(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def work(jobs: Connection) -> None:
    """Do jobs until there are no more."""
    while True:
        try:
            call, given = jobs.recv()
        except EOFError:
            return
        jobs.send(attempt(call, given))


def main() -> None:
    """Take the connection whose number is the only argument."""
    if sys.platform == "linux":  # a function that hangs in C does not see the connection close: the kernel ends it
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits for this one
    for name in _OF_A_RANK:
        os.environ.pop(name, None)
    os.dup2(2, 1)
    work(Connection(int(sys.argv[1])))
