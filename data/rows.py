"""What rows become: the kinds of samples, and the checks of fields and messages that all formats share."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]

ROLES = {"system", "developer", "user", "assistant", "tool", "function", "ipython"}
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}


class RowError(Exception):
    """This row cannot be used; the message says why. It becomes a BadRow, never a traceback."""


@dataclass(frozen=True)
class Text:
    """A document; every token can be learnt."""

    text: str


@dataclass(frozen=True)
class Completion:
    """Plain strings: the completion is learnt, given the prompt."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Chat:
    """A conversation for the chat template; assistant turns from index `first_target` on are learnt."""

    messages: list[Row]
    first_target: int = 0
    tools: list[Any] | None = None


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, the better one first."""

    chosen: Completion | Chat
    rejected: Completion | Chat
    margin: float | None = None
    """How much better it is, where the row says so."""


@dataclass(frozen=True)
class Judged:
    """An answer that was found good or bad by itself."""

    answer: Completion | Chat
    desirable: bool


@dataclass(frozen=True)
class Ask:
    """A prompt without its answer, as plain text or as messages, and the row's other fields."""

    prompt: str | list[Row]
    tools: list[Any] | None
    fields: Row


@dataclass(frozen=True)
class Caption:
    """What one picture shows, in words."""

    text: str


Sample = Text | Completion | Chat | Pair | Judged | Ask | Caption


def check_messages(turns: list[Any]) -> list[Row]:
    """Messages as `role` and string `content` (and `tool_calls`, `reasoning_content`, `name` if given), or RowError."""
    if not turns:
        raise RowError("there are no messages")
    return [_message(index, turn) for index, turn in enumerate(turns)]


def _message(index: int, turn: Any) -> Row:
    if not isinstance(turn, dict):
        raise RowError(f"message {index} is {kind_of(turn)}, not an object")
    role, content = turn.get("role"), turn.get("content")
    if not isinstance(role, str) or role not in ROLES:
        raise RowError(f"message {index} has role {role!r}; known: {', '.join(sorted(ROLES))}")
    calls = turn.get("tool_calls")
    if isinstance(content, list):
        content = "".join(_text_part(index, part) for part in content)
    if content is None and role == "assistant" and calls:
        content = ""
    if not isinstance(content, str):
        raise RowError(f"message {index} has content {kind_of(content)}, not a string")
    message: Row = {"role": role, "content": content}
    if calls:
        message["tool_calls"] = [_tool_call(index, call) for call in calls]
    for extra in ("reasoning_content", "name", "tool_call_id"):
        if isinstance(turn.get(extra), str):
            message[extra] = turn[extra]
    return message


def _tool_call(index: int, call: Any) -> Row:
    """OpenAI writes the arguments as a JSON string, chat templates expect the object."""
    if not isinstance(call, dict):
        raise RowError(f"message {index} has a tool call that is {kind_of(call)}, not an object")
    function = call.get("function")
    if isinstance(function, dict) and isinstance(function.get("arguments"), str):
        try:
            arguments = json.loads(function["arguments"])
        except ValueError as err:
            raise RowError(f"message {index} has a tool call whose arguments are not JSON: {err}") from err
        return {**call, "function": {**function, "arguments": arguments}}
    return call


def _text_part(index: int, part: Any) -> str:
    if isinstance(part, dict) and isinstance(part.get("text"), str) and part.get("type", "text") == "text":
        return part["text"]
    kind = part.get("type") if isinstance(part, dict) else kind_of(part)
    raise RowError(f"message {index} has a content part of type {kind!r}; only text parts can be trained on")


def sharegpt_messages(turns: list[Any]) -> list[Row]:
    """{from, value} turns as unchecked {role, content} messages."""
    messages: list[Row] = []
    for index, turn in enumerate(turns):
        if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
            raise RowError(f"turn {index} needs the fields from and value")
        speaker = turn["from"]
        if not isinstance(speaker, str) or speaker not in SHAREGPT_ROLES:
            raise RowError(f"turn {index} is from {speaker!r}; known: {', '.join(SHAREGPT_ROLES)}")
        messages.append({"role": SHAREGPT_ROLES[speaker], "content": turn["value"]})
    return messages


def system_of(row: Row) -> list[Row]:
    """The row's `system` field as a message, if it has one."""
    return (
        [{"role": "system", "content": row["system"]}] if isinstance(row.get("system"), str) and row["system"] else []
    )


def question_of(row: Row, name: str) -> Row:
    """The user's message: field `name`, and `input` after a blank line."""
    question = string_of(row, name)
    extra = row.get("input")
    if extra is not None and not isinstance(extra, str):
        raise RowError(f"field input is {kind_of(extra)}, not a string")
    return {"role": "user", "content": f"{question}\n\n{extra}" if extra and extra.strip() else question}


def as_chat(row: Row, answers: bool = True) -> Row:
    """The row with its prompt, where it is a string, as a user's message, and `answers` to it as the assistant's."""
    if not isinstance(row.get("prompt"), str):
        return row
    roles = {"prompt": "user", **(dict.fromkeys(("completion", "chosen", "rejected"), "assistant") if answers else {})}
    said = {name: row[name] for name in roles if isinstance(row.get(name), str)}
    return row | {name: [{"role": roles[name], "content": text}] for name, text in said.items()}


def turns_of(row: Row, names: tuple[str, ...]) -> list[Any]:
    """The list of turns in the first of the fields that is there."""
    for name in names:
        if row.get(name) is not None:
            if not isinstance(row[name], list):
                raise RowError(f"field {name} is {kind_of(row[name])}, not a list")
            if not row[name]:
                raise RowError("there are no messages")
            return row[name]
    raise RowError(f"field {names[0]} is missing")


def has_turns(row: Row, names: tuple[str, ...], key: str) -> bool:
    """Whether the first of the fields that has turns has some with `key`."""
    turns = next((row[name] for name in names if isinstance(row.get(name), list) and row[name]), None)
    return turns is not None and isinstance(turns[0], dict) and key in turns[0]


def tools_of(row: Row) -> list[Any] | None:
    """The tools of a conversation: a list, or JSON text of one."""
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError as err:
            raise RowError(f"field tools is not JSON: {err}") from err
    if tools and not isinstance(tools, list):
        raise RowError(f"field tools is {kind_of(tools)}, not a list")
    return tools or None


def string_of(row: Row, name: str) -> str:
    """A text field; only a prompt may be empty."""
    if name not in row:
        raise RowError(f"field {name} is missing")
    if not isinstance(row[name], str):
        raise RowError(f"field {name} is {kind_of(row[name])}, not a string")
    if not row[name] and name != "prompt":
        raise RowError(f"field {name} is empty")
    return row[name]


def kind_of(value: Any) -> str:
    """What a value is, in the words of JSON."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    names |= {int: "an integer", float: "a number"}
    return names.get(type(value), f"a {type(value).__name__}")
