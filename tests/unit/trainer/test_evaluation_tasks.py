"""Tasks answered in a model's own words: rows, comparing and counting by hand, texts against the model alone."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from convert.opening import open_weights
from data.cache_files import BadRow
from data.chat import template_renderer
from data.formats import RowError
from data.tokenizer import load_tokenizer
from models.generation import Completion, Generator, SamplingConfig
from tests.convert_cases import tiny
from tests.unit.data.conftest import make_tokenizer
from trainer.evaluation import completions, judging, tasks
from trainer.evaluation.completions import Attempted, Judging, Tally, TaskEncoder, Written, attempt, wilson
from trainer.evaluation.judging import RULES, Verdict, judge, normalised, number
from trainer.evaluation.rows import RowFile
from trainer.evaluation.scorer import load_scorer
from trainer.evaluation.tasks import Task

ALIKE: list[tuple[str, str, tuple[str, ...]]] = [
    ("Paris", "paris", ("case",)),
    ("STRASSE", "straße", ("case",)),
    (" New\n York\t", "New York", ("whitespace",)),
    ('"Paris".', "Paris", ("punctuation",)),
    ("**Paris**!", "Paris", ("punctuation",)),
    ("（）", "（）", ()),
    ("caf\u00e9", "cafe\u0301", ()),
    ("1,200.50", "1200.5", ("numbers",)),
    ("$1,200", "1200", ("numbers",)),
    ("-$5", "−5.00", ("numbers",)),
    ("1/2", ".5", ("numbers",)),
    ("2/4", "0.50", ("numbers",)),
    ("3e2", "300", ("numbers",)),
    ("+7", "7.", ("numbers",)),
    ("**42**.", "42", ("numbers", "punctuation")),
    (" 42\n", "42", ("numbers",)),
    ('"The  Sea".', "THE sea", RULES),
]
UNLIKE: list[tuple[str, str, tuple[str, ...]]] = [
    ("Paris", "paris", ("whitespace", "punctuation", "numbers")),
    ("New  York", "New York", ("case", "punctuation", "numbers")),
    ("Paris.", "Paris", ("case", "whitespace", "numbers")),
    ("5", "-5", RULES),
    (".5", "5", RULES),
    ("-5", "5", ("punctuation",)),
    ("1,20", "120", RULES),
    ("50%", "50", RULES),
    ("1200", "1200.5", ("numbers",)),
    ("1200.0", "1200", ("case", "whitespace", "punctuation")),
    ("1/0", "1/00", ("numbers",)),
    ("٣", "3", ("numbers",)),
]


@pytest.mark.parametrize(("a", "b", "rules"), ALIKE)
def test_what_is_alike(a: str, b: str, rules: Any) -> None:
    assert normalised(a, rules) == normalised(b, rules)


@pytest.mark.parametrize(("a", "b", "rules"), UNLIKE)
def test_what_is_not_alike(a: str, b: str, rules: Any) -> None:
    assert normalised(a, rules) != normalised(b, rules)


def test_numbers_of_any_length_are_read_quickly_or_not_at_all() -> None:
    assert number("1" * 200) == "1" * 200 and number("1" * 201) is None
    assert number("1e999") == "1" + "0" * 999 and number("1e1000") is None


TEXT = "First 3 apples, then 4 more: the answer is **7**. So 7."
JUDGED: list[tuple[str, tuple[str, ...], str | None, Any, Any, Verdict]] = [
    ("Paris", ("Paris",), None, (), "first", Verdict("Paris", True)),
    ("Paris.", ("Paris",), None, (), "first", Verdict("Paris.", False)),
    ("Paris.", ("Lyon", "paris"), None, ("case", "punctuation"), "first", Verdict("Paris.", True)),
    (TEXT, ("7",), r"\d+", (), "first", Verdict("3", False)),
    (TEXT, ("7",), r"\d+", (), "last", Verdict("7", True)),
    (TEXT, ("7.0",), r"answer is \**(\d+)", ("numbers",), "first", Verdict("7", True)),
    (TEXT, ("4",), r"(x)|then (\d)", (), "first", Verdict("4", True)),
    (TEXT, (), r"\bapples\b", (), "first", Verdict("apples", True)),
    (TEXT, (), r"pears", (), "first", Verdict(None, False)),
    (TEXT, ("7",), r"pears (\d)", (), "last", Verdict(None, False)),
    ("aé", ("e\u0301",), r"é", (), "first", Verdict("é", True)),
]


@pytest.mark.parametrize(("text", "answers", "pattern", "rules", "take", "verdict"), JUDGED)
def test_verdicts_by_hand(text: str, answers: Any, pattern: Any, rules: Any, take: Any, verdict: Verdict) -> None:
    assert judge(text, answers, pattern, rules, take) == verdict


RUNAWAY = r"(?:(?:.|.)+)+\b\B"


def test_a_pattern_that_would_take_years_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "_SECONDS", 0.05)
    with pytest.raises(RowError, match=r"runs away: more than 0.05 s on an answer of 40 characters"):
        judge("a" * 40, (), RUNAWAY, (), "first")


GOOD: dict[str, Any] = {"prompt": "2+2=", "answer": "4"}
ROWS: list[tuple[object, object]] = [
    (GOOD, ("2+2=", ("4",), None)),
    ({"question": "2+2=", "answer": [4, "four"], "regex": r"(\d)"}, ("2+2=", ("4", "four"), r"(\d)")),
    ({"prompt": "q", "regex": "yes|no", "channel": "talk"}, ("q", (), "yes|no")),
    ({"prompt": "q", "answer": 0.5}, ("q", ("0.5",), None)),
    (
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}], "answer": "a"},
        ([{"role": "system", "content": "s"}, {"role": "user", "content": "u"}], ("a",), None),
    ),
    ({"answer": "4"}, "there is no prompt, question or messages among its fields (answer)"),
    (GOOD | {"question": "q"}, "there is both prompt and question among its fields"),
    (GOOD | {"prompt": " "}, "prompt is empty"),
    (GOOD | {"prompt": 3}, "prompt is 3, not a string"),
    (GOOD | {"prompt": "\ud800"}, "prompt has half a surrogate pair"),
    ({"prompt": "q"}, "there is neither answer nor regex"),
    (GOOD | {"answer": []}, "answer is an empty list"),
    (GOOD | {"answer": ["a", ""]}, "answer is empty"),
    (GOOD | {"answer": True}, "answer is True, not a string, a number or a list of them"),
    (GOOD | {"answer": {"a": 1}}, "answer is {'a': 1}, not a string"),
    (GOOD | {"regex": "(a"}, "regex '(a' is no regular expression: missing )"),
    (GOOD | {"regex": 3}, "regex is 3, not a string"),
    (GOOD | {"choices": ["3", "4"]}, "it has choices: name a file of multiple-choice questions with --questions"),
    (GOOD | {"channel": ""}, "channel is '', not a name"),
    ({"messages": "hello", "answer": "a"}, "messages is 'hello', not a list"),
    ({"messages": [], "answer": "a"}, "there are no messages"),
    ({"messages": [{"role": "assistant", "content": "u"}], "answer": "a"}, "the last message is the assistant's"),
    ({"messages": [{"role": "user", "content": "\ud800"}], "answer": "a"}, "message 0 has half a surrogate pair"),
    (b"{", "not JSON"),
]


def test_every_row_is_a_task_or_has_a_reason(tmp_path: Path) -> None:
    path = tmp_path / "sums.jsonl"
    path.write_bytes(b"\n".join(row if isinstance(row, bytes) else json.dumps(row).encode() for row, _ in ROWS))
    found = list(tasks.read(RowFile(str(path), option="--tasks")))
    for line, (got, (_, expected)) in enumerate(zip(found, ROWS, strict=True), 1):
        assert (got.file, got.line) == (str(path), line)
        if isinstance(expected, tuple):
            assert isinstance(got, Task) and (got.prompt, got.answers, got.pattern) == expected
        else:
            assert isinstance(got, BadRow) and got.reason.startswith(str(expected)), (got, expected)
    assert [each.channel for each in found[:3] if isinstance(each, Task)] == ["sums", "sums", "talk"]
    text = path.rename(tmp_path / "sums.txt")
    with pytest.raises(ValueError, match=r"^--tasks .*: must be .jsonl, .json or .parquet, with a task a row"):
        list(tasks.read(RowFile(str(text), option="--tasks")))


def attempted(channel: str, *texts: tuple[bool, Any, str | None]) -> Attempted:
    made = [
        Written(Completion(0, i, (1,), (2, 3), "text", finish), Verdict(extracted, right))
        for i, (right, finish, extracted) in enumerate(texts)
    ]
    return Attempted(Task("f", 1, channel, "q", ("a",), None), tuple(made))


def test_the_tally_by_hand() -> None:
    tally = Tally()
    tally.add(attempted("all", (True, "stop", "a")))
    tally.add(attempted("x", (True, "stop", "a"), (False, "length", "b")))  # two samples: half a task
    tally.add(attempted("x", (False, "length", None), (False, "stop", None)))
    first, x, whole = tally.results()
    assert (first.channel, first.tasks, first.accuracy, first.cut, first.unmatched) == ("all", 1, 1.0, 0, 0)
    assert (x.channel, x.tasks, x.accuracy, x.cut, x.unmatched) == ("x", 2, 0.25, 2, 2)
    assert (whole.channel, whole.tasks, whole.accuracy, whole.cut) == ("all", 3, pytest.approx(0.5), 2)
    assert (whole.low, whole.high) == wilson(0.5, 3)


@pytest.mark.parametrize(("right", "count"), [(0, 10), (8, 10), (1, 1), (500, 1000)])
def test_the_interval_is_where_the_normal_test_rejects(right: int, count: int) -> None:
    """Wilson's interval: the shares p that differ from what was found by at most 1.96 of their own deviations."""
    share, (low, high) = right / count, wilson(right / count, count)
    for edge, outer in ((low, 0.0), (high, 1.0)):
        deviation = math.sqrt(edge * (1 - edge) / count)
        assert edge == pytest.approx(outer, abs=1e-12) or abs(share - edge) == pytest.approx(1.959964 * deviation)
    assert 0 <= low <= share <= high <= 1


