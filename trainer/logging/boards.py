"""TensorBoard and Weights & Biases, each fed by a thread of its own.

Importing and starting them takes seconds, and a server may be far away; the training loop waits for neither. A board
that fails is reported and left out: no run ends because of one.
"""

from __future__ import annotations

import atexit
import queue
import secrets
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from trainer.logging.config import LogConfig

_GROUPS = ("train", "channel", "perf", "eval")
# Seconds until wandb's server counts as out of reach.
_WANDB_TIMEOUT = 30.0
# Seconds a failed or unfinished run waits for its boards.
EXIT_TIMEOUT = 5.0


class Board(Protocol):
    """Somewhere numbers are shown, one call per logged step or evaluation."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show the metrics of ``step``."""
        ...

    def close(self, failed: bool) -> None:
        """Write out what is left."""
        ...


class TensorBoard:
    """Event files in ``<run folder>/tensorboard``; a run that goes on or starts over hides the steps it repeats."""

    def __init__(self, run_dir: Path, resume_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes half a second

        # From the start on (0) the evaluation before step 1 is made again too.
        purge = None if resume_step is None else resume_step + (resume_step > 0)
        self._writer = SummaryWriter(log_dir=str(run_dir / "tensorboard"), purge_step=purge)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add one scalar per metric."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self, failed: bool) -> None:
        """Flush and close the event file."""
        self._writer.close()


class Wandb:
    """One wandb run for all the lives of a run: its id lies in ``wandb/run_id``, and a resumed run goes on with it.

    A run that starts over in the same folder is another run to wandb: its points must not mix with the former ones.

    The x axis of every panel is ``step``, the training step. Without a login or a reachable server an online run
    becomes an offline one, to be uploaded with ``wandb sync``.
    """

    def __init__(
        self,
        run_dir: Path,
        cfg: LogConfig,
        run_name: str,
        config: dict[str, Any],
        note: Callable[[str], None],
        resumed: bool,
    ) -> None:
        import wandb  # takes a second

        self._wandb = wandb
        folder = run_dir / "wandb"
        folder.mkdir(parents=True, exist_ok=True)
        id_file = folder / "run_id"
        run_id = id_file.read_text().strip() if resumed and id_file.is_file() else ""
        if not run_id:
            run_id = secrets.token_hex(4)
            id_file.write_text(run_id + "\n")
        fixed = {
            "project": cfg.project,
            "entity": cfg.entity,
            "name": run_name,
            "id": run_id,
            "dir": str(run_dir),
            "config": config,
        }
        self._run = self._start(cfg.wandb, fixed, note)
        self._run.define_metric("step", hidden=True)
        for group in _GROUPS:
            self._run.define_metric(f"{group}/*", step_metric="step")

    def _start(self, mode: str, fixed: dict[str, Any], note: Callable[[str], None]) -> Any:
        from wandb.errors import Error, UsageError

        wandb = self._wandb
        # The run folder already records code, git state and packages; wandb's own collectors start processes for them.
        settings = wandb.Settings(
            console="off",
            silent=True,
            disable_git=True,
            disable_code=True,
            save_code=False,
            init_timeout=_WANDB_TIMEOUT,
        )
        if mode == "online":
            try:
                # Asked here without a prompt: wandb.init would ask for a key on the terminal, above the progress bar.
                if not wandb.login(prompt=False):
                    raise UsageError("no login; run `wandb login` once")
                run = wandb.init(mode="online", resume="allow", settings=settings, **fixed)
            except (Error, OSError, ValueError, TimeoutError) as err:
                reason = str(err).strip().splitlines()[0] if str(err).strip() else type(err).__name__
                note(
                    f"wandb: not online ({reason}); going on offline; "
                    f"`wandb sync {fixed['dir']}/wandb/offline-*` uploads it"
                )
            else:
                note(f"wandb: {run.url}")
                return run
        return wandb.init(mode="offline", settings=settings, **fixed)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics against the training step."""
        self._run.log({"step": step, **metrics})

    def close(self, failed: bool) -> None:
        """End the wandb run, marked as failed if training was."""
        self._run.finish(exit_code=1 if failed else 0)


@dataclass(frozen=True)
class _Close:
    failed: bool


class BackgroundBoard:
    """A board that starts and writes on a thread; ``write`` only queues."""

    def __init__(self, name: str, start: Callable[[], Board], note: Callable[[str], None]) -> None:
        self.name = name
        self._start = start
        self._note = note
        self._queue: queue.SimpleQueue[tuple[int, dict[str, float]] | _Close] = queue.SimpleQueue()
        # A daemon, so that a crash that never reaches close() is not held up by a board.
        self._thread = threading.Thread(target=self._work, name=f"log-{name}", daemon=True)
        self._thread.start()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Queue the metrics of ``step``."""
        self._queue.put((step, dict(metrics)))

    def close(self, failed: bool, timeout: float) -> bool:
        """Let the thread finish; False if it still runs after ``timeout`` seconds."""
        atexit.unregister(self.close)
        self._queue.put(_Close(failed))
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _work(self) -> None:
        try:
            board = self._start()
            # Registered after the library's own hook, so run before it, in a program that ends without close().
            atexit.register(self.close, failed=True, timeout=EXIT_TIMEOUT)
            while not isinstance(item := self._queue.get(), _Close):
                board.write(*item)
            board.close(item.failed)
        # A thread has no caller: whatever a library or server throws is reported here, and must not end training.
        except Exception as err:
            self._note(f"{self.name}: switched off ({type(err).__name__}: {err}); metrics.jsonl goes on")
