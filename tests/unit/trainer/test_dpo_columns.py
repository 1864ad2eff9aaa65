"""What stage=dpo reports of pairs, by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from data.batch import Document, collate
from trainer import channels
from trainer.stages.dpo import Dpo, DpoConfig

HALF, FIFTH, TENTH = np.log(0.5), np.log(0.2), np.log(0.1)
SAID = {11: HALF, 12: FIFTH, 13: TENTH}
"""Log-probability of each answer token."""


def answer(pair: int, side: int, tokens: list[int], channel: int, reference: float) -> Document:
    facts = {"pair": float(pair), "side": float(side), "reference": reference}
    return Document(np.array([1, *tokens]), np.array([False] + [True] * len(tokens)), channel, facts)


def model(targets_T: torch.Tensor, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    said_T = torch.tensor([SAID.get(int(token), 0.0) for token in targets_T], dtype=torch.float32)
    return said_T, torch.zeros_like(said_T)


def test_what_the_policy_prefers_and_what_its_rewards_say() -> None:
    """Pair 0: the policy finds the chosen answer more probable, the reference did so even more: a negative margin.
    Pair 1, of another channel: less probable, but more than it was to the reference: a positive margin."""
    batch = collate(
        [
            answer(0, 0, [11], 0, reference=np.log(0.9)),
            answer(0, 1, [12], 0, reference=FIFTH),
            answer(1, 0, [13], 1, reference=np.log(0.01)),
            answer(1, 1, [11], 1, reference=HALF),
        ]
    )
    stage = Dpo(DpoConfig(beta=0.5), 2)
    _, terms = stage.forward(model, batch, 1.0)  # pyright: ignore[reportArgumentType]
    found = channels.metrics([terms], ("near", "far"), lambda mine: [mine], "eval", stage.columns)
    assert found["eval/near/preferred"] == 1 and found["eval/near/accuracy"] == 0
    assert found["eval/far/preferred"] == 0 and found["eval/far/accuracy"] == 1
    assert found["eval/preferred"] == 0.5 and found["eval/pairs"] == 2
    assert found["eval/near/margin"] == pytest.approx(0.5 * (HALF - np.log(0.9)), rel=1e-6)
    assert found["eval/far/chosen_reward"] == pytest.approx(0.5 * np.log(10), rel=1e-6)
    assert found["eval/chosen_log_prob"] == pytest.approx((HALF + TENTH) / 2, rel=1e-6)
