"""Rows of files to be evaluated on: each becomes what is asked, or a `BadRow` with the reason."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar

from data.cache_files import BadRow
from data.formats import RowError
from data.readers import READERS, kind_of_suffix


class Asked(Protocol):
    """What a row asks, and where it stands."""

    @property
    def file(self) -> str: ...

    @property
    def line(self) -> int: ...


A = TypeVar("A", bound=Asked)
P = TypeVar("P")


@dataclass(frozen=True)
class RowFile:
    """A file of rows, and their channel where a row names none; None = the file's stem."""

    path: str
    channel: str | None = None
    option: str = "--questions"
    """By which it was named, for messages."""


def check(source: RowFile) -> None:
    """That a file is there and of a kind that holds rows.

    Raises:
        ValueError: it is not.
    """
    path = Path(source.path).expanduser()
    if not path.is_file():
        reason = "is a folder" if path.is_dir() else "there is no such file"
        raise ValueError(f"{source.option} {source.path}: {reason}")
    if kind_of_suffix(path.name) in (None, "text"):
        what = source.option.removeprefix("--").removesuffix("s")
        raise ValueError(f"{source.option} {source.path}: must be .jsonl, .json or .parquet, with a {what} a row")


def read(source: RowFile, parse: Callable[[dict[str, Any], str, int, str], A]) -> Iterator[A | BadRow]:
    """What the rows of a file ask, in order, a `BadRow` where `parse` refuses one. One row is in memory at a time.

    Args:
        parse: (row, file, line, channel of the file) -> what is asked; raises RowError.

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
                yield parse(row, source.path, line, source.channel or path.stem)
            except RowError as error:
                yield BadRow(source.path, line, str(error))


def windows(
    rows: Iterable[A | BadRow], prepare: Callable[[A], P], size: int, bad: Callable[[BadRow], None]
) -> Iterator[tuple[int, list[tuple[A, P]]]]:
    """So many rows at a time: their count, and those that can be used, prepared.

    Args:
        prepare: makes of what is asked what the model is given; raises RowError where it cannot.
        bad: is told of every row that is passed over.
    """
    each = iter(rows)
    while window := list(islice(each, size)):
        kept: list[tuple[A, P]] = []
        for row in window:
            try:
                if isinstance(row, BadRow):
                    bad(row)
                else:
                    kept.append((row, prepare(row)))
            except RowError as error:
                assert not isinstance(row, BadRow)
                bad(BadRow(row.file, row.line, str(error)))
        yield len(window), kept


def channel_of(row: dict[str, Any], channel: str) -> str:
    """The channel a row names, or else the file's."""
    named = row.get("channel")
    if named is not None and (not isinstance(named, str) or not named):
        raise RowError(f"channel is {named!r}, not a name")
    return named or channel


def text(value: Any, name: str) -> str:
    """A string that says something and can be written as UTF-8."""
    if not isinstance(value, str):
        raise RowError(f"{name} is {brief(value)}, not a string")
    if not value.strip():
        raise RowError(f"{name} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(f"{name} has half a surrogate pair at character {error.start}: not valid Unicode") from error
    return value


def brief(value: Any) -> str:
    """A value for a message."""
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
