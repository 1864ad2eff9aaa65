"""Rollouts: texts, turns of a task, masks, seeds; with a writer by hand and with the generator on a tiny model."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from data.chat import Render, template_renderer
from data.formats import RowError
from data.peers import Peers
from data.prompt import Prompt
from models.generation import Completion, Generator, GeneratorConfig, Request, SamplingConfig
from parallel.config import ParallelConfig
from parallel.sharding import SINGLE
from tests import generation_cases, rollout_cases, tp_cases
from tests.pool import Pool
from tests.rollout_cases import STOP, TEMPLATE, byte_tokenizer, chat
from trainer.rollout.config import RewardFunctionConfig, RolloutConfig
from trainer.rollout.rollout import Rollouter
from trainer.rollout.task_functions import calculated
from trainer.rollout.types import Rollout

TASK = """
import time
from trainer.rollout.types import Answer

def counts(prompt, turns, most=2, pay=1.0):
    said = [turn.text for turn in turns if turn.learnt]
    return Answer("again" if len(said) < most else None, reward=pay)

def fails(prompt, turns):
    if "bad" in turns[-1].text:
        raise RuntimeError("no such tool")
    if "hang" in turns[-1].text:
        time.sleep(60)
    return 5.0 if "number" in turns[-1].text else None

def plain(prompt, turns):
    return "go on" if len(turns) == 1 else None

def always(prompt, turns):
    return "more"
