"""What a row means: each format turns a row (a dict) into a Text, a Chat or a Completion.

To add a format: write `is_x(row)` and `parse_x(row)` and add one line to FORMATS; the order there is the order in
which detection asks.
"""

from __future__ import annotations

import json
from collections.abc import Callable
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


Sample = Text | Completion | Chat


@dataclass(frozen=True)
class Format:
    """How a format is recognised and read, and the fields it needs (for messages to the user)."""

    fields: str
    matches: Callable[[Row], bool]
    parse: Callable[[Row], Sample]


def is_messages(row: Row) -> bool:
    """`messages` (or `conversations`) is a list of {role, content}."""
    return _turn_keys(row, ("messages", "conversations", "conversation"), "role")


def is_sharegpt(row: Row) -> bool:
    """`conversations` is a list of {from, value}."""
    return _turn_keys(row, ("conversations", "conversation", "messages"), "from")


def is_prompt_completion(row: Row) -> bool:
    return "prompt" in row and "completion" in row


def is_alpaca(row: Row) -> bool:
    return "instruction" in row and "output" in row


def is_text(row: Row) -> bool:
    return "text" in row


def parse_messages(row: Row) -> Chat:
    """{"messages": [{"role": ..., "content": ...}, ...]}, with `tools` where the row has them."""
    turns = _turns(row, ("messages", "conversations", "conversation"))
    return Chat(check_messages(turns), tools=_tools(row))


def parse_sharegpt(row: Row) -> Chat:
    """{"conversations": [{"from": "human" | "gpt" | ..., "value": ...}, ...]}, optionally with `system`."""
    messages: list[Row] = []
    if isinstance(row.get("system"), str) and row["system"]:
        messages.append({"role": "system", "content": row["system"]})
    for index, turn in enumerate(_turns(row, ("conversations", "conversation", "messages"))):
        if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
            raise RowError(f"turn {index} needs the fields from and value")
        speaker = turn["from"]
        if not isinstance(speaker, str) or speaker not in SHAREGPT_ROLES:
            raise RowError(f"turn {index} is from {speaker!r}; known: {', '.join(SHAREGPT_ROLES)}")
        messages.append({"role": SHAREGPT_ROLES[speaker], "content": turn["value"]})
    return Chat(check_messages(messages), tools=_tools(row))


def parse_alpaca(row: Row) -> Chat:
    """{"instruction": ..., "input": ..., "output": ...}, optionally with `system`; input follows after a blank line."""
    question = _string(row, "instruction")
    extra = row.get("input")
    if extra is not None and not isinstance(extra, str):
        raise RowError(f"field input is {_kind(extra)}, not a string")
    if extra and extra.strip():
        question = f"{question}\n\n{extra}"
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": _string(row, "output")}]
    if isinstance(row.get("system"), str) and row["system"]:
        messages.insert(0, {"role": "system", "content": row["system"]})
    return Chat(check_messages(messages))


def parse_prompt_completion(row: Row) -> Sample:
    """{"prompt": ..., "completion": ...}: both strings or both lists of messages; only the completion is learnt."""
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        messages = check_messages(prompt + completion)
        if not any(turn["role"] == "assistant" for turn in messages[len(prompt) :]):
            raise RowError("the completion has no assistant message")
        return Chat(messages, first_target=len(prompt), tools=_tools(row))
    if isinstance(prompt, list) or isinstance(completion, list):
        raise RowError("prompt and completion must both be strings or both lists of messages")
    return Completion(_string(row, "prompt"), _string(row, "completion"))


def parse_text(row: Row) -> Text:
    """{"text": ...}"""
    text = _string(row, "text")
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


def detect_format(rows: list[Row], where: str, key: str) -> str:
    """The format of a source from its first rows' fields.

    Args:
        rows: the first readable rows.
        where: path of the source, for the message.
        key: the source's name in the config, such as `data.sources[0]`.

    Raises:
        ValueError: no format fits; names the fields seen and the legal formats.
    """
    for row in rows:
        for name, form in FORMATS.items():
            if form.matches(row):
                return name
    fields = sorted({str(field) for row in rows for field in row})
    legal = "; ".join(f"{name} ({form.fields})" for name, form in FORMATS.items())
    raise ValueError(
        f"{key}.format=auto: cannot tell the format of {where} from its fields ({', '.join(fields) or 'none'}); "
        f"rename them to fit one of: {legal}; or, if one of them is meant, set {key}.format"
    )


def check_messages(turns: list[Any]) -> list[Row]:
    """Messages as `role` and string `content` (and `tool_calls`, `reasoning_content`, `name` if given), or RowError."""
    if not turns:
        raise RowError("there are no messages")
    return [_message(index, turn) for index, turn in enumerate(turns)]


def _message(index: int, turn: Any) -> Row:
    if not isinstance(turn, dict):
        raise RowError(f"message {index} is {_kind(turn)}, not an object")
    role, content = turn.get("role"), turn.get("content")
    if not isinstance(role, str) or role not in ROLES:
        raise RowError(f"message {index} has role {role!r}; known: {', '.join(sorted(ROLES))}")
    calls = turn.get("tool_calls")
    if isinstance(content, list):
        content = "".join(_text_part(index, part) for part in content)
    if content is None and role == "assistant" and calls:
        content = ""
    if not isinstance(content, str):
        raise RowError(f"message {index} has content {_kind(content)}, not a string")
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
        raise RowError(f"message {index} has a tool call that is {_kind(call)}, not an object")
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
    kind = part.get("type") if isinstance(part, dict) else _kind(part)
    raise RowError(f"message {index} has a content part of type {kind!r}; only text parts can be trained on")


def _turns(row: Row, names: tuple[str, ...]) -> list[Any]:
    for name in names:
        if row.get(name) is not None:
            if not isinstance(row[name], list):
                raise RowError(f"field {name} is {_kind(row[name])}, not a list")
            if not row[name]:
                raise RowError("there are no messages")
            return row[name]
    raise RowError(f"field {names[0]} is missing")


def _turn_keys(row: Row, names: tuple[str, ...], key: str) -> bool:
    turns = next((row[name] for name in names if isinstance(row.get(name), list) and row[name]), None)
    return turns is not None and isinstance(turns[0], dict) and key in turns[0]


def _tools(row: Row) -> list[Any] | None:
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError as err:
            raise RowError(f"field tools is not JSON: {err}") from err
    if tools and not isinstance(tools, list):
        raise RowError(f"field tools is {_kind(tools)}, not a list")
    return tools or None


def _string(row: Row, name: str) -> str:
    if name not in row:
        raise RowError(f"field {name} is missing")
    if not isinstance(row[name], str):
        raise RowError(f"field {name} is {_kind(row[name])}, not a string")
    if not row[name] and name != "prompt":
        raise RowError(f"field {name} is empty")
    return row[name]


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    names |= {int: "an integer", float: "a number"}
    return names.get(type(value), f"a {type(value).__name__}")
