"""The run's log: every number goes to every sink through one object."""

from __future__ import annotations

import atexit
import queue
import time
import warnings
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, TextIO

from trainer.logging import history
from trainer.logging.boards import EXIT_TIMEOUT, BackgroundBoard, TensorBoard, Wandb
from trainer.logging.config import LogConfig
from trainer.logging.files import GrowingFile
from trainer.logging.line import PLAIN_WIDTH, Eta, duration, eval_line, step_line
from trainer.logging.terminal import Terminal

# Seconds close() waits for the boards to write out what they hold.
_CLOSE_TIMEOUT = 60.0


class Log(Protocol):
    """What the training loop says; `RunLog` on the main rank, `NullLog` elsewhere."""

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Report one logged step (every ``log.every`` steps); ``step`` counts finished optimizer steps from 1."""
        ...

    def advance(self, step: int) -> None:
        """Move the progress bar on a step that is not logged."""
        ...

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Report held-out losses after ``step``."""
        ...

    def note(self, text: str) -> None:
        """Say something in words."""
        ...

    def close(self, summary: str | None = None, failed: bool = False) -> None:
        """Write out everything and say ``summary``; later calls do nothing."""
        ...


class NullLog:
    """Says nothing: the log of every rank but the main one."""

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Nothing."""

    def advance(self, step: int) -> None:
        """Nothing."""

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""

    def close(self, summary: str | None = None, failed: bool = False) -> None:
        """Nothing."""


class RunLog:
    """Terminal, ``log.txt``, ``metrics.jsonl`` and the boards of one run; lives on the main rank only.

    Args:
        run_dir: the run folder; made if missing.
        cfg: the log section.
        run_name: name shown by wandb.
        resolved_config: the whole run's config as plain values, shown by wandb.
        total_steps: optimizer steps of the whole run.
        resume_step: the finished step the run goes on from, 0 for a fresh one.
        stream: where terminal lines go; None is standard output.
    """

    def __init__(
        self,
        run_dir: Path,
        cfg: LogConfig,
        run_name: str,
        resolved_config: dict[str, Any],
        total_steps: int,
        resume_step: int,
        stream: TextIO | None = None,
    ) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self._total = total_steps
        self._eta = Eta(total_steps)
        self._closed = False
        # Boards speak from their threads; their words wait here until the main thread prints.
        self._heard: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._text = GrowingFile(run_dir / "log.txt")
        self._metrics = GrowingFile(run_dir / history.FILE_NAME)
        supersedes = resume_step > 0 or not self._metrics.was_empty
        self._terminal = Terminal(total_steps, resume_step, stream)
        self._boards: list[BackgroundBoard] = []
        if cfg.tensorboard:
            self._add_board("tensorboard", lambda: TensorBoard(run_dir, resume_step if supersedes else None))
        if cfg.wandb != "disabled":
            note = self._heard.put
            self._add_board("wandb", lambda: Wandb(run_dir, cfg, run_name, resolved_config, note, resume_step > 0))
        elif cfg.entity is not None:
            warnings.warn(f"log.entity={cfg.entity} is ignored: log.wandb=disabled", stacklevel=2)
        # A program that ends without close() still flushes, and no thread is cut off inside a library's C++ code.
        atexit.register(self.close, "the program ended before the run did", failed=True)
        if supersedes:  # also a run that starts over in the same folder: its curve is not that of the one before
            self._metrics.line(history.encode("resume", resume_step, time.time(), {}))

    def _add_board(self, name: str, start: Callable[[], Any]) -> None:
        self._boards.append(BackgroundBoard(name, start, self._heard.put))

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line, one JSON row and one point per board for a logged step; ``step`` counts finished steps from 1."""
        self._eta.observe(step, time.monotonic())
        left = self._eta.seconds_left()
        self._terminal.advance(step, duration(left) if left is not None else "")
        self._record("train", step, metrics)
        self._say(lambda width: step_line(step, self._total, metrics, left, width))

    def advance(self, step: int) -> None:
        """Move the progress bar on a step that is not logged."""
        left = self._eta.seconds_left()
        self._terminal.advance(step, duration(left) if left is not None else "")

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line, one JSON row and one point per board for an evaluation after ``step``."""
        self._record("eval", step, metrics)
        self._say(lambda width: eval_line(step, self._total, metrics, width))

    def note(self, text: str) -> None:
        """Words to terminal and ``log.txt``; may have several lines."""
        self._say(lambda width: text)

    def close(self, summary: str | None = None, failed: bool = False) -> None:
        """Write out everything and say ``summary``; later calls do nothing.

        A board that takes longer than a minute (an upload; five seconds if the run failed) is left behind, and a
        line says so.
        """
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        patience = EXIT_TIMEOUT if failed else _CLOSE_TIMEOUT
        deadline = time.monotonic() + patience
        for board in self._boards:
            if not board.close(failed, max(deadline - time.monotonic(), 0.0)):
                self._heard.put(f"{board.name}: still busy after {patience:.0f} s, left behind")
        self._terminal.close()
        self._say_heard()
        if summary is not None:
            self.note(summary)
        self._text.close()
        self._metrics.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            reason = str(error).strip() or type(error).__name__
            self.close(f"stopped: {reason}", failed=True)

    def _record(self, kind: str, step: int, metrics: Mapping[str, float]) -> None:
        assert not self._closed, "the log was closed before the last metrics"
        self._metrics.line(history.encode(kind, step, time.time(), metrics))
        for board in self._boards:
            board.write(step, metrics)

    def _say(self, line_for: Callable[[int], str]) -> None:
        """Print at the terminal's width, and write to ``log.txt`` at the width of a file, with the time of day."""
        self._say_heard()
        self._terminal.line(line_for(self._terminal.width))
        self._file_line(line_for(PLAIN_WIDTH))

    def _say_heard(self) -> None:
        while not self._heard.empty():
            text = self._heard.get()
            self._terminal.line(text)
            self._file_line(text)

    def _file_line(self, text: str) -> None:
        self._text.line(f"{datetime.now():%Y-%m-%d %H:%M:%S}  {text}")
