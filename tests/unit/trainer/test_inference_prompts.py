"""What a row asks for, the reasons why it asks for nothing, and its tokens against transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.chat import template_renderer
from data.formats import RowError
from models.generation import SamplingConfig
from models.generation.config import Settings
from tests.unit.data.conftest import make_tokenizer
from trainer.inference.index import BadLine, Index, digest_of, read_index
from trainer.inference.prompts import Asking, Prompter

TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
DEFAULTS = {"max_new_tokens": 8, "seed": 100}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


def asking(**given: Any) -> Asking:
    return Asking(**{"defaults": DEFAULTS, "chat": False, "has_template": True} | given)


def test_tokens_are_those_of_transformers(tokenizer: Any) -> None:
    prompter = Prompter(tokenizer, template_renderer(tokenizer, None, "here"))

    def tokens(row: dict[str, Any], **given: Any) -> list[Any]:
        return list(prompter.request(asking(**given).asked(row, 1)).prompt)

    def theirs(messages: list[dict[str, str]]) -> Any:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]

    assert tokens({"messages": TURNS}) == theirs(TURNS)
    assert tokens({"prompt": TURNS}) == theirs(TURNS)
    assert tokens({"prompt": "Why? "}) == tokenizer.encode("Why? ")
    assert tokens({"prompt": "Why? "}, chat=True) == theirs([{"role": "user", "content": "Why? "}])


def test_settings_and_seeds() -> None:
    """A row's own settings go over those of all; its seed counts with its line, unless it names one."""

    def given(row: dict[str, Any], line: int = 7) -> tuple[Settings, int | None]:
        asked = asking().asked({"prompt": "a", **row}, line)
        return asked.sampling, asked.seed

    assert given({}) == (SamplingConfig(max_new_tokens=8, seed=100), 106)
    warm = SamplingConfig(max_new_tokens=8, seed=100, temperature=0.5)
    assert given({"sampling": {"temperature": 0.5}}) == (warm, 106)
    assert given({"sampling": {"temperature": 0.5, "seed": 3}})[1] == 3
    assert given({"sampling": {"max_new_tokens": 9}}, 1) == (SamplingConfig(max_new_tokens=9, seed=100), 100)


@pytest.mark.parametrize(
    "row, reason",
    [
        ({}, "there is no prompt and there are no messages among its keys (none)"),
        ({"text": "a", "id": 1}, "among its keys (text, id)"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": " \n"}, "the prompt is empty"),
        ({"prompt": 7}, "prompt is a number, not a string or a list of messages"),
        ({"prompt": {"a": 1}}, "prompt is an object"),
        ({"prompt": "a\ud800"}, "half a surrogate pair at character 1"),
        ({"messages": "a"}, "messages is a string, not a list of messages"),
        ({"messages": []}, "there are no messages"),
        ({"messages": ["a"]}, "message 0 is a string, not an object"),
        ({"messages": [{"role": "user"}]}, "message 0 has content null, not a string"),
        ({"messages": [{"role": "user", "content": " "}]}, "the messages are empty"),
        (
            {"messages": [*TURNS, {"role": "assistant", "content": "So."}]},
            "the last of the messages is the assistant's",
        ),
        ({"prompt": "a", "tools": {}}, "tools is an object, not a list"),
        ({"prompt": "a", "sampling": []}, "sampling is a list, not an object"),
        ({"prompt": "a", "sampling": {"temprature": 1}}, "temprature: there is no such setting"),
        ({"prompt": "a", "sampling": {"top_p": "0.9"}}, "top_p='0.9': give a number"),
        ({"prompt": "a", "sampling": {"max_new_tokens": 0}}, "max_new_tokens=0: must be at least 1"),
    ],
)
def test_rows_that_cannot_be_asked(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError) as caught:
        asking().asked(row, 1)
    assert reason in str(caught.value) and "\n" not in str(caught.value)


def test_messages_without_a_template() -> None:
    with pytest.raises(RowError, match="no chat template for messages; give --chat-template FILE"):
        asking(has_template=False).asked({"messages": TURNS}, 1)
    assert asking(has_template=False).asked({"prompt": "a"}, 1).prompt == "a"


def test_a_template_that_refuses(tokenizer: Any) -> None:
    render = template_renderer(tokenizer, "{{ raise_exception('only users') }}", "here")
    with pytest.raises(RowError, match="refuses the conversation: only users"):
        Prompter(tokenizer, render).request(asking().asked({"messages": TURNS}, 1))


def test_the_index_knows_rows_order_and_bad_lines(tmp_path: Path) -> None:
    """Worked on first is what may come to most tokens: new ones, and a quarter of the characters; samples multiply."""
    rows: list[Any] = [
        {"prompt": "a"},  # 8
        b"{nope",
        b"",
        {"prompt": "b" * 80},  # 28
        {"prompt": "c", "sampling": {"samples": 2, "temperature": 1}},  # 16
        b'{"prompt": "\xff"}',
        {"prompt": "d", "sampling": {"max_new_tokens": 50}},  # 50
    ]
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    file = tmp_path / "in.jsonl"
    file.write_bytes(b"\r\n".join(lines))  # and no end of the last line
    index, bad = read_index(file, asking().asked, show=False)
    assert index.line_N.tolist() == [1, 4, 5, 7] and index.order_N.tolist() == [3, 1, 2, 0]
    assert index.offset_N.tolist() == [file.read_bytes().index(lines[i]) for i in (0, 3, 4, 6)]
    assert [each.line for each in bad] == [2, 6] and bad[0].reason.startswith("not JSON")
    assert bad[1] == BadLine(6, "not UTF-8: byte 0xff at offset 12 of the line")
    assert digest_of(file) == index.digest
    index.save(tmp_path / "index.npz")
    again = Index.load(tmp_path / "index.npz")
    assert np.array_equal(again.order_N, index.order_N) and again.digest == index.digest
