"""Tasks from the rows of files: {"prompt": ..., "answer": ...}, with a regular expression that finds the answer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from data.cache_files import BadRow
from data.formats import RowError, check_messages
from data.pictures.notes import Seen
from trainer.evaluation import rows
from trainer.evaluation.judging import check_pattern
from trainer.evaluation.rows import RowFile
from trainer.inference.eyes import BLIND, Eyes

ASKS = ("prompt", "question", "messages")


@dataclass(frozen=True)
class Task:
    """What is asked, and what counts as right."""

    file: str
    line: int
    channel: str
    prompt: str | list[dict[str, Any]]
    """A text, or messages for the chat template."""
    answers: tuple[str, ...]
    """Any of them is right; without one a match of the pattern is."""
    pattern: str | None
    """A regular expression; its first group is compared with the answers."""
    seen: tuple[Seen, ...] = ()
    """Its pictures."""

    def described(self) -> dict[str, Any]:
        """It as a row of JSON."""
        told = {name: value for name, value in vars(self).items() if name != "seen"}
        return told | ({"pictures": [str(each.where) for each in self.seen]} if self.seen else {})


def read(source: RowFile, eyes: Eyes = BLIND) -> Iterator[Task | BadRow]:
    """The tasks of a file in order, with a `BadRow` for every row that is none. One row is in memory at a time.

    Args:
        eyes: what the model makes of pictures.

    Raises:
        ValueError: the file is not there, or holds no rows.
    """
    return rows.read(source, partial(_task, eyes))


def _task(eyes: Eyes, row: dict[str, Any], file: str, line: int, channel: str) -> Task:
    if "choices" in row:
        raise RowError("it has choices: name a file of multiple-choice questions with --questions")
    row, seen = eyes.look(_asked(row), str(Path(file).expanduser().parent))
    given = [key for key in ASKS if row.get(key) is not None]
    if len(given) != 1:
        found = f"both {given[0]} and {given[1]}" if given else "no prompt, question or messages"
        raise RowError(f"there is {found} among its fields ({', '.join(map(str, row)) or 'none'}); give one of them")
    key = given[0]
    prompt = _messages(row[key]) if key == "messages" else rows.text(row[key], key)
    pattern = row.get("regex")
    if pattern is not None:
        check_pattern(rows.text(pattern, "regex"))
    answers = _answers(row.get("answer"))
    if pattern is None and not answers:
        raise RowError("there is neither answer nor regex: nothing tells what is right")
    return Task(file, line, rows.channel_of(row, channel), prompt, answers, pattern, seen)


def _asked(row: dict[str, Any]) -> dict[str, Any]:
    """Of a whole conversation, as training reads it, the last message is the answer."""
    messages = row.get("messages")
    if "answer" in row or "regex" in row or not isinstance(messages, list) or len(messages) < 2:
        return row
    last = messages[-1]
    if not isinstance(last, dict) or last.get("role") != "assistant" or not isinstance(last.get("content"), str):
        return row
    return row | {"messages": messages[:-1], "answer": last["content"]}


def _messages(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise RowError(f"messages is {rows.brief(value)}, not a list")
    messages = check_messages(value)
    for index, message in enumerate(messages):
        if message["content"]:
            rows.text(message["content"], f"message {index}")
    if messages[-1]["role"] == "assistant":
        raise RowError("the last message is the assistant's: there is nothing to answer")
    return messages


def _answers(value: Any) -> tuple[str, ...]:
    """Texts; a number stands for its text."""
    if value is None:
        return ()
    if isinstance(value, list) and not value:
        raise RowError("answer is an empty list")
    return tuple(_answer(each) for each in (value if isinstance(value, list) else [value]))


def _answer(value: Any) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise RowError(f"answer is {rows.brief(value)}, not a string, a number or a list of them")
    return rows.text(value, "answer")
