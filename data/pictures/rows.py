"""Pictures of a row: where they are named, and which place in the text stands for each.

A row names its pictures in `images` (a list) or `image`, or inside the content of messages. A picture is a path, bytes,
`{"path": ...}`, `{"bytes": ...}` or a `data:` address. In the text `<image>` stands for each, in order; where no text
has one, all of them come first.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from data.rows import Row, RowError, kind_of

MARK = "<image>"
"""What stands for a picture in the text of rows, whatever the model's own token is."""

FIELDS = ("images", "image")
TURNS = ("messages", "conversations", "conversation", "prompt", "chosen", "rejected")
QUESTIONS = ("prompt", "instruction", "question", "text")


@dataclass(frozen=True)
class Reference:
    """Where a picture is: a file, or its encoded bytes."""

    path: str | None = None
    content: bytes | None = None
    named: str = ""
    """The path as the row gives it."""

    @property
    def identity(self) -> bytes:
        """The same wherever the data lie."""
        return self.named.encode() if self.content is None else hashlib.blake2b(self.content, digest_size=16).digest()

    def __str__(self) -> str:
        return self.path if self.path is not None else f"{len(self.content or b'')} bytes in the row"


def split_row(row: Row, folder: str, answered: bool = True) -> tuple[Row, tuple[Reference, ...]]:
    """The row with text only, and its pictures in order; a row without any comes back as it is.

    Args:
        folder: what relative paths start from.
        answered: captions and answers beside a question are what is learnt, not what judges an answer.

    Raises:
        RowError: what should be a picture is none, or a message's picture has no address.
    """
    named = [part for name in FIELDS for part in _listed(row.get(name))]
    inside: list[Any] = []
    if not named and not any(_has_parts(row.get(name)) for name in TURNS):
        return row, ()
    rest = {name: value for name, value in row.items() if name not in FIELDS}
    rest |= {name: _flat(rest[name], inside) for name in TURNS if isinstance(rest.get(name), list)}
    own = [part for part in inside if part is not None]
    if own and (named or len(own) < len(inside)):
        raise RowError("pictures are named both in the messages and in the field images; name each once")
    found = tuple(_reference(part, folder) for part in (own or named))
    rest = _in_known_fields(rest) if answered else rest
    if found and not _anywhere(rest, MARK):
        rest = _in_front(rest, MARK * len(found) + "\n")
    return rest, found


def replaced(value: Any, change: Callable[[str], str]) -> Any:
    """The row, or a part of it, with every text changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [replaced(part, change) for part in value]
    if isinstance(value, dict):
        return {name: replaced(part, change) for name, part in value.items()}
    return value


def _listed(value: Any) -> list[Any]:
    if value is None or value == "":
        return []
    return value if isinstance(value, list) else [value]


def _has_parts(turns: Any) -> bool:
    """Whether a message of them has a picture in its content."""
    if not isinstance(turns, list):
        return False
    contents = [turn.get("content") for turn in turns if isinstance(turn, dict)]
    return any(_is_picture(part) for content in contents if isinstance(content, list) for part in content)


def _is_picture(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") in ("image", "image_url")


def _flat(turns: list[Any], inside: list[Any]) -> list[Any]:
    """Messages whose contents are strings; the pictures in them are appended to `inside`, None for one without an
    address of its own."""
    flat = []
    for turn in turns:
        content = turn.get("content") if isinstance(turn, dict) else None
        if isinstance(content, list) and any(_is_picture(part) for part in content):
            text = ""
            for part in content:
                if _is_picture(part):
                    inside.append(_address(part))
                    text += MARK
                elif isinstance(part, dict) and isinstance(part.get("text"), str):
                    text += part["text"]
                else:
                    kind = part.get("type") if isinstance(part, dict) else kind_of(part)
                    raise RowError(f"a message has a content part of type {kind!r}; known are text and image")
            turn = {**turn, "content": text}
        flat.append(turn)
    return flat


def _address(part: Row) -> Any:
    found = next((part[name] for name in ("image", "path", "url", "image_url") if part.get(name)), None)
    return found.get("url") if isinstance(found, dict) and "url" in found else found


def _reference(part: Any, folder: str) -> Reference:
    if isinstance(part, dict):
        part = part.get("bytes") or part.get("path")
    if isinstance(part, bytes | bytearray):
        return Reference(content=bytes(part))
    if not isinstance(part, str) or not part:
        raise RowError(f"a picture is {kind_of(part)}, not a path or bytes")
    if part.startswith("data:"):
        try:
            return Reference(content=base64.b64decode(part.partition(",")[2], validate=True))
        except (binascii.Error, ValueError) as err:
            raise RowError(f"a picture's data: address is not base64: {err}") from err
    if part.startswith(("http://", "https://")):
        raise RowError(f"the picture {part} is on the network; fetch it and give its path")
    path = os.path.expanduser(part.removeprefix("file://"))
    return Reference(path=path if os.path.isabs(path) else os.path.join(folder, path), named=part)


def _in_known_fields(row: Row) -> Row:
    """{image, caption} and {image, question, answer} as prompt and completion."""
    if isinstance(row.get("caption"), str) and not {*QUESTIONS, *TURNS} & set(row):
        return {"prompt": "", "completion": row["caption"]} | {k: v for k, v in row.items() if k != "caption"}
    if isinstance(row.get("question"), str) and isinstance(row.get("answer"), str) and "prompt" not in row:
        rest = {name: value for name, value in row.items() if name not in ("question", "answer")}
        return {"prompt": row["question"], "completion": row["answer"]} | rest
    return row


def _anywhere(value: Any, text: str) -> bool:
    found: list[bool] = []
    replaced(value, lambda each: found.append(text in each) or each)
    return any(found)


def _in_front(row: Row, mark: str) -> Row:
    """The row with `mark` before its first text; of several answers with the same beginning, before each."""
    for name in QUESTIONS:
        if isinstance(row.get(name), str):
            return row | {name: mark + row[name]}
    changed: Row = {}
    for name in ("prompt",) if isinstance(row.get("prompt"), list) else TURNS:
        turns = row.get(name)
        first = (
            next((i for i, turn in enumerate(turns or ()) if _asks(turn)), None) if isinstance(turns, list) else None
        )
        if first is not None and isinstance(turns, list):
            key = "content" if "content" in turns[first] else "value"
            said = {**turns[first], key: mark + turns[first][key]}
            changed[name] = [*turns[:first], said, *turns[first + 1 :]]
    if not changed:
        raise RowError(f"the row has pictures but no question that they could stand in; put {MARK} in its text")
    return row | changed


def _asks(turn: Any) -> bool:
    """Whether a turn is the user's."""
    if not isinstance(turn, dict):
        return False
    said = turn.get("content", turn.get("value"))
    return turn.get("role", turn.get("from")) in ("user", "human") and isinstance(said, str)
