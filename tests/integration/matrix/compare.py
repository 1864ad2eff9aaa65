"""One row against one process: what is compared, and how closely."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests import cases
from tests.integration.matrix.rows import Row, model_of
from tests.pool import Pool

TOLERANCE = 1e-5
"""Largest relative difference, fp32: of losses, norms and router loads; of tensors relative to their largest value."""


@dataclass(frozen=True)
class Differences:
    """Largest relative differences of a layout from one process."""

    loss: float
    norm: float
    gradients: float
    weights: float
    metrics: float
    """Per-channel losses and token counts, router loads and entropies."""

    @property
    def worst(self) -> float:
        """The largest of all."""
        return max(vars(self).values())


ADAM = {"eps": 1e-3, "lr": 3e-3}
"""Gradients differ by 1e-7 to 1e-6 of the largest, the rounding of sums in another order. Adam divides by their size,
so of a gradient near 0 the usual eps makes the rounding as large as a step; this one keeps it as small as it was. The
rate moves weights by a tenth of their size in a step; at 1e-2 the toy's gradient doubles within two steps, and 1e-6
becomes 1e-5."""


class Matrix:
    """Runs rows; the one-process trainings they are compared with are kept."""

    def __init__(self, pool: Callable[[int], Pool]):
        self.pool = pool
        self._references: dict[Any, dict[str, Any]] = {}

    def reference(self, row: Row) -> dict[str, Any]:
        """The same training in one process."""
        key = (row.model, row.rows, row.parts)
        if key not in self._references:
            options = {"model": model_of(row.model), "rows": row.rows, "parts": row.parts, **ADAM}
            self._references[key] = self.pool(1).run(cases.train, 1, 8, **options)[0]
        return self._references[key]

    def compare(self, row: Row) -> Differences:
        """Four steps of the row on its processes, against one."""
        options: dict[str, Any] = {"model": model_of(row.model), "rows": row.rows, "parts": row.parts, **ADAM}
        pool = self.pool(row.processes)
        found = pool.run(cases.train, row.zero, row.micro_rows, layout=row.layout, recompute=row.recompute, **options)[
            0
        ]
        expected = self.reference(row)
        pairs = [
            (a[key], b[key])
            for kind in ("metrics", "loads")
            for a, b in zip(expected[kind], found[kind], strict=True)
            for key in sorted(a.keys() | b.keys())
        ]
        return Differences(
            cases.relative(expected["losses"], found["losses"]),
            cases.relative(expected["norm"], found["norm"]),
            cases.distance(expected["grads"], found["grads"]),
            cases.distance(expected["weights"], found["weights"]),
            max(abs(a - b) / max(abs(a), 1e-9) for a, b in pairs),
        )
