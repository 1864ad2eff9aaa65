"""What is typed for a model's answers: settings such as temperature=0.7 top_p=0.9 'stop=["\\n"]', and its device."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import torch

TEXTS, LISTS = ("regex",), ("stop", "allowed")
"""Settings that are a text whatever it looks like; lists of texts, of which a single one may stand without brackets."""


def words_of(line: str) -> list[str]:
    """The words for `settings_of` in a line such as `temperature=0.7 stop=["a b", "c"] regex='[a-z ]+'`.

    A value goes on up to the next KEY=; quotes around a whole value are not part of it.
    """
    words = []
    for word in re.split(r"\s+(?=\w+=)", line.strip()):
        key, equals, value = word.partition("=")
        quotes = "'\"" if key in TEXTS else "'"
        if len(value) > 1 and value[0] == value[-1] and value[0] in quotes:
            value = value[1:-1]
        words.append(key + equals + value)
    return words


def settings_of(words: Sequence[str]) -> dict[str, Any]:
    """Words such as `temperature=0.7` as a mapping for `sampling_config`, which checks it. Values are JSON or texts.

    Raises:
        ValueError: a word without a value.
    """
    found: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not (key and equals):
            raise ValueError(f"{word!r} is no setting; write KEY=VALUE, such as temperature=0.7")
        found[key] = _value(key, value)
    return found


def device_of(name: str | None, option: str = "--device") -> torch.device:
    """The device of this name; None = a GPU if there is one.

    Raises:
        ValueError: it cannot be used.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"{option} {name} cannot be used: {str(error).splitlines()[0]}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"{option} {name}: must be cpu, cuda or cuda:N")
    return device


def _value(key: str, text: str) -> Any:
    if text == "null":
        return None
    if key in TEXTS or (key in LISTS and not text.startswith(("[", '"'))):
        return [text] if key in LISTS else text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = text
    return [value] if key in LISTS and isinstance(value, str) else value
