"""Rewards by hand, and functions of the user's that raise, hang, crash or talk nonsense."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from data.prompt import Prompt
from trainer.rollout import reward_functions as rules
from trainer.rollout.config import RewardFunctionConfig, RolloutConfig
from trainer.rollout.crew import MOST_STUCK, Crew, Job
from trainer.rollout.rewards import Rewards, with_parts
from trainer.rollout.types import Rollout, Turn
from trainer.rollout.worker import Call

OWN = """
import os, sys, time
from helper import LIMIT          # lies beside this file

def brevity(completion, prompt, per=10.0):
    return 1 - len(completion) / per

def raises(completion, prompt):
    if completion == "bad":
        return 1 / 0
    return LIMIT

def hangs(completion, prompt):
    while completion == "bad":
        time.sleep(0.01)
    return 1

def crashes(completion, prompt):
    if completion == "bad":
        os._exit(3)
    return True

def nonsense(completion, prompt):
    return {"bad": float("nan"), "none": None, "text": "1.0", "list": [1], "huge": float("inf")}.get(completion, 2)

def numpy_number(completion, prompt):
    import numpy
    return numpy.float32(0.5)

def surroundings(completion, prompt):
    print("what a function prints goes to stderr")
    return float("torch" in sys.modules) + 10 * float("RANK" in os.environ)

def stuck(completion, prompt):
    import re
    print(os.getpid(), flush=True)
    re.match("(a+)+$", "a" * 40 + "b")

def field(completion, prompt):
    return prompt.fields["answer"] * 2 + len(prompt.messages)
