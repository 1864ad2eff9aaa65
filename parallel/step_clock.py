"""How long a pipeline rank computes in a step, and how long it waits."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class StepTime:
    """Seconds a rank computed in a step, and seconds the step took on it."""

    busy_s: float
    wall_s: float


def idle_share(times: Sequence[StepTime]) -> float:
    """Share of the step the ranks of a pipeline waited, from the times of all of them; they began together."""
    return 1.0 - sum(t.busy_s for t in times) / (len(times) * max(t.wall_s for t in times))


class StepClock:
    """Times the work of one step. On a GPU by events in its stream, so that nothing waits for the clock."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._spans: list[tuple[Any, Any]] = []
        self._start = self._stop = self._now()

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Around each piece of work."""
        start = self._now()
        yield
        self._spans.append((start, self._now()))

    def stop(self) -> None:
        """At the end of the step."""
        self._stop = self._now()

    def read(self) -> StepTime:
        """The times; waits for the step to end on the device."""
        if self._cuda:
            torch.cuda.synchronize()
        return StepTime(sum(self._seconds(*span) for span in self._spans), self._seconds(self._start, self._stop))

    def _seconds(self, start: Any, stop: Any) -> float:
        return start.elapsed_time(stop) / 1000 if self._cuda else stop - start
