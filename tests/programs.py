"""Programs as a user starts them, without the seconds of imports: forked from the server of the pools.

A process has words, environment, outputs and exit code of its own; only its modules are there already. What matters
before or while they are imported is tested with a real start.
"""

from __future__ import annotations

import os
import resource
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.pool import die_with_parent, server

ROOT = Path(__file__).resolve().parents[1]


def start(
    words: Sequence[str],
    out: Connection | Path,
    err: Connection | Path,
    env: Mapping[str, str],
    file_limit: int | None = None,
) -> BaseProcess:
    """Begin ``python words…`` with its outputs going to files or the writing ends of pipes.

    Args:
        words: the program's path, then its command line.
        env: added to this process's environment.
        file_limit: largest size of a file in bytes that it may write.
    """
    process = server().Process(target=_program, args=(list(words), out, err, file_limit, {**os.environ, **env}))
    process.start()
    return process


def run(words: Sequence[str], timeout: float = 240, file_limit: int | None = None) -> subprocess.CompletedProcess[str]:
    """``python words…`` to its end, as ``subprocess.run`` tells it."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        process = start(words, out, err, {"OMP_NUM_THREADS": "1"}, file_limit)
        process.join(timeout)
        ended = process.exitcode
        if ended is None:
            process.kill()
            raise subprocess.TimeoutExpired(list(words), timeout, out.read_bytes(), err.read_bytes())
        return subprocess.CompletedProcess(list(words), ended, out.read_text(), err.read_text())


def _program(
    words: list[str], out: Connection | Path, err: Connection | Path, file_limit: int | None, env: dict[str, str]
) -> None:
    die_with_parent()
    for number, target in ((1, out), (2, err)):
        file = os.open(target, os.O_WRONLY | os.O_CREAT) if isinstance(target, Path) else target.fileno()
        os.dup2(file, number)
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    os.environ.clear()
    os.environ.update(env)
    os.chdir(ROOT)
    sys.argv[:] = words
    runpy.run_path(words[0], run_name="__main__")
