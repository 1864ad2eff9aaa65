"""Lines on the terminal, with a progress bar below them where there is a terminal to draw on."""

from __future__ import annotations

import shutil
import sys
import warnings
from typing import TextIO

from tqdm import tqdm

from trainer.logging.line import PLAIN_WIDTH

_BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps  {elapsed} elapsed{postfix}"


class Terminal:
    """Plain lines into a file or pipe; on a terminal the same lines above a progress bar. No colours."""

    def __init__(self, total_steps: int, first_step: int, stream: TextIO | None = None) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._gone = False
        self._bar: tqdm | None = None
        if self._stream.isatty():
            self._bar = tqdm(
                total=total_steps,
                initial=first_step,
                file=self._stream,
                bar_format=_BAR,
                dynamic_ncols=True,
                leave=False,
                mininterval=0.2,
            )

    @property
    def width(self) -> int:
        """Columns a line may have; one less than the terminal has, so that none wraps."""
        return shutil.get_terminal_size().columns - 1 if self._bar is not None else PLAIN_WIDTH

    def line(self, text: str) -> None:
        """Print one line, above the bar if there is one."""
        if self._gone:
            return
        encoding = self._stream.encoding or "utf-8"
        try:
            if self._bar is not None:
                self._bar.clear()
            print(text.encode(encoding, errors="replace").decode(encoding), file=self._stream, flush=True)
            if self._bar is not None:
                self._bar.refresh()
        except OSError as err:
            # A closed pipe or a full disk behind it ends the lines, not the training; log.txt has them all.
            self._gone = True
            warnings.warn(f"standard output is gone ({err}); log.txt in the run folder goes on", stacklevel=2)

    def advance(self, step: int, left: str) -> None:
        """Move the bar to ``step``; ``left`` is the remaining time in words, empty while unknown."""
        if self._bar is not None and not self._gone:
            self._bar.set_postfix_str(f"{left} left" if left else "", refresh=False)
            self._bar.update(step - self._bar.n)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