"""


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


@pytest.fixture(scope="module")
def render(tokenizer: Any) -> Render:
    return template_renderer(tokenizer, None, "here")


@dataclass
class ByHand:
    """Writes what a function of (prompt as text, sample, seed) says, with the stop token unless it ends in +."""

    tokenizer: Any
    says: Callable[[str, int, int], str]
    asked: list[tuple[str, SamplingConfig, int]] = field(default_factory=list)

    def write(
        self,
        prompts: Sequence[tuple[int, ...]],
        samples: int,
        settings: SamplingConfig,
        seeds: Sequence[int],
        shown: Sequence[Prompt] | None = None,
    ) -> list[list[Completion]]:
        found = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            text = self.tokenizer.decode(list(prompt), skip_special_tokens=False)
            self.asked.append((text, settings, seed))
            found.append([self._one(prompt, text, sample, seed, settings) for sample in range(samples)])
        return found

    def _one(self, prompt: tuple[int, ...], text: str, sample: int, seed: int, settings: SamplingConfig) -> Completion:
        said = self.says(text, sample, seed)
        if said == "cannot":
            return Completion(0, sample, prompt, (), None, "error", "the prompt is too long")
        tokens = self.tokenizer.encode(said.removesuffix("+") + STOP * (not said.endswith("+")))
        cut = tokens[: settings.max_new_tokens]
        finish = "stop" if len(cut) == len(tokens) and not said.endswith("+") else "length"
        log_probs = tuple(-0.1 * (1 + n) for n in range(len(cut)))
        written = self.tokenizer.decode(cut, skip_special_tokens=True)
        return Completion(0, sample, prompt, tuple(cut), written, finish, log_probs=log_probs)


ALONE = Peers(0, 1, lambda each: [each])


@pytest.fixture
def rollouter(tokenizer: Any, render: Render) -> Iterator[Callable[..., Rollouter]]:
    made: list[Rollouter] = []

    def make(seed: int = 0, peers: Peers = ALONE, said: list[str] | None = None, **values: Any) -> Rollouter:
        shown = render if values.pop("chat", True) else None
        told = [] if said is None else said
        made.append(Rollouter(RolloutConfig(**values), tokenizer, shown, seed, peers, told.append))
        return made[-1]

    yield make
    for each in made:
        each.close()


def written(tokenizer: Any, rollout: Rollout) -> list[tuple[str, bool]]:
    """The tokens behind the prompt as text, in runs of learnt and masked."""
    runs: list[tuple[list[int], bool]] = []
    start = len(rollout.prompt.tokens)
    for token, learnt in zip(rollout.tokens[start:], rollout.learn[start:], strict=True):
        if not runs or runs[-1][1] != learnt:
            runs.append(([], learnt))
        runs[-1][0].append(token)
    return [(tokenizer.decode(tokens, skip_special_tokens=False), learnt) for tokens, learnt in runs]


def test_samples_stand_beside_each_other_with_masks(tokenizer: Any, render: Render, rollouter: Any) -> None:
    writer = ByHand(tokenizer, lambda text, sample, seed: f"{'7' if 'three' in text else '8'}{'+' if sample else ''}")
    asked = [chat(tokenizer, render, "three", 4, answer=7), chat(tokenizer, render, "four", 9, answer=7)]
    found = rollouter(samples=2, rewards=(RewardFunctionConfig("numeric_match"),)).collect(asked, writer, step=3)
    assert [(each.prompt.number, each.sample) for each in found] == [(4, 0), (4, 1), (9, 0), (9, 1)]
    assert [each.reward for each in found] == [1, 1, 0, 0]
    assert [each.finish for each in found] == ["stop", "length", "stop", "length"]
    first = found[0]
    assert first.tokens[: len(asked[0].tokens)] == asked[0].tokens and not any(first.learn[: len(asked[0].tokens)])
    assert written(tokenizer, first) == [("7" + STOP, True)] and first.text == "7" and first.new_tokens == 2
    assert first.log_probs[-2:] == (-0.1, -0.2) and set(first.log_probs[:-2]) == {0.0}
    assert written(tokenizer, found[1]) == [("7", True)]


def test_draws_hang_on_run_prompt_step_and_repetition_alone(tokenizer: Any, render: Render, rollouter: Any) -> None:
    def seeds(numbers: Sequence[int], seed: int = 0, step: int = 1, evaluation: bool = False) -> list[int]:
        writer = ByHand(tokenizer, lambda *_: "x")
        prompts = [chat(tokenizer, render, "a", number) for number in numbers]
        found = rollouter(seed=seed, samples=2).collect(prompts, writer, step, evaluation)
        assert len({(each.prompt.number, each.sample) for each in found}) == len(found)
        return [drawn for _, _, drawn in writer.asked]

    one, two = seeds([1, 2])
    assert seeds([2, 5, 1])[::2] == [two, one]
    again = seeds([1, 2, 1])
    assert again[:2] == [one, two] and len({*again, *seeds([1], seed=1), *seeds([1], step=2)}) == 5
    assert seeds([1], evaluation=True) == seeds([1], step=7, evaluation=True) != [one]
    assert all(0 <= each < 2**63 for each in again)


def test_a_prompt_again_in_a_later_call_of_the_step_has_further_samples(
    tokenizer: Any, render: Render, rollouter: Any
) -> None:
    writer = ByHand(tokenizer, lambda *_: "x")
    made, prompt = rollouter(samples=2), chat(tokenizer, render, "a", 3)
    samples = [[each.sample for each in made.collect([prompt], writer, step)] for step in (1, 1, 2)]
    assert samples == [[0, 1], [2, 3], [0, 1]]
    assert writer.asked[0][2] != writer.asked[1][2]


def test_a_prompt_that_cannot_be_run_costs_its_samples_a_zero(tokenizer: Any, render: Render, rollouter: Any) -> None:
    writer = ByHand(tokenizer, lambda text, *_: "cannot" if "long" in text else "7")
    asked = [chat(tokenizer, render, "long", 0, answer=7), chat(tokenizer, render, "short", 1, answer=7)]
    found = rollouter(samples=2, rewards=(RewardFunctionConfig("numeric_match"),)).collect(asked, writer, 0)
    assert [each.finish for each in found] == ["error", "error", "stop", "stop"]
    assert [each.reward for each in found] == [0, 0, 1, 1]
    assert found[0].new_tokens == 0 and found[0].errors == {"generation": "the prompt is too long"}


def test_evaluation_is_greedy_unless_asked(tokenizer: Any, render: Render, rollouter: Any) -> None:
    writer = ByHand(tokenizer, lambda *_: "x")
    made = rollouter(samples=3, temperature=0.8, top_p=0.9)
    assert len(made.collect([chat(tokenizer, render, "a")], writer, 1, evaluation=True)) == 1
    assert len(made.collect([chat(tokenizer, render, "a")], writer, 1)) == 3
    assert [settings.temperature for _, settings, _ in writer.asked] == [0.0, 0.8]
    assert all(settings.log_probs for _, settings, _ in writer.asked)


# --- several turns ---------------------------------------------------------------------------------------------------


def calculating(text: str, sample: int, seed: int) -> str:
    if "<|im_start|>tool\n" not in text:
        return "<think>hm</think>let me see <calculator>12 * (3 + 4)</calculator>" if sample == 0 else "85"
    return "it is " + text.rpartition("<|im_start|>tool\n")[2].partition("<")[0]


def test_a_tool_answers_and_its_tokens_are_not_learnt(tokenizer: Any, render: Render, rollouter: Any) -> None:
    writer = ByHand(tokenizer, calculating)
    made = rollouter(samples=2, task="calculator", rewards=(RewardFunctionConfig("numeric_match"),))
    made.check()
    called, direct = made.collect([chat(tokenizer, render, "12*7?", answer=84)], writer, 0)
    first = "<think>hm</think>let me see <calculator>12 * (3 + 4)</calculator>"
    assert written(tokenizer, called) == [
        (first + STOP, True),
        ("\n<|im_start|>tool\n84<|im_end|>\n<|im_start|>assistant\n", False),
        ("it is 84" + STOP, True),
    ]
    assert called.finish == "stop" and called.text == "it is 84" and called.reward == 1
    assert [(turn.role, turn.text) for turn in called.turns] == [
        ("assistant", first), ("tool", "84"), ("assistant", "it is 84"),
    ]  # fmt: skip
    assert [tokenizer.decode(called.tokens[t.start : t.stop][:2]) for t in called.turns] == [
        "<t", "\n<|im_start|>", "it",
    ]  # fmt: skip
    assert called.written == first + "\nit is 84"
    assert all((value < 0) == learnt for value, learnt in zip(called.log_probs, called.learn, strict=True))
    assert len(direct.turns) == 1 and direct.reward == 0
    # What was asked the second time begins with the very tokens that were written; a new rendering would not.
    again = render(
        [*called.prompt.messages, {"role": "assistant", "content": first}, {"role": "tool", "content": "84"}],
        None,
        True,
    )  # type: ignore[misc]
    assert writer.asked[1][0].startswith(called.prompt.text + first) and first not in again
    assert len(writer.asked) == 2 and writer.asked[1][2] != writer.asked[0][2]


HEADERS = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}<|im_start|>\n\n{{ m.content | trim }}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant<|im_start|>\n\n{% endif %}"
)
INSTRUCTIONS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}<|im_end|>"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "role", "behind"),
    [
        (TEMPLATE.replace(".split('</think>')[-1]", ""), "tool", "\n"),
        (HEADERS, "tool", ""),
        (INSTRUCTIONS, "user", ""),
    ],
    ids=["marks", "headers", "instructions"],
)
def test_the_tokens_are_those_of_one_rendering_where_the_template_keeps_what_was_said(
    template: str, role: str, behind: str, tokenizer: Any, rollouter: Any
) -> None:
    render = template_renderer(tokenizer, template, "here")
    made = rollouter(samples=1, task="calculator", task_role=role)
    made.continuation.render = render
    made.check()

    def says(text: str, sample: int, seed: int) -> str:
        return "{}<calculator>6 * 7</calculator>" if "42" not in text else "{}it is 42"

    first = render([{"role": "user", "content": "q"}, {"role": "assistant", "content": "Q"}], None, False)
    space = " " * (" Q" in first and not render([{"role": "user", "content": "q"}], None, True).endswith(" "))
    writer = ByHand(tokenizer, lambda *given: says(*given).format(space))
    (found,) = made.collect([chat(tokenizer, render, "6 * 7?")], writer, 0)
    said = [{"role": turn.role, "content": turn.text.strip()} for turn in found.turns]
    assert [turn["content"] for turn in said] == ["<calculator>6 * 7</calculator>", "42", "it is 42"]
    assert found.prompt.messages is not None
    whole = render([*found.prompt.messages, *said], None, False)
    assert list(found.tokens) == tokenizer.encode(whole.removesuffix(behind) if behind else whole)


def test_turns_and_tokens_run_out(tokenizer: Any, render: Render, rollouter: Any, tmp_path: Path) -> None:
    (tmp_path / "task.py").write_text(TASK)
    prompt, writer = chat(tokenizer, render, "go"), ByHand(tokenizer, lambda *_: "abc")

    def found(name: str, **values: Any) -> Rollout:
        (one,) = rollouter(samples=1, task=f"{tmp_path}/task.py:{name}", **values).collect([prompt], writer, 0)
        return one

    three = found("always", max_turns=3)
    assert three.finish == "turns" and [turn.role for turn in three.turns] == ["assistant", "tool"] * 2 + ["assistant"]
    reply = len(tokenizer.encode("\n<|im_start|>tool\nmore<|im_end|>\n<|im_start|>assistant\n"))
    exact = found("always", max_turns=3, max_new_tokens=4 + reply)
    assert exact.finish == "length" and len(exact.turns) == 1, "no token would be left for the policy"
    one_left = found("always", max_turns=3, max_new_tokens=4 + reply + 1)
    assert one_left.finish == "length" and one_left.text == "a"
    assert len(one_left.tokens) == len(prompt.tokens) + 4 + reply + 1


def test_rows_with_less_room_are_cut_as_if_they_had_been_asked_for_less(
    tokenizer: Any, render: Render, rollouter: Any, tmp_path: Path
) -> None:
    (tmp_path / "task.py").write_text(TASK)
    writer = ByHand(tokenizer, lambda text, sample, _: "x" * (1 + 9 * sample) if "again" not in text else "abcdefgh")
    reply = len(tokenizer.encode("\n<|im_start|>tool\nagain<|im_end|>\n<|im_start|>assistant\n"))
    room = 11 + reply + 4  # the long one's first text with its stop, the reply, and four tokens
    made = rollouter(samples=2, task=f"{tmp_path}/task.py:counts", max_new_tokens=room)
    short, long = made.collect([chat(tokenizer, render, "go")], writer, 0)
    assert (short.finish, short.text) == ("stop", "abcdefgh")
    assert (long.finish, long.text) == ("length", "abcd")
    assert len(long.tokens) == len(long.prompt.tokens) + room and len(long.log_probs) == len(long.tokens)


def test_a_task_that_fails_ends_one_sample(tokenizer: Any, render: Render, rollouter: Any, tmp_path: Path) -> None:
    (tmp_path / "task.py").write_text(TASK)
    said: list[str] = []
    texts = ["bad", "hang", "number", "fine"]
    made = rollouter(samples=4, task=f"{tmp_path}/task.py:fails", task_timeout=0.5, said=said)
    writer = ByHand(tokenizer, lambda text, sample, _: texts[sample])
    found = made.collect([chat(tokenizer, render, "go")], writer, 0)
    errors = [each.errors.get("task", "") for each in found]
    assert "RuntimeError: no such tool (" in errors[0] and errors[1] == "it took longer than 0.5 s"
    assert "it returned 5.0, neither an Answer" in errors[2] and errors[3] == ""
    assert [each.text for each in found] == texts and len(said) == 1


def test_a_tasks_reward_is_a_part(tokenizer: Any, render: Render, rollouter: Any, tmp_path: Path) -> None:
    (tmp_path / "task.py").write_text(TASK)
    said: list[str] = []
    task = {"task": f"{tmp_path}/task.py:counts", "task_arguments": {"pay": 0.5}, "samples": 1, "said": said}
    writer, prompt = ByHand(tokenizer, lambda *_: "x"), chat(tokenizer, render, "go")
    (paid,) = rollouter(rewards=(RewardFunctionConfig("task", weight=3.0),), **task).collect([prompt], writer, 0)
    assert paid.rewards == {"task": 1.0} and paid.reward == 3.0 and said == []
    rollouter(**task).collect([prompt], writer, 0)
    assert "add {function: task}" in said[0]


def test_plain_prompts_go_on_without_a_template(tokenizer: Any, rollouter: Any, tmp_path: Path) -> None:
    (tmp_path / "task.py").write_text(TASK)
    made = rollouter(samples=1, task=f"{tmp_path}/task.py:plain", chat=False)
    made.check()
    prompt = Prompt(0, 0, "text", tuple(tokenizer.encode("Once ")), "Once ", None, {})
    (found,) = made.collect(
        [prompt], ByHand(tokenizer, lambda text, *_: "upon" if "go on" not in text else "a time"), 0
    )
    assert written(tokenizer, found) == [("upon" + STOP, True), ("go on", False), ("a time" + STOP, True)]


def test_a_template_that_has_no_such_turn_is_told_before_the_run(tokenizer: Any, rollouter: Any) -> None:
    made = rollouter(task="calculator")
    refuses = "{% if messages[-1].role == 'tool' %}{{ raise_exception('tools are unknown') }}{% endif %}" + TEMPLATE
    for template, said in (
        (refuses, "tools are unknown"),
        (TEMPLATE.replace("m.content.split('</think>')[-1]", "''"), "show an answer"),
    ):
        made.continuation.render = template_renderer(tokenizer, template, "here")
        with pytest.raises(ValueError, match=f"rollout.task_role=tool: .*{said}.*rollout.task_role=user"):
            made.check()
    with pytest.raises(RowError):
        made.continuation.tokens(chat(tokenizer, made.continuation.render, "a"), made_turns(), 0, "b")


def made_turns() -> list[Any]:
    from trainer.rollout.types import Turn

    return [Turn("assistant", "x", 0, 1)]


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("12 * (3 + 4)", "84"),
        ("1/3", "0.3333333333"),
        ("0.1 + 0.2", "0.3"),
        ("-7 // 2", "-4"),
        ("7 % 4", "3"),
        ("1/0", "error: division by zero"),
        ("__import__('os')", "error: this is no arithmetic expression"),
        ("2 **" + "9" * 50, "error: this is no arithmetic expression"),
        ("9" * 31, "error: this is no arithmetic expression"),
        ("(" * 150 + "1", "error: this is no arithmetic expression"),
        ("1 + " * 60 + "1", "error: longer than 200 characters"),
        ("1e999", "error: this is no arithmetic expression"),
    ],
)
def test_the_calculator(expression: str, value: str) -> None:
    assert calculated(expression, 10) == value


# --- the generator, and several ranks ---------------------------------------------------------------------------------


class OfGenerator:
    """The generator in one process."""

    def __init__(self, tokenizer: Any, rows: int) -> None:
        cfg = dataclasses.replace(generation_cases.TINY, vocab_size=len(tokenizer), max_seq_len=400)
        self.generator = Generator(tp_cases.model_of(cfg, SINGLE), tokenizer, GeneratorConfig(max_rows=rows))  # type: ignore[arg-type]

    def write(
        self,
        prompts: Sequence[tuple[int, ...]],
        samples: int,
        settings: SamplingConfig,
        seeds: Sequence[int],
        shown: Sequence[Prompt] | None = None,
    ) -> list[list[Completion]]:
        settings = dataclasses.replace(settings, samples=samples)
        requests = [Request(prompt, settings, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        made = self.generator.generate(requests)
        return [made[n * samples : (n + 1) * samples] for n in range(len(prompts))]


def test_turns_of_a_model_depend_on_no_batch(tokenizer: Any, render: Render, rollouter: Any, tmp_path: Path) -> None:
    """Prompts in another order and company, in other batches: every sample is the same."""
    (tmp_path / "task.py").write_text(TASK)
    values = {
        "samples": 2,
        "task": f"{tmp_path}/task.py:counts",
        "max_new_tokens": 70,
        "temperature": 1.0,
        "stop": ("e",),
    }
    prompts = [chat(tokenizer, render, text, n) for n, text in enumerate(("one", "and two", "three"))]
    whole = rollouter(**values).collect(prompts, OfGenerator(tokenizer, 8), 5)
    parts = rollouter(**values)
    apart = [parts.collect([prompts[n]], OfGenerator(tokenizer, 1), 5) for n in (2, 0, 1)]
    by_prompt = [each for n in range(3) for each in (apart[1], apart[2], apart[0])[n]]
    assert [(each.tokens, each.learn) for each in whole] == [(each.tokens, each.learn) for each in by_prompt]
    assert any(len(each.turns) == 3 for each in whole), "no conversation went on"
    for one, other in zip(whole, by_prompt, strict=True):
        torch.testing.assert_close(torch.tensor(one.log_probs), torch.tensor(other.log_probs), rtol=1e-4, atol=1e-5)


def test_ranks_share_the_calls_and_know_the_same(tokenizer: Any, render: Render, tmp_path: Path) -> None:
    """Two ranks: each function is called once for each sample, on one of them."""
    (tmp_path / "own.py").write_text(
        f"def once(completion, prompt):\n    open({str(tmp_path / 'calls')!r}, 'a').write(completion + ' ')\n"
        "    return len(completion)\n"
    )
    cfg = RolloutConfig(samples=5, workers=1, rewards=(RewardFunctionConfig(f"{tmp_path}/own.py:once"),))
    meeting, given, found = threading.Barrier(2), {}, {}

    def on(rank: int) -> None:
        def gather(each: Any) -> list[Any]:
            given[rank] = each
            meeting.wait()
            both = [given[0], given[1]]
            meeting.wait()
            return both

        made = Rollouter(cfg, tokenizer, render, 0, Peers(rank, 2, gather), lambda _: None)
        made.check()
        writer = ByHand(tokenizer, lambda text, sample, _: "x" * (sample + 1))
        found[rank] = made.collect([chat(tokenizer, render, "go")], writer, 0)
        made.close()

    ranks = [threading.Thread(target=on, args=(rank,)) for rank in range(2)]
    for each in ranks:
        each.start()
    for each in ranks:
        each.join(60)
    assert found[0] == found[1] and [each.reward for each in found[0]] == [1, 2, 3, 4, 5]
    assert sorted((tmp_path / "calls").read_text().split()) == ["x" * n for n in range(1, 6)]


def test_a_slow_reward_on_one_rank_keeps_no_other_waiting_for_long(tmp_path: Path, tokenizer: Any) -> None:
    """Rank 0's function takes a second: rank 1 hears of it all the time. What rank 0 cannot do is told to both."""
    (tmp_path / "own.py").write_text(
        "import time\ndef slow(text, prompt):\n    time.sleep(1.0 if text == 'slow' else 0)\n    return 1.0\n"
    )
    cfg = RolloutConfig(samples=2, workers=1, rewards=(RewardFunctionConfig(f"{tmp_path}/own.py:slow"),))
    meeting, given, waited, failed = threading.Barrier(2), {}, [], []

    def on(rank: int) -> None:
        def gather(each: Any) -> list[Any]:
            given[rank] = each
            began = time.monotonic()
            meeting.wait()
            waited.append(time.monotonic() - began)
            both = [given[0], given[1]]
            meeting.wait()
            return both

        made = Rollouter(cfg, tokenizer, None, 0, Peers(rank, 2, gather), lambda _: None, every_s=0.1)
        made.check()
        waited.clear()
        writer = ByHand(tokenizer, lambda text, sample, _: "fast" if sample else "slow")
        assert len(made.collect([Prompt(0, 0, "", (1,), "", None, {})], writer, 0)) == 2
        made.close()
        try:
            made.rounds.run(lambda: 1 // rank)
        except (ZeroDivisionError, RuntimeError) as error:
            failed.append(str(error))

    ranks = [threading.Thread(target=on, args=(rank,)) for rank in range(2)]
    for each in ranks:
        each.start()
    for each in ranks:
        each.join(60)
    assert len(waited) > 6 and max(waited) < 0.6, waited
    assert len(failed) == 2 and any("rank 0 failed: ZeroDivisionError" in each for each in failed)


def test_rollouts_are_the_same_in_every_layout(pool: Callable[[int], Pool], tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(rollout_cases.OWN)
    file = str(tmp_path / "own.py")
    ((*alone, told),) = pool(1).run(rollout_cases.rollouts, file, ParallelConfig())
    assert {len(each.turns) for each in alone[0]} >= {3}, "no conversation went on"
    assert "a third of them (" in told[0] and 0 < sum("score" in each.errors for each in alone[0]) < len(alone[0])
    for layout in (ParallelConfig(tp=2), ParallelConfig()):
        for *found, said in pool(2).run(rollout_cases.rollouts, file, layout):
            assert [line.splitlines()[0] for line in said] == [line.splitlines()[0] for line in told]
            for one, other in zip([*alone[0], *alone[1]], [*found[0], *found[1]], strict=True):
                ours, theirs = torch.tensor(one.log_probs), torch.tensor(other.log_probs)
                torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)
                assert dataclasses.replace(other, log_probs=()) == dataclasses.replace(one, log_probs=())
