"""Pictures and texts are compared in every layout as in one process with one micro-batch: losses, norms, gradients,
weights after three steps, and all that is reported by channel, of training and of held-out pairs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from parallel.config import ParallelConfig
from tests import contrast_cases
from tests.cases import distance, relative
from tests.pool import Pool
from trainer.stages import ClipConfig

TOLERANCE = 1e-5
STAGES = {"clip": ClipConfig(label_smoothing=0.05), "siglip": ClipConfig(loss="sigmoid")}


def row(model: str, processes: int, zero: int = 1, micro: int = 1, recompute: str = "none", **layout: Any) -> Any:
    """One training; its id says what differs from the defaults."""
    words = [f"{key}={value}" for key, value in layout.items()] + [f"zero{zero}", f"micro{micro}"]
    given = (model, processes, zero, micro, recompute, ParallelConfig(**layout))
    return pytest.param(*given, id="-".join([model, str(processes), *words]))


ROWS = [
    row("clip", 1, zero=0, micro=2),
    row("clip", 2, zero=0, micro=4),
    row("clip", 2, zero=2, micro=2),
    row("clip", 2, zero=3, micro=4),
    row("clip", 2, zero=3, micro=2, recompute="full"),
    row("clip", 2, tp=2, micro=8),
    row("clip", 4, tp=2, zero=2, micro=2),
    row("siglip", 1, zero=0, micro=4),
    row("siglip", 2, zero=2, micro=4),
    row("siglip", 4, tp=2, zero=3, micro=2),
]


class References:
    """The one-process trainings that rows are compared with, each computed once."""

    def __init__(self, pool: Callable[[int], Pool]):
        self.pool = pool
        self._found: dict[str, dict[str, Any]] = {}

    def of(self, model: str) -> dict[str, Any]:
        """All pairs in one micro-batch."""
        if model not in self._found:
            self._found[model] = self.pool(1).run(contrast_cases.train_pairs, STAGES[model], model)[0]
        return self._found[model]


@pytest.fixture(scope="module")
def references(pool: Callable[[int], Pool]) -> References:
    return References(pool)


@pytest.mark.parametrize(("model", "processes", "zero", "micro", "recompute", "layout"), ROWS)
def test_a_layout_is_one_process(
    references: References, model: str, processes: int, zero: int, micro: int, recompute: str, layout: ParallelConfig
) -> None:
    expected = references.of(model)
    train, stage = contrast_cases.train_pairs, STAGES[model]
    found = references.pool(processes).run(train, stage, model, zero, micro, layout=layout, recompute=recompute)[0]
    assert relative(expected["losses"], found["losses"]) <= TOLERANCE
    assert relative(expected["norm"], found["norm"]) <= TOLERANCE
    assert distance(expected["grads"], found["grads"]) <= TOLERANCE
    assert distance(expected["weights"], found["weights"]) <= TOLERANCE
    for theirs, ours in zip(expected["metrics"], found["metrics"], strict=True):
        assert theirs.keys() == ours.keys()
        apart = {name: abs(value - ours[name]) / max(abs(value), 1.0) for name, value in theirs.items()}
        assert max(apart.values()) <= TOLERANCE, apart


def test_the_trainings_are_real(references: References) -> None:
    """Gradients are there, also of the temperature; losses fall from about chance; all channels occur."""
    found = references.of("clip")
    assert min(found["norm"]) > 0.1 and len(set(found["losses"])) == 3
    flat = [name for name, gradient in found["grads"].items() if float(gradient.abs().max()) < 1e-6]
    assert not flat, flat
    assert {name.split("/")[1] for name in found["metrics"][2] if name.startswith("channel/")} == set(
        contrast_cases.NAMES
    )
    assert found["metrics"][-1]["eval/pairs"] == 5 and found["metrics"][0]["train/pairs"] == contrast_cases.PAIRS
