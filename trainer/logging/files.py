"""Text files of a run that only grow: ``log.txt`` and ``metrics.jsonl``."""

from __future__ import annotations

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
        self._file = open(path, "a+b", buffering=0)
        self._waiting = b""
        self._warned = False
        if self._file.seek(0, 2) > 0:
            self._file.seek(-1, 2)
            if self._file.read(1) != b"\n":
                self._waiting = b"\n"

    def line(self, text: str) -> None:
        """Append one line."""
        self._waiting += text.encode("utf-8", errors="replace") + b"\n"
        try:
            while self._waiting:
                written = self._file.write(self._waiting)
                self._waiting = self._waiting[written or 0 :]
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
        self._file.close()
