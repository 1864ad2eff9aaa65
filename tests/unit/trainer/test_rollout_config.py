"""The rollout section: what is said of wrong values, and how parts of the reward are weighed by channel."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from trainer import typed
from trainer.problems import Problem
from trainer.rollout.config import RewardFunctionConfig, RolloutConfig

OWN = """
import nothing_of_this_name  # checked without being run
LIMIT = 3
def good(completion, prompt, weight=1.0, *, bonus): ...
def any_name(completion, prompt, **rest): ...
class Scorer: ...
"""


def told(**values: object) -> dict[str, str]:
    """What is said of a section, by key."""
    return {key: f"{reason}; {way}" for key, _, reason, way in replace(RolloutConfig(), **values).problems()}  # type: ignore[arg-type]


def of_reward(function: str, **values: object) -> dict[str, str]:
    return told(rewards=(RewardFunctionConfig(function, **values),))  # type: ignore[arg-type]


def test_the_defaults_are_good() -> None:
    assert RolloutConfig().problems() == []


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"prompts_per_step": 0}, "rollout.prompts_per_step"),
        ({"samples": 0}, "rollout.samples"),
        ({"max_new_tokens": 0}, "rollout.max_new_tokens"),
        ({"temperature": 0.0}, "rollout.temperature"),
        ({"temperature": -1.0}, "rollout.temperature"),
        ({"top_p": 0.0}, "rollout.top_p"),
        ({"eval_samples": 4}, "rollout.eval_samples"),
        ({"eval_temperature": -1.0}, "rollout.eval_temperature"),
        ({"max_cached_tokens": 500}, "rollout.max_cached_tokens"),
        ({"backend": "vllm"}, "rollout.url"),
        ({"task": "calculater"}, "rollout.task"),
        ({"task": "calculator", "task_arguments": {"digit": 3}}, "rollout.task"),
        ({"task_timeout": 0.0}, "rollout.task_timeout"),
        ({"tp": 0}, "rollout.tp"),
    ],
)
def test_an_impossible_value_is_told(values: dict[str, object], key: str) -> None:
    assert list(told(**values)) == [key]


def test_a_misspelt_function_is_told_the_right_one() -> None:
    assert "numeric_match (one of" in of_reward("numeric_mach")["rollout.rewards[0].function"]


@pytest.mark.parametrize(
    ("function", "arguments", "said"),
    [
        ("length", {"mst": 3}, "length has no argument mst; it takes least, most, window, unit"),
        ("length", {"most": "three"}, "most=three is not of the type int"),
        ("length", {"unit": "lines"}, "unit=lines must be one of: words, characters"),
        ("regex", {}, "regex needs the argument pattern"),
        ("regex", {"pattern": "(a"}, "is not valid: missing )"),
        ("language", {"script": "Hahn"}, "script='Hahn' is not valid"),
        ("reward_model", {}, "there is no reward model; rollout.reward_model=FOLDER"),
        ("task", {}, "there is no task"),
    ],
)
def test_arguments_are_judged_before_the_run(function: str, arguments: dict[str, object], said: str) -> None:
    assert said in of_reward(function, arguments=arguments)["rollout.rewards[0].function"]


def test_numbers_may_be_whole_where_any_number_goes() -> None:
    assert of_reward("numeric_match", arguments={"tolerance": 0, "field": "target"}) == {}


def test_own_functions_are_judged_without_being_run(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(OWN)

    def said(name: str, **arguments: object) -> str:
        return of_reward(f"{file}:{name}", arguments=arguments).get("rollout.rewards[0].function", "")

    assert said("good", bonus=1) == said("any_name", what=1) == said("Scorer") == ""
    assert "good needs the argument bonus" in said("good")
    assert "good has no argument bonsu; it takes weight, bonus" in said("good", bonsu=1)
    assert "defines no goood; it has good, any_name" in said("goood")
    assert "there is no file" in of_reward(f"{tmp_path}/owm.py:good")["rollout.rewards[0].function"]
    assert f"did you mean {file}?" in of_reward(f"{tmp_path}/owm.py:good")["rollout.rewards[0].function"]
    file.write_text("def f(:\n")
    assert "line 1 is not valid Python" in said("f")


def test_two_parts_of_one_name_are_refused() -> None:
    two = (RewardFunctionConfig("contains"), RewardFunctionConfig("contains"))
    assert "two parts of the reward are called contains" in told(rewards=two)["rollout.rewards"]
    assert told(rewards=(two[0], replace(two[1], name="polite"))) == {}
    assert "rollout.rewards[0].name" in of_reward("contains", name="reward_model")


def test_weights_by_channel() -> None:
    cfg = RolloutConfig(
        rewards=(
            RewardFunctionConfig("numeric_match", weight=2.0, channels={"code": 0.5}, only=("maths", "code")),
            RewardFunctionConfig("length", name="brevity", weight=0.0),
        ),
        reward_model="folder",
    )
    assert cfg.weights("maths") == {"numeric_match": 2.0, "brevity": 0.0, "reward_model": 1.0}
    assert cfg.weights("code") == {"numeric_match": 0.5, "brevity": 0.0, "reward_model": 1.0}
    assert cfg.weights("chat") == {"brevity": 0.0, "reward_model": 1.0}
    own = replace(cfg, rewards=(RewardFunctionConfig("reward_model", weight=3.0, channels={"chat": 1.5}),))
    assert own.weights("chat") == {"reward_model": 1.5} and own.weights("code") == {"reward_model": 3.0}


def test_weights_that_are_all_zero_are_refused() -> None:
    measured = RewardFunctionConfig("format", weight=0.0)
    assert "every part of the reward has weight 0" in told(rewards=(measured,))["rollout.rewards"]
    assert told(rewards=(measured, RewardFunctionConfig("contains"))) == {}
    assert told(rewards=(replace(measured, channels={"chat": 0.5}),)) == {}
    assert told(rewards=(measured,), reward_model="folder") == {}
    both = (measured, RewardFunctionConfig("reward_model", weight=0.0))
    assert "rollout.rewards" in told(rewards=both, reward_model="folder")


@pytest.mark.parametrize(("field", "value"), [("only", ("math",)), ("channels", {"math": 1.0})])
def test_channels_that_rewards_name_are_those_of_the_prompts(field: str, value: object) -> None:
    cfg = RolloutConfig(rewards=(RewardFunctionConfig("format", **{field: value}),))  # type: ignore[arg-type]
    cfg.check_channels(("math", "code"))
    with pytest.raises(ValueError, match=rf"rollout.rewards\[0\].{field}: .* no channel math; did you mean maths\?"):
        cfg.check_channels(("maths", "code"))
    with pytest.raises(ValueError, match="there are code, chat"):
        cfg.check_channels(("code", "chat"))


def test_settings_without_effect_are_told() -> None:
    assert RolloutConfig().ignored("grpo", used=True) == RolloutConfig().ignored("sft", used=False) == []
    cfg = RolloutConfig(samples=4, max_turns=2, url="http://a", save=False, save_tokens=True)
    assert cfg.ignored("grpo", used=True) == [
        "rollout.max_turns is ignored: rollout.task=null",
        "rollout.url is ignored: rollout.backend=loom",
        "rollout.save_tokens is ignored: rollout.save=false",
    ]
    assert replace(cfg, task="calculator", backend="vllm", save=True).ignored("grpo", used=True) == []
    assert cfg.ignored("sft", used=False)[0] == "rollout.samples is ignored: stage.name=sft writes no texts"


def test_evaluation_has_its_own_temperature() -> None:
    cfg = RolloutConfig(temperature=0.7, top_p=0.9, max_new_tokens=5)
    assert (cfg.sampling().temperature, cfg.sampling().top_p, cfg.sampling().log_probs) == (0.7, 0.9, True)
    assert cfg.sampling(evaluation=True).problems() == []
    assert cfg.sampling(evaluation=True).temperature == 0


def test_arguments_of_any_scalar_come_through_the_door() -> None:
    problems: list[Problem] = []
    tree = {"rewards": [{"function": "x", "arguments": {"a": 1, "b": 0.5, "c": "t", "d": True}, "channels": {"m": 1}}]}
    cfg = typed.build(RolloutConfig, tree, "rollout", problems, {})
    assert cfg is not None and not problems
    assert cfg.rewards[0].arguments == {"a": 1, "b": 0.5, "c": "t", "d": True}
    assert type(cfg.rewards[0].channels["m"]) is float
    tree["rewards"][0]["arguments"] = {"a": None}
    assert typed.build(RolloutConfig, tree, "rollout", problems, {}) is None
    assert problems[0].key == "rollout.rewards[0].arguments.a" and "or a text, got null" in problems[0].reason
