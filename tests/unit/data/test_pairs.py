"""Rows of preferences and prompts, as people have them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from data.kinds import KINDS, check_format, detect_format
from data.rows import Ask, Chat, Completion, Judged, Pair, RowError


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "s"}
CHAT = Pair(Chat([user("q"), said("a")], 1), Chat([user("q"), said("b")], 1))

PAIRS: list[tuple[str, dict[str, Any], Pair]] = [
    (
        "texts",
        {"prompt": "q ", "chosen": "a", "rejected": "b", "margin": 2},
        Pair(Completion("q ", "a"), Completion("q ", "b"), 2.0),
    ),
    (
        "texts with what they have in common",
        {"chosen": "Say 1 or 2", "rejected": "Say 1 or 3"},
        Pair(Completion("Say 1 or", " 2"), Completion("Say 1 or", " 3")),
    ),
    (
        "one text begins the other",
        {"chosen": "ab", "rejected": "abc"},
        Pair(Completion("a", "b"), Completion("a", "bc")),
    ),
    ("messages", {"prompt": [user("q")], "chosen": [said("a")], "rejected": [said("b")]}, CHAT),
    ("one message", {"prompt": [user("q")], "chosen": said("a"), "rejected": said("b")}, CHAT),
    ("answers as text", {"prompt": [user("q")], "chosen": "a", "rejected": "b"}, CHAT),
    ("prompt as text", {"prompt": "q", "chosen": [said("a")], "rejected": [said("b")]}, CHAT),
    ("whole conversations", {"chosen": [user("q"), said("a")], "rejected": [user("q"), said("b")]}, CHAT),
    (
        "whole conversations beside a prompt",
        {"prompt": "q", "chosen": [user("q"), said("a")], "rejected": [user("q"), said("b")], "messages": [user("q")]},
        CHAT,
    ),
    (
        "whole conversations that the prompt begins",
        {"prompt": [user("q")], "chosen": [user("q"), said("a")], "rejected": [user("q"), said("b")]},
        CHAT,
    ),
    (
        "a chosen conversation that is there twice",
        {
            "messages": [user("q"), said("a")],
            "chosen": [user("q"), said("a")],
            "rejected": [user("q"), said("b")],
        },
        CHAT,
    ),
    ("a question", {"question": "q", "chosen": "a", "rejected": "b"}, CHAT),
    (
        "a question with a system prompt",
        {"system": "s", "question": "q", "chosen": "a", "rejected": "b"},
        Pair(Chat([SYSTEM, user("q"), said("a")], 2), Chat([SYSTEM, user("q"), said("b")], 2)),
    ),
    (
        "an instruction with input",
        {"instruction": "q", "input": "x", "chosen": "a", "rejected": "b"},
        Pair(Chat([user("q\n\nx"), said("a")], 1), Chat([user("q\n\nx"), said("b")], 1)),
    ),
    (
        "turns with from and value",
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": {"from": "gpt", "value": "b"},
        },
        CHAT,
    ),
    (
        "several turns after the first difference",
        {
            "chosen": [user("q"), said("a"), user("r"), said("c")],
            "rejected": [user("q"), said("b")],
            "tools": '[{"name": "f"}]',
        },
        Pair(
            Chat([user("q"), said("a"), user("r"), said("c")], 1, [{"name": "f"}]),
            Chat([user("q"), said("b")], 1, [{"name": "f"}]),
        ),
    ),
]


@pytest.mark.parametrize(("row", "pair"), [case[1:] for case in PAIRS], ids=[case[0] for case in PAIRS])
def test_pairs_in_every_shape_people_have(row: dict[str, Any], pair: Pair) -> None:
    assert detect_format([row], "f.jsonl", "data.sources[0]", "preference") == "preference"
    assert KINDS["preference"].formats["preference"].parse(row) == pair


IMPLICIT = [
    {"chosen": [user("q"), said("a"), user("r"), said("c")], "rejected": [user("q"), said("a"), user("r"), said("d")]},
    {"chosen": [user("q"), said("a")], "rejected": [user("q"), said("a"), user("r"), said("d")]},
    {"chosen": "The sky is blue.", "rejected": "The sky is green."},
    {"chosen": "\n\nHuman: 2+2?\n\nAssistant: 4", "rejected": "\n\nHuman: 2+2?\n\nAssistant: 44"},
    {"chosen": "x = 12", "rejected": "x = 13"},
]


@pytest.mark.parametrize("row", IMPLICIT)
def test_an_implicit_prompt_is_the_one_trl_finds(row: dict[str, Any]) -> None:
    from trl import extract_prompt

    theirs = extract_prompt(row)
    ours = KINDS["preference"].formats["preference"].parse(row)
    assert isinstance(ours, Pair)
    for side, document in (("chosen", ours.chosen), ("rejected", ours.rejected)):
        if isinstance(document, Chat):
            assert document.messages[: document.first_target] == theirs["prompt"]
            assert document.messages[document.first_target :] == theirs[side]
        else:
            assert (document.prompt, document.completion) == (theirs["prompt"], theirs[side])


MESSAGES = st.lists(st.sampled_from([user("q"), user("r"), said("a"), said("b"), SYSTEM]), min_size=1, max_size=5)
TEXTS = st.text("ab ", min_size=1, max_size=6)


@settings(max_examples=150, deadline=None)
@given(st.one_of(st.tuples(MESSAGES, MESSAGES), st.tuples(TEXTS, TEXTS)))
def test_any_implicit_prompt_is_the_one_trl_finds(both: tuple[Any, Any]) -> None:
    from trl import extract_prompt

    chosen, rejected = both
    ends_on_space = isinstance(chosen, str) and chosen[0] != rejected[0] and chosen.endswith(" ")
    assume(not ends_on_space)  # TRL then looks at the last character as if it stood before the first
    theirs = extract_prompt({"chosen": chosen, "rejected": rejected})
    try:
        ours = KINDS["preference"].formats["preference"].parse({"chosen": chosen, "rejected": rejected})
    except RowError:
        assert any(not [m for m in theirs[side] if m["role"] == "assistant"] for side in ("chosen", "rejected"))
        return
    assert isinstance(ours, Pair)
    for side, document in (("chosen", ours.chosen), ("rejected", ours.rejected)):
        parts = (
            (document.messages[: document.first_target], document.messages[document.first_target :])
            if isinstance(document, Chat)
            else (document.prompt, document.completion)
        )
        assert parts == (theirs["prompt"], theirs[side])


BAD: list[tuple[str, str, dict[str, Any], str]] = [
    ("preference", "preference", {"prompt": "q", "chosen": "a"}, "field rejected is missing"),
    ("preference", "preference", {"prompt": "q", "chosen": "a", "rejected": None}, "field rejected is null"),
    ("preference", "preference", {"prompt": "q", "chosen": 3, "rejected": "b"}, "field chosen is an integer"),
    ("preference", "preference", {"prompt": 3, "chosen": "a", "rejected": "b"}, "field prompt is an integer"),
    ("preference", "preference", {"prompt": "q", "chosen": "a", "rejected": [said("b")]}, "must both be"),
    ("preference", "preference", {"prompt": [user("q")], "chosen": [user("a")], "rejected": [said("b")]}, "chosen has"),
    ("preference", "preference", {"prompt": "q", "chosen": "a", "rejected": "b", "margin": "x"}, "margin is 'x'"),
    ("preference", "preference", {"prompt": "q", "chosen": "a", "rejected": "b", "margin": float("nan")}, "margin is"),
    ("preference", "preference", {"prompt": [{"role": "x"}], "chosen": "a", "rejected": "b"}, "has role 'x'"),
    ("unpaired", "unpaired", {"prompt": "q", "completion": "a"}, "label is missing, not true or false"),
    ("unpaired", "unpaired", {"prompt": "q", "completion": "a", "label": 2}, "label is 2, not true or false"),
    ("unpaired", "unpaired", {"prompt": "q", "completion": None, "label": True}, "field completion is null"),
    ("prompts", "prompt", {"prompt": "  "}, "the prompt is empty"),
    ("prompts", "prompt", {"prompt": [said("a")]}, "no message but the assistant's"),
    ("prompts", "messages", {"messages": [said("a")]}, "no message but the assistant's"),
]


@pytest.mark.parametrize(("kind", "form", "row", "reason"), BAD)
def test_unusable_rows_say_why(kind: Any, form: str, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError) as caught:
        KINDS[kind].formats[form].parse(row)
    assert reason in str(caught.value)


JUDGED: list[tuple[dict[str, Any], Judged]] = [
    ({"prompt": "q", "completion": "a", "label": True}, Judged(Completion("q", "a"), True)),
    ({"prompt": [user("q")], "completion": [said("a")], "label": 0}, Judged(Chat([user("q"), said("a")], 1), False)),
    ({"prompt": [user("q")], "completion": "a", "label": False}, Judged(Chat([user("q"), said("a")], 1), False)),
    (
        {"completion": [user("q"), said("a"), user("r"), said("c")], "label": True},
        Judged(Chat([user("q"), said("a"), user("r"), said("c")], 3), True),
    ),
]


@pytest.mark.parametrize(("row", "judged"), JUDGED)
def test_judged_answers(row: dict[str, Any], judged: Judged) -> None:
    assert detect_format([row], "f.jsonl", "data.sources[0]", "unpaired") == "unpaired"
    assert KINDS["unpaired"].formats["unpaired"].parse(row) == judged


ASKED: list[tuple[str, dict[str, Any], Ask]] = [
    ("prompt", {"prompt": "q", "answer": 4}, Ask("q", None, {"answer": 4})),
    ("prompt", {"prompt": [user("q")], "answer": "4"}, Ask([user("q")], None, {"answer": "4"})),
    (
        "prompt",
        {"question": "q", "answer": "4", "system": "s"},
        Ask([SYSTEM, user("q")], None, {"question": "q", "answer": "4"}),
    ),
    ("messages", {"messages": [user("q"), said("a")], "id": 7}, Ask([user("q")], None, {"id": 7, "completion": "a"})),
    ("messages", {"messages": [user("q"), said("a"), user("r")]}, Ask([user("q"), said("a"), user("r")], None, {})),
    (
        "sharegpt",
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "completion": "z"},
        Ask([user("q")], None, {"completion": "z"}),
    ),
    (
        "preference",
        {"chosen": [user("q"), said("a")], "rejected": [user("q"), said("b")]},
        Ask([user("q")], None, {"chosen": [user("q"), said("a")], "rejected": [user("q"), said("b")]}),
    ),
]


@pytest.mark.parametrize(("form", "row", "asked"), ASKED)
def test_prompts_keep_every_other_field(form: str, row: dict[str, Any], asked: Ask) -> None:
    assert detect_format([row], "f.jsonl", "data.sources[0]", "prompts") == form
    assert KINDS["prompts"].formats[form].parse(row) == asked


WRONG: list[tuple[Any, dict[str, Any], str]] = [
    ("text", {"prompt": "q", "chosen": "a", "rejected": "b"}, "f.jsonl holds preference pairs .* learns from texts"),
    ("preference", {"messages": [user("q")]}, "f.jsonl holds texts and conversations .* learns from preference pairs"),
    (
        "preference",
        {"prompt": "q", "completion": "a", "label": True},
        r"holds judged answers \(its fields: completion, label, prompt\).*stage.loss=kto",
    ),
    ("unpaired", {"messages": [user("q")]}, "holds texts and conversations .* learns from judged answers"),
    ("prompts", {"text": "words"}, "holds texts and conversations .* learns from prompts"),
    (
        "preference",
        {"better": "a", "worse": "b"},
        "cannot tell the format of f.jsonl .*better, worse.*chosen, rejected",
    ),
]


@pytest.mark.parametrize(("kind", "row", "message"), WRONG)
def test_rows_of_another_kind_are_refused_by_name(kind: Any, row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"data.sources.1.*{message}"):
        detect_format([row], "f.jsonl", "data.sources[1]", kind)


def test_a_format_of_another_kind_is_refused_at_once() -> None:
    with pytest.raises(
        ValueError, match=r"data.sources\[0\].format=messages gives texts and conversations, but this stage learns"
    ):
        check_format("messages", "data.sources[0]", "preference")
    check_format("messages", "data.sources[0]", "text")
