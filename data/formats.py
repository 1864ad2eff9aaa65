"""What a row of text data means: each format turns a row (a dict) into a Text, a Chat or a Completion.

To add a format: write `is_x(row)` and `parse_x(row)` and add one line to FORMATS; the order there is the order in
which detection asks. Rows for preferences and reinforcement learning stand in `pairs.py`, all in `kinds.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from data.rows import (
    Chat,
    Completion,
    Row,
    RowError,
    Sample,
    Text,
    check_messages,
    has_turns,
    question_of,
    sharegpt_messages,
    string_of,
    system_of,
    tools_of,
    turns_of,
)


@dataclass(frozen=True)
class Format:
    """How a format is recognised and read, and the fields it needs (for messages to the user)."""

    fields: str
    matches: Callable[[Row], bool]
    parse: Callable[[Row], Sample | tuple[Sample, ...]]

    def samples(self, row: Row) -> tuple[Sample, ...]:
        """The samples of a row: one, or more where a row is several."""
        found = self.parse(row)
        return found if isinstance(found, tuple) else (found,)


def is_messages(row: Row) -> bool:
    """`messages` (or `conversations`) is a list of {role, content}."""
    return has_turns(row, ("messages", "conversations", "conversation"), "role")


def is_sharegpt(row: Row) -> bool:
    """`conversations` is a list of {from, value}."""
    return has_turns(row, ("conversations", "conversation", "messages"), "from")


def is_prompt_completion(row: Row) -> bool:
    return "prompt" in row and "completion" in row


def is_alpaca(row: Row) -> bool:
    return "instruction" in row and "output" in row


def is_text(row: Row) -> bool:
    return "text" in row


def parse_messages(row: Row) -> Chat:
    """{"messages": [{"role": ..., "content": ...}, ...]}, with `tools` where the row has them."""
    turns = turns_of(row, ("messages", "conversations", "conversation"))
    return Chat(check_messages(turns), tools=tools_of(row))


def parse_sharegpt(row: Row) -> Chat:
    """{"conversations": [{"from": "human" | "gpt" | ..., "value": ...}, ...]}, optionally with `system`."""
    turns = sharegpt_messages(turns_of(row, ("conversations", "conversation", "messages")))
    return Chat(check_messages(system_of(row) + turns), tools=tools_of(row))


def parse_alpaca(row: Row) -> Chat:
    """{"instruction": ..., "input": ..., "output": ...}, optionally with `system`; input follows after a blank line."""
    question = question_of(row, "instruction")
    answer = {"role": "assistant", "content": string_of(row, "output")}
    return Chat(check_messages([*system_of(row), question, answer]))


def parse_prompt_completion(row: Row) -> Chat | Completion:
    """{"prompt": ..., "completion": ...}: both strings or both lists of messages; only the completion is learnt."""
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        messages = check_messages(prompt + completion)
        if not any(turn["role"] == "assistant" for turn in messages[len(prompt) :]):
            raise RowError("the completion has no assistant message")
        return Chat(messages, first_target=len(prompt), tools=tools_of(row))
    if isinstance(prompt, list) or isinstance(completion, list):
        raise RowError("prompt and completion must both be strings or both lists of messages")
    return Completion(string_of(row, "prompt"), string_of(row, "completion"))


def parse_text(row: Row) -> Text:
    """{"text": ...}"""
    text = string_of(row, "text")
    if not text.strip():
        raise RowError("the text is empty")
    return Text(text)


FORMATS: dict[str, Format] = {
    "messages": Format("messages: [{role, content}]", is_messages, parse_messages),
    "sharegpt": Format("conversations: [{from, value}]", is_sharegpt, parse_sharegpt),
    "prompt_completion": Format("prompt, completion", is_prompt_completion, parse_prompt_completion),
    "alpaca": Format("instruction, input, output", is_alpaca, parse_alpaca),
    "text": Format("text", is_text, parse_text),
}
