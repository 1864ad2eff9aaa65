from __future__ import annotations

from typing import Any

import pytest

from data.formats import FORMATS
from data.kinds import detect_format
from data.rows import Chat, Completion, RowError, Text

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}

GOOD: list[tuple[str, dict[str, Any], Any]] = [
    ("text", {"text": "words", "id": 3}, Text("words")),
    ("messages", {"messages": [USER, ANSWER]}, Chat([USER, ANSWER])),
    (
        "messages",
        {"conversations": [USER, ANSWER], "tools": '[{"name": "f"}]'},
        Chat([USER, ANSWER], 0, [{"name": "f"}]),
    ),
    (
        "messages",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, ANSWER]},
        Chat([USER, ANSWER]),
    ),
    (
        "sharegpt",
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        Chat([USER, ANSWER]),
    ),
    (
        "sharegpt",
        {"system": "s", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        Chat([{"role": "system", "content": "s"}, USER, ANSWER]),
    ),
    ("alpaca", {"instruction": "q", "input": "", "output": "a"}, Chat([USER, ANSWER])),
    (
        "alpaca",
        {"instruction": "q", "input": "x", "output": "a"},
        Chat([{"role": "user", "content": "q\n\nx"}, ANSWER]),
    ),
    ("prompt_completion", {"prompt": "q", "completion": "a"}, Completion("q", "a")),
    ("prompt_completion", {"prompt": [USER], "completion": [ANSWER]}, Chat([USER, ANSWER], 1)),
]


@pytest.mark.parametrize(("name", "row", "sample"), GOOD)
def test_rows_are_recognised_and_read(name: str, row: dict[str, Any], sample: Any) -> None:
    assert detect_format([row], "f.jsonl", "data.sources[0]") == name
    assert FORMATS[name].parse(row) == sample


def test_tool_arguments_given_as_json_text_become_objects() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    row = {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [call]}]}
    sample = FORMATS["messages"].parse(row)
    assert isinstance(sample, Chat)
    answer = sample.messages[1]
    assert answer["content"] == ""
    assert answer["tool_calls"][0]["function"]["arguments"] == {"x": 1}


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("text", {"text": "  "}, "the text is empty"),
    ("text", {"txt": "a"}, "field text is missing"),
    ("text", {"text": None}, "field text is null"),
    ("messages", {"messages": []}, "no messages"),
    ("messages", {"messages": "hello"}, "field messages is a string, not a list"),
    ("messages", {"messages": ["hello"]}, "message 0 is a string"),
    ("messages", {"messages": [{"role": "usr", "content": "q"}]}, "message 0 has role 'usr'; known: assistant"),
    ("messages", {"messages": [USER, {"role": "assistant", "content": 3}]}, "message 1 has content an integer"),
    ("messages", {"messages": [USER, {"role": "assistant"}]}, "message 1 has content null"),
    ("messages", {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "'image'; only text parts"),
    ("sharegpt", {"conversations": [{"from": "alien", "value": "x"}]}, "turn 0 is from 'alien'; known: system, human"),
    ("sharegpt", {"conversations": [{"from": "human"}]}, "turn 0 needs the fields from and value"),
    ("sharegpt", {"conversations": [{"from": ["human"], "value": ""}]}, "turn 0 is from"),
    ("alpaca", {"instruction": "q", "input": 1, "output": "a"}, "field input is an integer"),
    ("alpaca", {"instruction": "q", "output": ""}, "field output is empty"),
    ("prompt_completion", {"prompt": "q", "completion": [ANSWER]}, "both be strings or both lists"),
    ("prompt_completion", {"prompt": [USER], "completion": [USER]}, "no assistant message"),
    ("prompt_completion", {"prompt": "q"}, "field completion is missing"),
]


@pytest.mark.parametrize(("name", "row", "reason"), BAD)
def test_unusable_rows_say_why(name: str, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError) as caught:
        FORMATS[name].parse(row)
    assert reason in str(caught.value)


def test_unknown_fields_are_listed_with_the_legal_formats() -> None:
    with pytest.raises(ValueError) as caught:
        detect_format([{"question": "q", "answer": "a"}], "f.jsonl", "data.sources[1]")
    message = str(caught.value)
    for part in (
        "data.sources[1].format",
        "f.jsonl",
        "answer, question",
        "alpaca (instruction, input, output)",
        "text",
    ):
        assert part in message


def test_detection_skips_rows_that_fit_nothing() -> None:
    assert detect_format([{"x": 1}, {"text": "a"}], "f", "k") == "text"