"""


def prompt_of(channel: str = "maths", **fields: Any) -> Prompt:
    return Prompt(0, 0, channel, (1, 2), "ask", ({"role": "user", "content": "ask"},), fields)


def rollout(text: str, channel: str = "maths", finish: str = "stop", **fields: Any) -> Rollout:
    turns = (Turn("assistant", text, 2, 3),)
    made = (1, 2, 3), (False, False, True), (0.0, 0.0, -1.0)
    return Rollout(prompt_of(channel, **fields), 0, *made, text, finish, turns)  # type: ignore[arg-type]


@pytest.fixture
def own(tmp_path: Path) -> str:
    (tmp_path / "helper.py").write_text("LIMIT = 7\n")
    (tmp_path / "own.py").write_text(OWN)
    return f"{tmp_path / 'own.py'}:"


@pytest.fixture(scope="module")
def crew() -> Iterator[Crew]:
    made = Crew(2)
    yield made
    made.close()


def judged(
    crew: Crew, functions: list[RewardFunctionConfig], texts: list[str], **more: Any
) -> tuple[list[Rollout], list[str]]:
    said: list[str] = []
    rewards = Rewards(RolloutConfig(rewards=tuple(functions)), crew, said.append)
    rewards.check()
    return rewards.score([rollout(text, **more) for text in texts]), said


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (rules.exact_match("<think>5?</think> <answer> Paris. </answer>", prompt_of(answer="paris")), 1),
        (rules.exact_match("paris", prompt_of(answer=["London", "Paris"])), 1),
        (rules.exact_match("Paris", prompt_of(answer="paris"), rules=""), 0),
        (rules.exact_match("so it is (B)", prompt_of(gold="b"), field="gold", pattern=r"\((\w)\)"), 1),
        (rules.exact_match("1/2", prompt_of(answer=0.5), rules="numbers"), 1),
        (rules.numeric_match("12 and 7 make 1,219.50.", prompt_of(answer="... #### 1219.5")), 1),
        (rules.numeric_match("3, so 12", prompt_of(answer=3)), 0),
        (rules.numeric_match("-3", prompt_of(answer="−3")), 1),
        (rules.numeric_match("no idea", prompt_of(answer=3)), 0),
        (rules.numeric_match("3.14", prompt_of(answer=3.14159)), 0),
        (rules.numeric_match("3.14", prompt_of(answer=3.14159), tolerance=0.001), 1),
        (rules.regex_match("a\nb", prompt_of(), pattern="a.b"), 1),
        (rules.regex_match("xaxb", prompt_of(), pattern="a.b", whole=True), 0),
        (rules.format("<think>a</think>\n<answer>4</answer>\n", prompt_of()), 1),
        (rules.format("<think>a</think> so <answer>4</answer>", prompt_of()), 0),
        (rules.format("<think> </think><answer>4</answer>", prompt_of()), 0),
        (rules.format("<think>a<answer>4</answer></think>", prompt_of()), 0),
        (rules.format("<think>a <answer>4</answer>", prompt_of(), partial=True), 0.5),
        (rules.length("a b c d e f", prompt_of(), most=4, window=4), -0.5),
        (rules.length("a b c d e f", prompt_of(), most=6), 0),
        (rules.length("a b", prompt_of(), least=10, window=4), -1),
        (rules.length("abc", prompt_of(), most=2, window=2, unit="characters"), -0.5),
        (rules.language("abc мир 12", prompt_of()), 0.5),
        (rules.language("你好 a", prompt_of(), script="Han"), 2 / 3),
        (rules.language("12 + 3", prompt_of()), 0),
        (rules.json_valid('{"a": [1, 2]}', prompt_of()), 1),
        (rules.json_valid('```json\n{"a": 1}\n```', prompt_of(), keys="a"), 1),
        (rules.json_valid('{"a": 1}', prompt_of(), keys="a, b"), 0),
        (rules.json_valid("[" * 100_000, prompt_of()), 0),
        (rules.json_valid("{a: 1}", prompt_of()), 0),
        (rules.contains("red and blue", prompt_of(), words="red, green"), 0.5),
        (rules.contains("RED", prompt_of(colours=["red"]), field="colours", case=False), 1),
        (rules.math_verify(r"thus $x = \frac{2}{4}$", prompt_of(answer="0.5")), 1),
        (rules.math_verify(r"\boxed{(x+1)^2}", prompt_of(answer="x^2+2x+1")), 1),
        (rules.math_verify("it is 3", prompt_of(answer="4")), 0),
        (rules.math_verify("<think>5</think><answer>84</answer>", prompt_of(answer="84")), 1),
        (rules.math_verify(r"$3$ <answer>\frac{1}{2}</answer>", prompt_of(answer="0.5")), 1),
    ],
)  # fmt: skip
def test_values_by_hand(value: float, expected: float) -> None:
    assert value == pytest.approx(expected)


def test_what_counts_as_the_answer() -> None:
    assert rules.answer_in(r"\boxed{1} then \boxed{\frac{1}{2}} end") == r"\frac{1}{2}"
    assert rules.answer_in("<answer>1</answer> <answer>2</answer> \\boxed{3}") == "2"
    assert rules.answer_in("<answer>cut off") == "cut off"
    assert rules.answer_in("12 + 3\n#### 15") == "15"
    assert rules.answer_in(r"\boxed{unclosed") == "unclosed"
    assert rules.last_number("1e400 x 5,") == 5


def test_a_gym_task_is_scored_by_its_own_verifier() -> None:
    import reasoning_gym

    dataset = reasoning_gym.create_dataset("products", size=3, seed=4)
    for item in dataset:
        asked = prompt_of(reasoning_gym=item)
        assert rules.reasoning_gym(f"<answer>{item['answer']}</answer>", asked) == 1
        loose = f"The answer is {item['answer']}."
        assert rules.reasoning_gym(loose, asked) == dataset.score_answer(loose, item) < 1
        assert rules.reasoning_gym(loose, asked, pattern=r"(\d+)\.") == 1
    with pytest.raises(ValueError, match="no entry of reasoning-gym"):
        rules.reasoning_gym("1", prompt_of(answer=1))


def test_importing_a_verifiers_package_is_on_nobodys_time(crew: Crew) -> None:
    entry = {"question": "2 * 3?", "answer": "6", "metadata": {"source_dataset": "products"}}
    part = RewardFunctionConfig("reasoning_gym", timeout=1.0)
    found, told = judged(crew, [part], ["<answer>6</answer>"] * 4, reasoning_gym=entry)
    assert [each.reward for each in found] == [1] * 4 and not told


def test_parts_are_weighed_and_summed(crew: Crew, own: str) -> None:
    parts = [
        RewardFunctionConfig("numeric_match", weight=2.0, channels={"code": 0.5}),
        RewardFunctionConfig(own + "brevity", weight=0.1, arguments={"per": 4}),
        RewardFunctionConfig("format", weight=0.0),
        RewardFunctionConfig("exact_match", only=("code",)),
    ]
    (maths,), _ = judged(crew, parts, ["7"], answer=7)
    assert maths.rewards == {"numeric_match": 1.0, "brevity": 0.75, "format": 0.0}
    assert maths.reward == pytest.approx(2.075) and maths.errors == {}
    (code,), _ = judged(crew, parts, ["7"], answer=7, channel="code")
    assert code.reward == pytest.approx(0.5 + 0.075 + 1.0)
    assert list(code.rewards) == ["numeric_match", "brevity", "format", "exact_match"]


def test_a_function_gets_the_prompt(crew: Crew, own: str) -> None:
    ((one,), _) = judged(crew, [RewardFunctionConfig(own + "field")], ["x"], answer=4)
    assert one.reward == 9


@pytest.mark.parametrize(
    ("name", "texts", "said"),
    [
        ("raises", ["bad"], "ZeroDivisionError: division by zero ("),
        ("hangs", ["bad"], "it took longer than 0.3 s"),
        ("crashes", ["bad"], "the process that ran it ended with exit code 3"),
        ("nonsense", ["bad"], "it returned nan, not a finite number"),
        ("nonsense", ["huge"], "it returned inf, not a finite number"),
        ("nonsense", ["none"], "it returned 'None', not a number"),
        ("nonsense", ["text"], "it returned '1.0', not a number"),
        ("nonsense", ["list"], "it returned '[1]' (list)"),
    ],
)
def test_a_failure_costs_one_sample_a_zero(crew: Crew, own: str, name: str, texts: list[str], said: str) -> None:
    good, bad = "x", texts[0]
    part = [RewardFunctionConfig(own + name, timeout=0.3), RewardFunctionConfig("contains", arguments={"words": bad})]
    found, told = judged(crew, part, [good, bad, good, bad])
    assert [each.rewards[name] > 0 for each in found] == [True, False, True, False]
    assert [each.reward for each in found] == [found[0].reward, 1.0, found[0].reward, 1.0]
    assert said in found[1].errors[name] and found[0].errors == {}
    assert len(told) == 1 and told[0].startswith(f"reward {name}: ") and said in told[0]
    if name == "raises":
        line = OWN.splitlines().index("        return 1 / 0") + 1
        assert f"own.py:{line})" in told[0] and "Traceback" in told[0]


def test_numbers_of_libraries_count_and_no_rank_is_known(crew: Crew, own: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found, told = judged(crew, [RewardFunctionConfig(own + "numpy_number")], ["x"])
    assert found[0].reward == 0.5 and not told
    monkeypatch.setenv("RANK", "3")
    alone = Crew(1)
    found, _ = judged(alone, [RewardFunctionConfig(own + "surroundings")], ["x"])
    alone.close()
    assert found[0].reward == 0, "a worker has torch or thinks that it is a rank"


def test_a_function_that_always_hangs_does_not_hold_the_step_up(crew: Crew, own: str) -> None:
    part = RewardFunctionConfig(own + "hangs", timeout=0.05)
    began = time.monotonic()
    found, _ = judged(crew, [part], ["bad"] * 60)
    assert time.monotonic() - began < 10
    errors = [each.errors["hangs"] for each in found]
    assert MOST_STUCK <= sum("longer than 0.05 s" in e and "not tried" not in e for e in errors) <= MOST_STUCK + 2
    assert "not tried" in errors[-1]
    assert judged(crew, [part], ["x"])[0][0].reward == 1, "the next step begins anew"


def test_a_file_that_cannot_be_imported_is_told_before_the_run(crew: Crew, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import no_such_module\ndef f(completion, prompt): return 1\n")
    with pytest.raises(ValueError, match=r"rollout.rewards\[0\].*cannot be loaded: ModuleNotFound.*broken.py:1\)"):
        judged(crew, [RewardFunctionConfig(f"{tmp_path}/broken.py:f")], ["x"])


def test_a_missing_field_is_told(crew: Crew) -> None:
    found, told = judged(crew, [RewardFunctionConfig("numeric_match")], ["7"], solution=7)
    assert found[0].reward == 0
    assert "the prompt's row has no field answer (it has: solution)" in told[0] and "Traceback" not in told[0]


def test_texts_that_could_not_be_written_are_not_judged(crew: Crew, own: str) -> None:
    parts = [RewardFunctionConfig(own + "raises"), RewardFunctionConfig("contains")]
    found, told = judged(crew, parts, ["bad"], finish="error")
    assert found[0].rewards == {"raises": 0.0, "contains": 0.0} and found[0].errors == {} and not told


def test_a_models_score_joins_and_nan_is_an_error() -> None:
    cfg = RolloutConfig(rewards=(RewardFunctionConfig("reward_model", weight=0.5),), reward_model="folder")
    one = with_parts(rollout("x"), {"reward_model": 3.0}, cfg)
    assert one.reward == 1.5
    bad = with_parts(rollout("x"), {"reward_model": math.nan}, cfg)
    assert bad.reward == 0 and bad.rewards == {"reward_model": 0.0}
    assert bad.errors == {"reward_model": "it is nan, not a finite number"}


def test_outcomes_keep_the_order_of_their_jobs(crew: Crew, own: str) -> None:
    calls = [Job(Call.of(own + "brevity", {}), ("x" * n, prompt_of()), 5.0) for n in range(40)]
    assert [each.value for each in crew.run(calls)] == pytest.approx([1 - n / 10 for n in range(40)])


def test_workers_end_with_the_process_that_started_them(own: str) -> None:
    """Killed while a function hangs in C code, where no Python runs that could see the connection close."""
    program = f"""
from data.prompt import Prompt
from trainer.rollout.crew import Crew, Job
from trainer.rollout.worker import Call
Crew(1).run([Job(Call.of({own + "stuck"!r}, {{}}), ("", None), 60.0)])
"""
    with subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True) as parent:
        assert parent.stderr is not None
        worker = psutil.Process(int(parent.stderr.readline()))
        parent.kill()
    psutil.wait_procs([worker], timeout=10)
    assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE
