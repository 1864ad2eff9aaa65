"""Two steps of reinforcement learning in a layout against one process: the same texts, advantages, weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert.loom_files import open_loom
from convert.source import Source
from models.adapters.config import LoraConfig
from parallel.config import ParallelConfig
from tests import cases, rl_cases
from tests.integration.matrix.compare import TOLERANCE
from tests.integration.matrix.rows import SP, model_of
from tests.pool import Pool
from trainer.stages.grpo import GrpoConfig
from trainer.stages.policy_config import PolicyConfig
from trainer.stages.ppo import PpoConfig

GRPO = GrpoConfig(kl="loss", entropy_coef=0.01)
GSPO = GrpoConfig(ratio="sequence", mini_batches=2, clip_low=0.003, clip_high=0.004)
PPO = PpoConfig(mini_batches=1)
ROWS: list[tuple[str, PolicyConfig, int, dict[str, Any], int]] = [
    # model, stage, processes, layout, ZeRO
    ("llama", GRPO, 2, {"tp": 2, **SP}, 1),
    ("llama", PPO, 2, {"tp": 2, **SP}, 2),
    ("llama_deep", GRPO, 2, {"pp": 2}, 1),
    ("llama_deep", PPO, 2, {"pp": 2, "schedule": "zbv"}, 0),
    ("llama", PPO, 2, {"cp": 2, "context": "ulysses"}, 1),
    ("llama", GSPO, 2, {"cp": 2}, 2),
    ("llama", PPO, 4, {"tp": 2}, 3),
    ("mixtral", GRPO, 2, {"ep": 2}, 2),
    ("mixtral", PPO, 4, {"ep": 2, "tp": 2}, 1),
    ("llama_deep", GSPO, 4, {"tp": 2, **SP, "pp": 2}, 1),
]


def _name(row: tuple[str, PolicyConfig, int, dict[str, Any], int]) -> str:
    model, stage, size, layout, zero = row
    kind = "gspo" if stage is GSPO else stage.name
    return f"{kind}-{model}-{size}-{','.join(f'{k}={v}' for k, v in layout.items())}-zero{zero}"


@pytest.fixture(scope="module")
def reference(pool: Callable[[int], Pool]) -> Callable[[str, PolicyConfig], dict[str, Any]]:
    """The same steps in one process, each once."""
    found: dict[tuple[str, PolicyConfig], dict[str, Any]] = {}

    def of(model: str, stage: PolicyConfig) -> dict[str, Any]:
        if (model, stage) not in found:
            found[model, stage] = pool(1).run(rl_cases.rl_steps, stage, model_of(model), ParallelConfig())[0]
        return found[model, stage]

    return of


@pytest.mark.parametrize("row", ROWS, ids=_name)
def test_a_layout_learns_as_one_process(
    row: tuple[str, PolicyConfig, int, dict[str, Any], int],
    pool: Callable[[int], Pool],
    reference: Callable[[str, PolicyConfig], dict[str, Any]],
) -> None:
    model, stage, size, layout, zero = row
    expected = reference(model, stage)
    found = pool(size).run(rl_cases.rl_steps, stage, model_of(model), ParallelConfig(**layout), zero)
    for each in found:  # every rank has all of it
        assert each["texts"] == expected["texts"]
        same_step_facts(expected["facts"], each["facts"])
    same_training(expected, found[0])


EXPERTS = LoraConfig(rank=4, targets=("v_proj", "experts.gate_up_proj", "experts.down_proj"))
ADAPTERS = [
    ("llama_deep", {}, LoraConfig(rank=4), {"pp": 2}),
    ("llama_deep", {"intermediate_size": 128, "num_layers": 2}, LoraConfig(rank=4, base="nf4"), {"pp": 2}),
    ("mixtral", {}, EXPERTS, {"ep": 2}),
]


@pytest.mark.parametrize("row", ADAPTERS, ids=["lora", "nf4", "experts"])
def test_an_adapter_learns_and_writes_as_in_one_process(row: Any, pool: Callable[[int], Pool]) -> None:
    """The generator has the adapter too, and without it the policy is its own reference. Of a base in 4 bits the
    generator has the weights that the codes mean."""
    name, changes, adapter, layout = row
    model, given = dataclasses.replace(model_of(name), **changes), {"adapter": adapter, "steps": 2}
    expected = pool(1).run(rl_cases.rl_steps, GRPO, model, ParallelConfig(), **given)[0]
    found = pool(2).run(rl_cases.rl_steps, GRPO, model, ParallelConfig(**layout), **given)[0]
    assert found["texts"] == expected["texts"]
    same_training(expected, found)
    before, after = (metrics["train/kl"] for metrics in expected["metrics"])
    assert before < 1e-9 < after
    assert found["metrics"][1]["train/mismatch_kl"] < 1e-9  # the texts are the trained policy's


@pytest.mark.parametrize("adapter", [None, LoraConfig(rank=4, dropout=0.2)], ids=["whole", "adapters"])
def test_a_resumed_run_goes_on_alike(adapter: LoraConfig | None, pool: Callable[[int], Pool], tmp_path: Path) -> None:
    """Four steps are two, a checkpoint, another layout and two more: the critic and the order of prompts included."""
    stage, model = PpoConfig(mini_batches=2, critic_adapter=adapter is not None), model_of("llama_deep")
    given: dict[str, Any] = {"adapter": adapter}
    straight = pool(1).run(rl_cases.rl_steps, stage, model, ParallelConfig(), steps=4, **given)[0]
    half = {"steps": 2, "save_to": str(tmp_path), **given}
    pool(2).run(rl_cases.rl_steps, stage, model, ParallelConfig(pp=2), **half)
    rest = {"steps": 4, "resume_from": str(tmp_path / "checkpoints" / "step_0000002"), **given}
    resumed = pool(2).run(rl_cases.rl_steps, stage, model, ParallelConfig(tp=2), **rest)[0]
    assert resumed["texts"] == straight["texts"][2:]
    assert resumed["progress"] == straight["progress"] == (4, 16)
    same_step_facts(straight["facts"][2:], resumed["facts"])
    if adapter is not None:
        assert {name.partition(".")[0] for name in straight["weights"]["critic"] if ".adapter." not in name} == {"head"}
        opened = open_loom(tmp_path / "critic")
        Source(opened, opened.cfg).check()
        with pytest.raises(AssertionError, match=r"cannot resume the critic .* it holds an adapter"):
            whole = dataclasses.replace(stage, critic_adapter=False)
            pool(1).run(rl_cases.rl_steps, whole, model, ParallelConfig(), **rest)
    for name, weights in straight["weights"].items():
        assert cases.distance(weights, resumed["weights"][name]) <= TOLERANCE


def same_step_facts(expected: list[dict[str, np.ndarray]], found: list[dict[str, np.ndarray]]) -> None:
    for ours, theirs in zip(expected, found, strict=True):
        assert ours.keys() == theirs.keys()
        for name, values in ours.items():
            largest = max(np.abs(values).max(), 1e-3)
            assert np.abs(values - theirs[name]).max() <= TOLERANCE * largest, name


def same_training(expected: dict[str, Any], found: dict[str, Any]) -> None:
    for ours, theirs in zip(expected["metrics"], found["metrics"], strict=True):
        names = {name for name in ours if name.startswith(("train/", "critic/", "rollout/", "channel/"))}
        assert names == {name for name in theirs if name.startswith(("train/", "critic/", "rollout/", "channel/"))}
        for name in names:
            assert theirs[name] == pytest.approx(ours[name], rel=1e-4, abs=1e-5), name
    for kind in ("grads", "weights"):
        assert expected[kind].keys() == found[kind].keys()
        for name, tensors in expected[kind].items():
            assert cases.distance(tensors, found[kind][name]) <= TOLERANCE, (kind, name)
