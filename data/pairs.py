"""Rows about preferences, and rows that ask: pairs of answers, single judged answers, prompts without an answer.

A prompt comes as text, as messages, as `question` or `instruction` (with `input`), or as the beginning that both
answers have in common. An answer comes as text, as one message, as messages, or as the whole conversation. A text
prompt with text answers stays plain text, as in `prompt_completion`; anything else becomes a conversation.
"""

from __future__ import annotations

import math
from typing import Any

from data.rows import (
    Ask,
    Chat,
    Completion,
    Judged,
    Pair,
    Row,
    RowError,
    check_messages,
    has_turns,
    kind_of,
    question_of,
    sharegpt_messages,
    system_of,
    tools_of,
    turns_of,
)

TURNS = ("messages", "conversations", "conversation")
QUESTIONS = ("question", "instruction")

Prompt = str | list[Any] | None
"""Plain text, unchecked messages, or not given."""


def is_pair(row: Row) -> bool:
    return row.get("chosen") is not None and row.get("rejected") is not None


def is_judged(row: Row) -> bool:
    return "label" in row and "completion" in row


def is_ask(row: Row) -> bool:
    return row.get("prompt") is not None or any(isinstance(row.get(name), str) for name in QUESTIONS)


def parse_pair(row: Row) -> Pair:
    """{"prompt": ..., "chosen": ..., "rejected": ...}, optionally `margin`; no prompt: what both begin with is it.

    Only the answers are scored: of a conversation the assistant's messages from the first on that is not in the prompt.
    """
    for name in ("chosen", "rejected"):
        if row.get(name) is None:
            raise RowError(f"field {name} is {'null' if name in row else 'missing'}")
    chosen, rejected = _answer(row, "chosen"), _answer(row, "rejected")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise RowError("chosen and rejected must both be strings or both be messages")
    prompt = _prompt(row)
    if isinstance(chosen, str) and isinstance(rejected, str):
        if prompt is None:
            cut = _common_text(chosen, rejected)
            prompt, chosen, rejected = chosen[:cut], chosen[cut:], rejected[cut:]
    elif isinstance(chosen, list) and isinstance(rejected, list):
        cut = _common_turns(chosen, rejected)
        if prompt is None or (cut and _is_whole(prompt, chosen)):
            prompt, chosen, rejected = chosen[:cut], chosen[cut:], rejected[cut:]
    return Pair(
        _joined(prompt or "", chosen, row, "chosen"), _joined(prompt or "", rejected, row, "rejected"), _margin(row)
    )


def parse_both(row: Row) -> tuple[Judged, ...]:
    """A pair as two judged answers: the chosen one is good, the rejected one is not."""
    pair = parse_pair(row)
    return Judged(pair.chosen, True), Judged(pair.rejected, False)


def parse_judged(row: Row) -> Judged:
    """{"prompt": ..., "completion": ..., "label": true | false}; a completion of messages may be the conversation."""
    label = row.get("label")
    if not isinstance(label, bool) and not (isinstance(label, int) and label in (0, 1)):
        raise RowError(f"field label is {'missing' if 'label' not in row else repr(label)}, not true or false")
    if row.get("completion") is None:
        raise RowError(f"field completion is {'null' if 'completion' in row else 'missing'}")
    prompt, answer = _prompt(row), _answer(row, "completion")
    if isinstance(answer, list) and (prompt is None or _is_whole(prompt, answer)):
        cut = _last_answer(answer)
        prompt, answer = answer[:cut], answer[cut:]
    return Judged(_joined(prompt or "", answer, row, "completion"), bool(label))


def parse_ask(row: Row) -> Ask:
    """{"prompt": text or messages} or {"question": ...} or {"messages": [...]}; all other fields are kept.

    Assistant messages at the end are what the policy has to write: they are taken off, and their text is kept as the
    field `completion`, unless the row has one.
    """
    used = {"system", "prompt"}
    prompt = _prompt(row)
    if prompt is None:
        used |= set(TURNS)
        if is_pair(row):
            pair = parse_pair(row)
            prompt = _prompt_of(pair.chosen)
        else:
            prompt = _from_turns(row)
    fields = {name: value for name, value in row.items() if name not in used}
    if isinstance(prompt, str):
        if not prompt.strip():
            raise RowError("the prompt is empty")
        return Ask(prompt, None, fields)
    messages = check_messages(prompt)
    end = len(messages)
    while end and messages[end - 1]["role"] == "assistant":
        end -= 1
    if not end:
        raise RowError("the prompt has no message but the assistant's")
    if end < len(messages):
        fields.setdefault("completion", "\n".join(turn["content"] for turn in messages[end:]))
    return Ask(messages[:end], tools_of(row), fields)


