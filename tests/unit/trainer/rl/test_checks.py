"""What a reinforcement learning run is refused for before it starts, each with a way out that works."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from models import ModelConfig
from models.adapters.config import Ia3Config, LoraConfig
from models.adapters.virtual_config import PromptConfig
from parallel.config import ParallelConfig
from tests.rl_cases import rl_config
from trainer.rl.checks import problems
from trainer.rollout.config import RewardFunctionConfig
from trainer.stages.grpo import GrpoConfig
from trainer.stages.ppo import PpoConfig

TINY = ModelConfig("llama", 97, 32, 48, 2, 4, 2, 8, 128)
RULE = (RewardFunctionConfig("length"),)


def _told(stage: PpoConfig | GrpoConfig | None = None, world: int = 1, **rollout: Any) -> list[tuple[str, str, str]]:
    rollout = {"rewards": RULE} | rollout
    cfg = rl_config(stage or GrpoConfig(), TINY, ParallelConfig(), 1, 1, **rollout)
    return [(each.key, each.reason, each.way_out) for each in problems(cfg, world)]


def test_a_good_run_is_not_refused() -> None:
    assert _told() == [] and _told(PpoConfig()) == [] and _told(world=4, tp=2) == []


def test_nothing_gives_rewards() -> None:
    ((key, reason, way),) = _told(rewards=())
    assert key == "rollout.rewards" and "nothing gives any" in reason and "numeric_match" in way


def test_samples_that_do_not_fit_in_a_row() -> None:
    ((key, reason, way),) = _told(max_new_tokens=40)
    assert key == "rollout.max_new_tokens" and "50 tokens" in reason and "data.seq_len=48" in reason
    assert way == "data.seq_len=50 or rollout.max_new_tokens=38"


def test_one_sample_cannot_be_compared() -> None:
    ((key, _, way),) = _told(samples=1)
    assert key == "rollout.samples" and "stage.advantage=reinforce_pp" in way
    assert _told(GrpoConfig(advantage="reinforce_pp"), samples=1) == [] == _told(PpoConfig(), samples=1)


def test_samples_that_do_not_fall_into_mini_batches() -> None:
    ((key, reason, way),) = _told(GrpoConfig(mini_batches=5))
    assert key == "stage.mini_batches" and "4 x 4 samples" in reason and way == "stage.mini_batches=4"


@pytest.mark.parametrize(("tp", "world", "words"), [(2, 3, "does not divide the 3 processes"), (3, 3, "heads")])
def test_ranks_that_cannot_share_a_generator(tp: int, world: int, words: str) -> None:
    ((key, reason, way),) = _told(tp=tp, world=world)
    assert key == "rollout.tp" and words in reason and way == "rollout.tp=1, or rollout.tp=null"


def test_other_models_that_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what their config says: another vocabulary, no score head, too short, or nothing there at all."""
    other = {
        "words": dataclasses.replace(TINY, vocab_size=98),
        "short": dataclasses.replace(TINY, max_seq_len=16),
        "score": dataclasses.replace(TINY, head="scalar"),
        "same": TINY,
    }
    for name in other:
        (tmp_path / name).mkdir()
    monkeypatch.setattr("trainer.rl.checks.folder_problem", lambda folder: None)
    monkeypatch.setattr("trainer.rl.checks.model_in", lambda folder: other[Path(folder).name])

    def at(name: str) -> str:
        return str(tmp_path / name)

    reference = {name: _told(GrpoConfig(kl="loss", reference=at(name))) for name in other}
    assert reference["same"] == []
    assert "knows 98 tokens and the policy 97" in reference["words"][0][1]
    assert "reads 16 tokens, and a sample may have 30" in reference["short"][0][1]
    assert "no log-probabilities" in reference["score"][0][1]
    ((key, reason, way),) = _told(reward_model=at("same"))
    assert key == "rollout.reward_model" and "without a score head" in reason and "stage=reward" in way
    assert _told(reward_model=at("score")) == [] == _told(PpoConfig(critic=at("same")))
    ((key, *_),) = _told(PpoConfig(critic=at("words")))
    assert key == "stage.critic"


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    ((key, reason, _),) = _told(GrpoConfig(kl="loss", reference=str(tmp_path / "gone")))
    assert key == "stage.reference" and "no such folder" in reason
    assert _told(GrpoConfig(reference=str(tmp_path / "gone"))) == []  # kl=none asks no reference


def test_the_adapter_of_a_critic() -> None:
    for adapter, reason in ((None, "there is none"), (PromptConfig(), "no adapter of kind prompt")):
        found = _told(PpoConfig(critic_adapter=True), adapter=adapter)
        assert any(key == "stage.critic_adapter" and reason in said for key, said, _ in found)
    assert _told(PpoConfig(critic_adapter=True), adapter=LoraConfig()) == []


def test_a_server_cannot_be_given_every_adapter() -> None:
    server: dict[str, Any] = {"backend": "vllm", "url": "http://localhost:8000"}
    assert _told(**server) == []
    for adapter, reason in (
        (Ia3Config(), "none of kind ia3"),
        (LoraConfig(dora=True), "none of kind dora"),
        (LoraConfig(base="nf4"), "those in 4 bits"),
        (LoraConfig(targets=("experts.down_proj",)), "no adapters of experts"),
        (LoraConfig(), "fresh random weights"),
    ):
        ((key, said, way),) = _told(adapter=adapter, **server)
        assert key == "rollout.backend" and reason in said and way == "rollout.backend=loom"