Run = Callable[..., tuple[list[Attempted], list[BadRow]]]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Tasks through a tiny model with random weights and a tokenizer of bytes."""
    folder = tmp_path_factory.mktemp("tasks")
    tiny("tiny_llama", folder)
    make_tokenizer().save_pretrained(folder)
    tokenizer = load_tokenizer(str(folder))
    render = template_renderer(tokenizer, None, str(folder))
    generator = Generator(load_scorer(open_weights(folder), torch.device("cpu")).model, tokenizer)

    def run(
        asked: list[Task | BadRow], sampling: SamplingConfig, judging: Judging | None = None, chat: bool = False
    ) -> tuple[list[Attempted], list[BadRow]]:
        bad: list[BadRow] = []
        encoder = TaskEncoder(tokenizer, render, chat)
        return list(attempt(generator, asked, encoder, sampling, judging or Judging(), bad.append)), bad

    return run


def asked(count: int) -> list[Task | BadRow]:
    return [Task("f", i, f"c{i % 2}", "why " * (1 + i % 3), ("a",), None) for i in range(count)]


def test_rows_keep_their_order_and_texts_whatever_the_window(answers: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = SamplingConfig(max_new_tokens=4, temperature=1.0, seed=3, samples=2)
    whole, _ = answers(asked(7), settings)
    assert [each.task.line for each in whole] == list(range(7)) and {len(each.texts) for each in whole} == {2}
    monkeypatch.setattr(completions, "WINDOW", 3)
    parts, _ = answers(asked(7), settings)
    texts, again = ([[text.completion.tokens for text in each.texts] for each in some] for some in (whole, parts))
    assert again == texts and [each.task for each in parts] == asked(7)
    assert texts[0] != texts[3] and texts[0][0] != texts[0][1]  # the same prompt: seeds of its own
    alone, _ = answers(asked(1), replace(settings, seed=6))  # row 3 has row 0's prompt and draws with seed 3 + 3
    assert [text.completion.tokens for text in alone[0].texts] == texts[3]


def test_messages_and_chat_give_the_model_the_template(answers: Run) -> None:
    prompt = "who?"
    plain = Task("f", 1, "c", prompt, ("a",), None)
    turns = replace(plain, prompt=[{"role": "user", "content": prompt}])
    settings = SamplingConfig(max_new_tokens=2)
    given = [answers([task], settings, chat=chat)[0][0].texts[0].completion.prompt_tokens for task, chat in
             ((plain, False), (plain, True), (turns, False), (turns, True))]  # fmt: skip
    tokenizer = make_tokenizer()
    assert list(given[0]) == tokenizer.encode(prompt)
    written = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
    assert [list(each) for each in given[1:]] == [tokenizer.encode(written)] * 3


def test_texts_are_judged_and_bad_rows_are_passed_over(answers: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "_SECONDS", 0.05)
    settings = SamplingConfig(max_new_tokens=40)
    text = answers(asked(1), settings)[0][0].texts[0].completion.text
    assert text is not None and len(text) > 2
    row = Task("f", 0, "c", "why ", ("a",), None)
    rows: list[Task | BadRow] = [
        replace(row, answers=(f" {text.strip()}\n",)),
        BadRow("f", 1, "malformed"),
        replace(row, line=2, prompt="x" * 600),
        replace(row, line=3, answers=(), pattern=RUNAWAY),
        replace(row, line=4, answers=(text.strip()[-1],), pattern=r"\S"),
    ]
    found, bad = answers(rows, settings, Judging(take="last"))
    assert [(each.task.line, each.share()) for each in found] == [(0, 1.0), (4, 1.0)]
    assert [row.line for row in bad] == [1, 2, 3]
    assert "600 tokens and the model's context is 512" in bad[1].reason and "runs away" in bad[2].reason
    detail = next(found[0].details())
    assert detail["completion"] == text and detail["right"] is True and detail["finish"] in ("length", "stop")


def test_messages_without_a_template_are_a_bad_row() -> None:
    encoder = TaskEncoder(make_tokenizer(), None, False)
    with pytest.raises(RowError, match="has no chat template; give --chat-template FILE"):
        encoder.encode(Task("f", 1, "c", [{"role": "user", "content": "q"}], ("a",), None))
