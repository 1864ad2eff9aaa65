"""What the settings of GRPO and PPO refuse, and which they say have no effect."""

from __future__ import annotations

import math
from typing import Any

import pytest

from trainer.stages.grpo import GrpoConfig
from trainer.stages.policy import Policy
from trainer.stages.ppo import PpoConfig

BAD: list[tuple[type, dict[str, Any], str]] = [
    (GrpoConfig, {"clip_low": 0.0}, "clip_low"),
    (GrpoConfig, {"clip_low": 1.5}, "clip_low"),
    (GrpoConfig, {"clip_high": math.nan}, "clip_high"),
    (GrpoConfig, {"clip_high": 0.28, "dual_clip": 1.2}, "dual_clip"),
    (GrpoConfig, {"kl": "loss", "kl_estimator": "k1"}, "kl_estimator"),
    (GrpoConfig, {"kl_coef": -0.1}, "kl_coef"),
    (GrpoConfig, {"entropy_coef": math.inf}, "entropy_coef"),
    (GrpoConfig, {"epochs": 0}, "epochs"),
    (GrpoConfig, {"mini_batches": 0}, "mini_batches"),
    (GrpoConfig, {"overlong_buffer": 0.0}, "overlong_buffer"),
    (GrpoConfig, {"overlong_coef": -1.0}, "overlong_coef"),
    (GrpoConfig, {"mismatch_max": 0.5}, "mismatch_max"),
    (GrpoConfig, {"mismatch_min": 1.5}, "mismatch_min"),
    (GrpoConfig, {"sampling_rounds": 0}, "sampling_rounds"),
    (GrpoConfig, {"dynamic_sampling": True, "advantage": "reinforce_pp"}, "dynamic_sampling"),
    (PpoConfig, {"gamma": 1.1}, "gamma"),
    (PpoConfig, {"lam": -0.1}, "lam"),
    (PpoConfig, {"value_clip": 0.0}, "value_clip"),
    (PpoConfig, {"critic_lr": 0.0}, "critic_lr"),
]
IDLE: list[tuple[type, dict[str, Any], str]] = [
    (GrpoConfig, {"kl_coef": 0.1}, "stage.kl=none"),
    (GrpoConfig, {"reference": "somewhere"}, "stage.kl=none"),
    (GrpoConfig, {"mismatch_max": 3.0}, "stage.mismatch=none"),
    (GrpoConfig, {"overlong": "filter", "overlong_coef": 2.0}, "stage.overlong=filter"),
    (GrpoConfig, {"kl": "reward", "kl_importance": True}, "no gradient"),
    (GrpoConfig, {"loss": "cispo", "dual_clip": 3.0}, "stage.loss=cispo"),
    (GrpoConfig, {"loss": "cispo", "ratio": "sequence_token"}, "the same as sequence"),
    (GrpoConfig, {"advantage": "reinforce_pp", "scale": "none"}, "stage.scale"),
    (GrpoConfig, {"sampling_rounds": 5}, "stage.dynamic_sampling=false"),
    (PpoConfig, {"kl": "none", "kl_coef": 0.1}, "stage.kl_coef"),
]


@pytest.mark.parametrize(("section", "settings", "key"), BAD)
def test_impossible_values_are_refused_with_a_way_out(section: type, settings: dict[str, Any], key: str) -> None:
    found = section(**settings).problems()
    assert [row[0] for row in found] == [f"stage.{key}"]
    _, value, reason, way = found[0]
    assert value is settings[key] and reason and "stage." in way


@pytest.mark.parametrize(("section", "settings", "words"), IDLE)
def test_settings_without_effect_are_told(section: Any, settings: dict[str, Any], words: str) -> None:
    said = section(**settings).ignored()
    assert len(said) == 1 and words in said[0], said


@pytest.mark.parametrize("section", [GrpoConfig, PpoConfig])
def test_defaults_are_sound(section: Any) -> None:
    assert section().problems() == [] and section().ignored() == []


def test_what_a_stage_needs() -> None:
    assert not GrpoConfig().moves and GrpoConfig(mini_batches=2).moves and GrpoConfig(epochs=2).moves
    assert not GrpoConfig().needs_reference and PpoConfig().needs_reference
    assert GrpoConfig(advantage="rloo").compares and not GrpoConfig(advantage="reinforce_pp").compares


def test_the_contract_says_what_is_trained() -> None:
    words = Policy(GrpoConfig(aggregation="constant", kl="loss", clip_high=0.28), 1, 99).contract
    for part in ("0.8 .. 1.28", "samples x 99", "0.04 x k3", "in the loss"):
        assert part in words
    assert "of the sample" in Policy(GrpoConfig(ratio="sequence"), 1, 99).contract
    assert "without gradient" in Policy(GrpoConfig(loss="cispo"), 1, 99).contract
