"""Text files of a run that only grow: ``log.txt`` and ``metrics.jsonl``."""

from __future__ import annotations

import os
import warnings
from pathlib import Path


class GrowingFile:
    """Appends whole lines, each on disk (handed to the operating system) before ``line`` returns.

    A full or absent disk costs no run and no line: the lines wait in memory and are tried again with the next one.
    A half line that a killed process left is closed first, so that new lines start at a line's beginning.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        # A bare descriptor: no buffer of Python's own can hold lines back or write one twice.
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        self._warned = False
        size = os.lseek(self._fd, 0, os.SEEK_END)
        self.was_empty = size == 0
        half_line = size > 0 and os.pread(self._fd, 1, size - 1) != b"\n"
        self._waiting = b"\n" if half_line else b""

    def line(self, text: str) -> None:
        """Append one line."""
        self._waiting += text.encode("utf-8", errors="replace") + b"\n"
        try:
            while self._waiting:
                self._waiting = self._waiting[os.write(self._fd, self._waiting) :]
            self._warned = False
        except OSError as err:
            if not self._warned:
                warnings.warn(f"{self._path}: cannot write ({err}); lines are kept and tried again", stacklevel=2)
            self._warned = True

    def close(self) -> None:
        """Close the file; says so if lines never reached the disk."""
        if self._waiting:
            lost = self._waiting.count(b"\n")
            warnings.warn(f"{self._path}: the last {lost} lines could not be written", stacklevel=2)
        os.close(self._fd)
