"""Multiple-choice questions from the rows of files: {"question": ..., "choices": [...], "answer": ...}."""

from __future__ import annotations

import string
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from data.cache_files import BadRow
from data.formats import RowError
from data.pictures.rows import FIELDS
from trainer.evaluation import rows
from trainer.evaluation.rows import RowFile

LETTERS = string.ascii_uppercase


@dataclass(frozen=True)
class Question:
    """A prompt and what may follow it."""

    file: str
    line: int
    channel: str
    prompt: str
    choices: tuple[str, ...]
    answer: int
    """Index of the right choice."""


def read(source: RowFile) -> Iterator[Question | BadRow]:
    """The questions of a file in order, with a `BadRow` for every row that is none. One row is in memory at a time.

    Raises:
        ValueError: the file is not there, or holds no rows.
    """
    return rows.read(source, _question)


def _question(row: dict[str, Any], file: str, line: int, channel: str) -> Question:
    key = next((name for name in ("question", "prompt") if name in row), None)
    if key is None:
        raise RowError(f"there is no question or prompt among its fields ({', '.join(map(str, row)) or 'none'})")
    if any(row.get(name) for name in FIELDS):
        raise RowError("it has pictures, which multiple choice does not show; ask it with --tasks and an answer")
    prompt = rows.text(row[key], key)
    choices = row.get("choices")
    if not isinstance(choices, list) or len(choices) < 2:
        raise RowError(f"choices is {rows.brief(choices)}, not a list of at least two")
    texts = tuple(rows.text(choice, f"choice {index}") for index, choice in enumerate(choices))
    if len(set(texts)) < len(texts):
        twice = next(text for text in texts if texts.count(text) > 1)
        raise RowError(f"the choice {rows.brief(twice)} is there twice")
    return Question(file, line, rows.channel_of(row, channel), prompt, texts, _answer(row.get("answer"), texts))


def _answer(value: Any, choices: tuple[str, ...]) -> int:
    """Index of the right choice: an index from 0, the text of a choice, or a letter (A is the first). Text is first."""
    if value is None:
        raise RowError("there is no answer")
    if isinstance(value, int) and not isinstance(value, bool):
        if not 0 <= value < len(choices):
            raise RowError(f"answer {value} is no index of {len(choices)} choices: the first is 0")
        return value
    if isinstance(value, str):
        if value in choices:
            return choices.index(value)
        letter = value.strip().upper()
        if len(letter) == 1 and letter in LETTERS[: len(choices)]:
            return LETTERS.index(letter)
    raise RowError(
        f"answer {rows.brief(value)} is not among the choices: give an index from 0, the text of a choice, or a letter"
    )
