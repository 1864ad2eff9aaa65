"""Preference stages train in every layout as in one process: losses, norms, gradients, weights after four steps, and
all that is reported by channel, of training and of held-out pairs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from parallel.config import ParallelConfig
from tests import preference_cases
from tests.cases import TINY, distance, relative
from tests.integration.matrix.rows import model_of
from tests.pool import Pool

TOLERANCE = 1e-5
MODELS = {
    "tiny": TINY,
    "deep": dataclasses.replace(TINY, num_layers=4, tied_embeddings=True),
    "moe": dataclasses.replace(model_of("mixtral"), vocab_size=TINY.vocab_size),
}
SP: dict[str, Any] = {"sequence_parallel": True}


def row(stage: str, processes: int, model: str = "tiny", zero: int = 1, micro: int = 1, **layout: Any) -> Any:
    """One training; its id says what differs from the defaults."""
    words = [f"{key}={value}" for key, value in layout.items()] + [f"zero{zero}", f"micro{micro}"]
    given = (stage, processes, model, zero, micro, ParallelConfig(**layout))
    return pytest.param(*given, id="-".join([stage, model, str(processes), *words]))


ROWS = [
    row("reward", 1, zero=0, micro=2),
    row("reward", 2, zero=2, micro=2),
    row("reward", 2, tp=2, **SP, micro=4),
    row("reward", 2, "deep", pp=2, schedule="zbv"),
    row("reward", 2, cp=2, zero=3, micro=4),
    row("reward", 2, cp=2, context="ulysses", micro=4),
    row("reward", 2, "moe", ep=2, micro=4),
    row("reward", 4, tp=2, **SP, pp=2, zero=0, micro=2),
    row("dpo", 2, zero=3, micro=4),
    row("dpo", 2, tp=2, **SP, micro=4),
    row("dpo", 2, pp=2, zero=0),
    row("dpo", 2, "deep", pp=2, schedule="zbv"),
    row("dpo", 2, cp=2, zero=3, micro=4),
    row("dpo", 2, cp=2, context="ulysses", zero=0, micro=4),
    row("dpo", 2, "moe", ep=2, zero=2, micro=4),
    row("dpo", 4, tp=2, pp=2, micro=2),
    row("dpo", 4, cp=2, zero=2, micro=2),
    # against pairs whose answers have a prompt each
    row("reward_shared", 2, tp=2, **SP, micro=4),
    row("dpo_shared", 1, zero=0, micro=8),
    row("dpo_shared", 2, zero=3, micro=2),
    row("dpo_shared", 4, "deep", tp=2, pp=2, micro=2),
    row("ipo", 2, cp=2, micro=4),
    row("orpo", 2, zero=2, micro=4),
    row("simpo", 2, tp=2, **SP, micro=4),
    row("kto", 2, zero=2, micro=2),
    row("kto", 2, pp=2),
    row("kto", 4, tp=2, cp=2, **SP, zero=3, micro=4),
]


class References:
    """The one-process trainings that rows are compared with, each computed once."""

    def __init__(self, pool: Callable[[int], Pool]):
        self.pool = pool
        self._found: dict[tuple[str, str], dict[str, Any]] = {}

    def of(self, stage: str, model: str) -> dict[str, Any]:
        """All rows in one micro-batch, no answer without its own prompt."""
        stage = stage.removesuffix("_shared")
        if (stage, model) not in self._found:
            cfg = preference_cases.STAGES[stage]
            run = self.pool(1).run(preference_cases.train_preferences, cfg, 1, 8, model=MODELS[model])
            self._found[stage, model] = run[0]
        return self._found[stage, model]


@pytest.fixture(scope="module")
def references(pool: Callable[[int], Pool]) -> References:
    return References(pool)


@pytest.mark.parametrize(("stage", "processes", "model", "zero", "micro", "layout"), ROWS)
def test_a_layout_is_one_process(
    references: References, stage: str, processes: int, model: str, zero: int, micro: int, layout: ParallelConfig
) -> None:
    """Relative differences in fp32; rewards, which are differences of log-probabilities of tens of nats, absolute."""
    cfg = preference_cases.STAGES[stage]
    expected = references.of(stage, model)
    train = preference_cases.train_preferences
    found = references.pool(processes).run(train, cfg, zero, micro, layout=layout, model=MODELS[model])[0]
    assert relative(expected["losses"], found["losses"]) <= TOLERANCE
    assert relative(expected["norm"], found["norm"]) <= TOLERANCE
    assert distance(expected["grads"], found["grads"]) <= TOLERANCE
    assert distance(expected["weights"], found["weights"]) <= TOLERANCE
    for theirs, ours in zip(expected["metrics"], found["metrics"], strict=True):
        assert theirs.keys() == ours.keys()
        apart = {name: abs(value - ours[name]) / max(abs(value), 1.0) for name, value in theirs.items()}
        assert max(apart.values()) <= TOLERANCE, apart


def test_the_trainings_are_real(references: References) -> None:
    """Gradients are there, losses differ, all channels occur, and KTO's baseline is above 0 in some step."""
    for stage in ("reward", "dpo", "kto"):
        found = references.of(stage, "tiny")
        assert min(found["norm"]) > 0.1
        assert max(float(gradient.abs().max()) for gradient in found["grads"].values()) > 1e-3
        assert len(set(found["losses"])) == 4
        assert {name.split("/")[1] for name in found["metrics"][2] if name.startswith("channel/")} == set(
            preference_cases.NAMES
        )
    assert max(metrics["train/kl"] for metrics in references.of("kto", "tiny")["metrics"][:-1]) > 0.01
