"""The named kinds of GRPO in conf/stage: what each is and does, as its paper says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_dir

from tests import preset_cases
from tests.pool import Pool
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


SHOWN = ("loss", "grad_norm", "entropy", "clip_low", "clip_high", "ratio_min", "ratio_max", "mismatch_kl", "moved_kl")


def _grouped(step: dict[str, Any]) -> list[np.ndarray]:
    """The rewards of each group, in the order of the samples."""
    return [step["reward_S"][step["group_S"] == group] for group in dict.fromkeys(step["group_S"])]


def _expected(name: str, step: dict[str, Any]) -> np.ndarray:
    """The advantages of samples as the paper says, [S]."""
    ways = {
        "grpo": lambda r: (r - r.mean()) / (r.std(ddof=1) + 1e-4),
        "dr_grpo": lambda r: r - r.mean(),
        "rloo": lambda r: np.array([r[i] - np.delete(r, i).mean() for i in range(len(r))]),
    }
    way = ways.get(name, ways["grpo"])
    return np.concatenate([way(rewards) for rewards in _grouped(step)])


def test_each_preset_trains_as_its_paper_says(pool: Callable[[int], Pool]) -> None:
    """Two steps of each on a tiny model: its advantages and its loss by hand, its ratios, its columns."""
    stages = {name: GrpoConfig(**settings) for name, settings in PRESETS.items()}
    (found,) = pool(1).run(preset_cases.two_steps, stages)
    for name, made in found.items():
        stage = stages[name]
        for metrics, step in zip(made["metrics"], made["steps"], strict=True):
            shown = [metrics[f"train/{column}"] for column in SHOWN]
            assert np.isfinite(shown).all() and metrics["train/grad_norm"] > 0, (name, shown)
            samples_L = np.repeat(np.arange(len(step["lengths_S"])), step["lengths_S"])
            if name not in ("reinforce_pp", "dapo"):  # one has KL in its reward, the other long samples' penalty
                wanted = _expected(name, step)[samples_L]
                np.testing.assert_allclose(step["advantage_L"], wanted, atol=2e-3, err_msg=name)
            if stage.mini_batches == 1:  # all ratios are 1
                by_sample = np.bincount(samples_L, step["advantage_L"])
                counted = {
                    "sequence_mean": (by_sample / step["lengths_S"]).mean(),
                    "token_mean": by_sample.sum() / len(samples_L),
                    "constant": by_sample.sum() / (len(by_sample) * preset_cases.NEW),
                }
                assert metrics["train/loss"] == pytest.approx(-counted[stage.aggregation], abs=1e-5), name
        assert made["moved"] > 0.9, name
        ((loss, ratio, low, high),) = made["calls"]
        assert (loss, ratio, low, high) == (stage.loss, stage.ratio, stage.clip_low, stage.clip_high)
        ratios = [np.array(each) for each in made["ratios"] if each]
        furthest = max(np.abs(each - 1).max() for each in ratios)
        assert (furthest > 1e-4) == (stage.mini_batches > 1), (name, furthest)
        alike = max(np.ptp(each) for each in ratios) < 1e-6
        assert alike == (name == "gspo" or stage.mini_batches == 1), name
    dapo, last = found["dapo"], found["dapo"]["metrics"][0]
    assert last["rollout/rounds"] > 1 and dapo["position"] > 8, "groups without signal were learnt from"
    assert last["rollout/kept_groups"] == len(_grouped(dapo["steps"][0])) <= 4
    whitened = found["reinforce_pp"]["steps"][0]["advantage_L"]
    assert abs(whitened.mean()) < 1e-6 and whitened.std() == pytest.approx(1, abs=0.01)
    assert found["gspo"]["metrics"][1]["train/clip_high"] > 0, "GSPO's narrow bounds hold nothing"
