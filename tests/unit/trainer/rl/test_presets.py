"""The named kinds of GRPO in conf/stage: what each is, as its paper says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from trainer.door import load
from trainer.stages.grpo import GrpoConfig

CONF = Path(__file__).resolve().parents[4] / "conf"
PRESETS: dict[str, dict[str, Any]] = {
    "grpo": {},
    "dapo": {"aggregation": "token_mean", "clip_high": 0.28, "dynamic_sampling": True, "overlong": "penalty"},
    "dr_grpo": {"scale": "none", "aggregation": "constant"},
    "gspo": {"ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4, "mini_batches": 4},
    "rloo": {"advantage": "rloo", "scale": "none", "aggregation": "constant"},
    "reinforce_pp": {
        "advantage": "reinforce_pp", "aggregation": "token_mean", "kl": "reward", "kl_estimator": "k1", "kl_coef": 0.01,
    },
    "cispo": {"loss": "cispo", "clip_low": 1.0, "clip_high": 4.0, "aggregation": "token_mean", "mini_batches": 4},
}  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_grpo_with_these_settings(name: str) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        # A setting of it can be changed like one of grpo's own.
        tree = compose(
            "config", overrides=[f"stage={name}", "stage.entropy_coef=0.5", "data.sources=[{path: a.jsonl}]"]
        )
    stage = load(tree).stage
    assert stage == GrpoConfig(**PRESETS[name], entropy_coef=0.5)
    assert isinstance(stage, GrpoConfig)
    assert stage.problems() == [] and stage.ignored() == []