def _from_turns(row: Row) -> list[Any]:
    turns = turns_of(row, TURNS)
    return _with_system(row, sharegpt_messages(turns) if has_turns(row, TURNS, "from") else turns)


def _with_system(row: Row, turns: list[Any]) -> list[Any]:
    begins = bool(turns) and isinstance(turns[0], dict) and turns[0].get("role") == "system"
    return turns if begins else system_of(row) + turns


def _prompt(row: Row) -> Prompt:
    """The row's prompt, if it has one beside the answers."""
    prompt = row.get("prompt")
    if isinstance(prompt, list):
        return _with_system(row, _turns(prompt))
    if isinstance(prompt, str):
        system = system_of(row)
        return [*system, {"role": "user", "content": prompt}] if system else prompt
    if prompt is not None:
        raise RowError(f"field prompt is {kind_of(prompt)}, neither a string nor messages")
    for name in QUESTIONS:
        if isinstance(row.get(name), str):
            return [*system_of(row), question_of(row, name)]
    if is_pair(row) and any(isinstance(row.get(name), list) and row[name] for name in TURNS):
        turns = _from_turns(row)  # either the prompt (answers follow) or the chosen conversation once more
        return turns if turns[-1].get("role") != "assistant" else None
    return None


def _answer(row: Row, name: str) -> str | list[Any]:
    value = row[name]
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        return _turns([value])
    if isinstance(value, list):
        return _turns(value)
    raise RowError(f"field {name} is {kind_of(value)}, neither a string nor messages")


def _turns(turns: list[Any]) -> list[Any]:
    """Messages; {from, value} turns become {role, content}."""
    return sharegpt_messages(turns) if turns and isinstance(turns[0], dict) and "from" in turns[0] else turns


def _joined(prompt: str | list[Any], answer: str | list[Any], row: Row, name: str) -> Completion | Chat:
    """Prompt and answer as one document: plain text if both are text, else a conversation."""
    if isinstance(prompt, str) and isinstance(answer, str):
        return Completion(prompt, answer)
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) and prompt else prompt or []
    after = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
    assert isinstance(before, list)
    messages = check_messages(before + after)
    if not any(turn["role"] == "assistant" for turn in messages[len(before) :]):
        raise RowError(f"{name} has no assistant message")
    return Chat(messages, first_target=len(before), tools=tools_of(row))


def _is_whole(prompt: str | list[Any], answer: list[Any]) -> bool:
    """Whether the answer is the conversation with the prompt in it, not only what follows it."""
    if isinstance(prompt, list) and answer[: len(prompt)] == prompt:
        return True
    return bool(answer) and isinstance(answer[0], dict) and answer[0].get("role") in ("system", "developer", "user")


def _common_turns(chosen: list[Any], rejected: list[Any]) -> int:
    """Messages that both begin with; one is left to each."""
    shortest = min(len(chosen), len(rejected))
    return next((i for i in range(shortest) if chosen[i] != rejected[i]), max(shortest - 1, 0))


def _common_text(chosen: str, rejected: str) -> int:
    """Characters that both begin with; a space before the first difference belongs to the answers."""
    shortest = min(len(chosen), len(rejected))
    for at in range(shortest):
        if chosen[at] != rejected[at]:
            return at - 1 if at and chosen[at - 1] == " " else at
    return max(shortest - 1, 0)


def _last_answer(turns: list[Any]) -> int:
    """Where the assistant's last message stands."""
    found = [i for i, turn in enumerate(turns) if isinstance(turn, dict) and turn.get("role") == "assistant"]
    return found[-1] if found else len(turns)


def _prompt_of(document: Completion | Chat) -> str | list[Any]:
    return document.prompt if isinstance(document, Completion) else document.messages[: document.first_target]


def _margin(row: Row) -> float | None:
    margin = row.get("margin")
    if margin is None:
        return None
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not math.isfinite(margin):
        raise RowError(f"field margin is {margin!r}, not a finite number")
    return float(margin)
