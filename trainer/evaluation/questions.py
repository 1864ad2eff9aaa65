"""Multiple-choice questions from the rows of files: {"question": ..., "choices": [...], "answer": ...}."""

from __future__ import annotations

import string
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.cache_files import BadRow
from data.formats import RowError
from data.readers import READERS, kind_of_suffix

LETTERS = string.ascii_uppercase


@dataclass(frozen=True)
class QuestionFile:
    """A file of questions, and their channel where a row names none; None = the file's stem."""

    path: str
    channel: str | None = None


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


def check(source: QuestionFile) -> None:
    """That a file is there and of a kind that holds rows.

    Raises:
        ValueError: it is not.
    """
    path = Path(source.path).expanduser()
    if not path.is_file():
        raise ValueError(f"--questions {source.path}: {'is a folder' if path.is_dir() else 'there is no such file'}")
    if kind_of_suffix(path.name) in (None, "text"):
        raise ValueError(f"--questions {source.path}: must be .jsonl, .json or .parquet, with a question a row")


def read(source: QuestionFile) -> Iterator[Question | BadRow]:
    """The questions of a file in order, with a `BadRow` for every row that is none. One row is in memory at a time.

    Raises:
        ValueError: the file is not there, or holds no rows.
    """
    check(source)
    path = Path(source.path).expanduser()
    kind = kind_of_suffix(path.name)
    assert kind is not None, "checked above"
    reader, before, last = READERS[kind], 0, 0
    for start, stop, _ in reader.cut(str(path)):
        before += reader.between(str(path), last, start)
        last = start
        for number, row, reason in reader.read(str(path), start, stop):
            line = before + number
            try:
                if row is None:
                    raise RowError(reason)
                yield _question(row, source.path, line, source.channel or path.stem)
            except RowError as error:
                yield BadRow(source.path, line, str(error))


def _question(row: dict[str, Any], file: str, line: int, channel: str) -> Question:
    key = next((name for name in ("question", "prompt") if name in row), None)
    if key is None:
        raise RowError(f"there is no question or prompt among its fields ({', '.join(map(str, row)) or 'none'})")
    prompt = _text(row[key], key)
    named = row.get("channel")
    if named is not None and (not isinstance(named, str) or not named):
        raise RowError(f"channel is {named!r}, not a name")
    choices = row.get("choices")
    if not isinstance(choices, list) or len(choices) < 2:
        raise RowError(f"choices is {_brief(choices)}, not a list of at least two")
    texts = tuple(_text(choice, f"choice {index}") for index, choice in enumerate(choices))
    if len(set(texts)) < len(texts):
        twice = next(text for text in texts if texts.count(text) > 1)
        raise RowError(f"the choice {_brief(twice)} is there twice")
    return Question(file, line, named or channel, prompt, texts, _answer(row.get("answer"), texts))


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise RowError(f"{name} is {_brief(value)}, not a string")
    if not value.strip():
        raise RowError(f"{name} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(f"{name} has half a surrogate pair at character {error.start}: not valid Unicode") from error
    return value


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
        f"answer {_brief(value)} is not among the choices: give an index from 0, the text of a choice, or a letter"
    )


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
