"""Log-probabilities and values of whole documents: by hand in one process, and the same in every layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from models.decoder import build
from models.init import InitSource
from parallel.config import ParallelConfig
from parallel.materialise import materialise
from parallel.sharding import WHOLE
from tests import cases, score_cases
from tests.pool import Pool

LAYOUTS: list[tuple[int, int, dict[str, Any]]] = [
    (2, 1, {"tp": 2, "sequence_parallel": True}),
    (2, 0, {"pp": 2, "schedule": "1f1b"}),
    (2, 3, {"cp": 2}),
    (2, 2, {"cp": 2, "context": "ulysses"}),
    (2, 3, {}),
    (4, 1, {"tp": 2, "pp": 2}),
]


def by_hand() -> list[tuple[list[int], list[float]]]:
    """Each document alone, from the logits of all its tokens."""
    model = build(cases.TINY)
    materialise(model, InitSource(cases.TINY, seed=3), WHOLE, torch.device("cpu"))
    found = []
    for row in cases.uneven_rows(0):
        for doc in row:
            length = len(doc.tokens_L)
            tokens = torch.from_numpy(doc.tokens_L)
            with torch.no_grad():
                logits = model(tokens, torch.arange(length), [0, length], output="head").double() / 0.7
            log_p = logits.log_softmax(-1)
            learnt = torch.from_numpy(doc.learn_L)[1:]
            picked = log_p[:-1].gather(1, tokens[1:, None])[:, 0]
            entropy = -(log_p.exp() * log_p).sum(-1)[:-1]
            found.append(([length, int(learnt.sum())], [float((picked + 0.1 * entropy)[learnt].sum())]))
    return sorted(found)


def same(a: list[Any], b: list[Any]) -> None:
    assert [key for key, _ in a] == [key for key, _ in b]
    torch.testing.assert_close(
        torch.tensor([value for _, value in a]), torch.tensor([value for _, value in b]), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("frozen", [True, False])
def test_scores_are_those_of_each_document_alone(pool: Callable[[int], Pool], frozen: bool) -> None:
    same(sorted(pool(1).run(score_cases.document_scores, 1, frozen=frozen)[0]), by_hand())


@pytest.mark.parametrize(("size", "zero", "axes"), LAYOUTS)
@pytest.mark.parametrize(("head", "frozen"), [("lm", True), ("lm", False), ("scalar", True)])
def test_every_layout_scores_alike(
    pool: Callable[[int], Pool], size: int, zero: int, axes: dict[str, Any], head: str, frozen: bool
) -> None:
    layout = ParallelConfig(**axes)
    expected = sorted(pool(1).run(score_cases.document_scores, 1, head=head)[0])
    ranks = pool(size).run(score_cases.document_scores, zero, layout, head, frozen)
    copies = layout.tp * layout.cp  # each of them scores what the others do
    found = sorted(each for rank in ranks for each in rank)
    assert len(found) == copies * len(expected)
    for copy in range(copies):
        same(found[copy::copies], expected)


@pytest.mark.parametrize(("size", "axes"), [(size, axes) for size, _, axes in LAYOUTS if axes])
def test_a_loss_of_document_sums_has_the_same_gradients(
    pool: Callable[[int], Pool], size: int, axes: dict[str, Any]
) -> None:
    loss, gradients = pool(1).run(score_cases.gradient_of_sums)[0]
    found, theirs = pool(size).run(score_cases.gradient_of_sums, ParallelConfig(**axes))[0]
    assert found == pytest.approx(loss, rel=1e-6)
    assert cases.distance(gradients, theirs) < 1e-5
