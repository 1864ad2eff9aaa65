"""Rows of files: one reader for each kind of file. A row that cannot be read is handed on with its reason, not raised.

A reader has three functions. `cut(path)` gives (start, stop, size) ranges that can be read on their own.
`read(path, start, stop)` yields `(line, row, reason)`, where `line` counts from 1 within the range (rows for JSON
arrays, Parquet and Arrow) and exactly one of `row` and `reason` is None. `between(path, first, start)` tells how many
lines start from range position `first` up to `start`; it is asked for only when a bad row has to be named.
"""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

Record = tuple[int, dict[str, Any] | None, str | None]
Range = tuple[int, int, int]

BLOCK_BYTES = 8 << 20
ROWS_PER_UNIT = 16_384
COUNT_BYTES = 1 << 20


@dataclass(frozen=True)
class Reader:
    cut: Callable[[str], list[Range]]
    read: Callable[[str, int, int], Iterator[Record]]
    between: Callable[[str, int, int], int]


def kind_of_suffix(name: str) -> str | None:
    """Which reader a file name asks for; None if no reader knows it."""
    return SUFFIXES.get(os.path.splitext(name)[1].lower())


def cut_jsonl(path: str) -> list[Range]:
    """Byte blocks; a line belongs to the block in which it starts."""
    size = os.path.getsize(path)
    return [(at, min(at + BLOCK_BYTES, size), min(BLOCK_BYTES, size - at)) for at in range(0, size, BLOCK_BYTES)]


def read_jsonl(path: str, start: int, stop: int) -> Iterator[Record]:
    """Rows of the lines that start in bytes [start, stop). Blank lines are no rows."""
    with open(path, "rb") as stream:
        if start:
            stream.seek(start - 1)
            stream.readline()  # the rest of a line that belongs to the block before, or just its newline
        at = stream.tell()
        for number, line in enumerate(iter(stream.readline, b""), 1):
            if at >= stop:
                return
            at += len(line)
            if not line.strip():
                continue
            row, reason = json_row(line)
            yield number, row, reason


def lines_between(path: str, first: int, start: int) -> int:
    """Lines that start in bytes [first, start)."""
    if start <= first:
        return 0
    count = int(first == 0)
    at = max(first - 1, 0)
    left = start - 1 - at
    with open(path, "rb") as stream:
        stream.seek(at)
        while left > 0 and (chunk := stream.read(min(COUNT_BYTES, left))):
            count += chunk.count(b"\n")
            left -= len(chunk)
    return count


def cut_whole(path: str) -> list[Range]:
    """The file in one piece."""
    size = os.path.getsize(path)
    return [(0, 1, size)] if size else []


def read_json(path: str, start: int, stop: int) -> Iterator[Record]:
    """Elements of a JSON array, the rows of an object's only list, one object, or JSON lines under the wrong suffix."""
    with open(path, "rb") as stream:
        content = stream.read()
    try:
        value = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as err:
        first = content.lstrip(codecs.BOM_UTF8).lstrip()[:1]
        if first == b"{" and b"\n" in content.strip():  # many files named .json hold one object a line
            yield from read_jsonl(path, 0, len(content))
            return
        raise ValueError(
            f"{path} is not JSON: {err}; correct the file, or rename it .jsonl if it has a row a line"
        ) from err
    if isinstance(value, dict):
        lists = [part for part in value.values() if isinstance(part, list) and part and isinstance(part[0], dict)]
        is_row = any(name in value for name in ("messages", "conversations", "conversation", "text", "prompt"))
        value = lists[0] if len(lists) == 1 and not is_row else [value]
    if not isinstance(value, list):
        raise ValueError(f"{path} holds {type(value).__name__}, not a list of rows; write a JSON array of objects")
    for number, row in enumerate(value, 1):
        if isinstance(row, dict):
            yield number, row, None
        else:
            yield number, None, f"the row is {type(row).__name__}, not an object"


def read_text(path: str, start: int, stop: int) -> Iterator[Record]:
    """The whole file as one document."""
    with open(path, "rb") as stream:
        content = stream.read()
    try:
        yield 1, {"text": content.decode("utf-8-sig")}, None
    except UnicodeDecodeError as err:
        line = content.count(b"\n", 0, err.start) + 1
        yield line, None, f"not UTF-8: byte 0x{content[err.start]:02x} at offset {err.start}"


def cut_parquet(path: str) -> list[Range]:
    """Row groups."""
    meta = _parquet(path).metadata
    return [(group, group + 1, meta.row_group(group).total_byte_size) for group in range(meta.num_row_groups)]


def read_parquet(path: str, start: int, stop: int) -> Iterator[Record]:
    """Rows of the row groups [start, stop)."""
    file = _parquet(path)
    number = 0
    try:
        for batch in file.iter_batches(batch_size=1024, row_groups=list(range(start, stop))):
            for row in batch.to_pylist():
                number += 1
                yield number, row, None
    except OSError as err:
        number += group_rows_between(path, 0, start) + 1
        raise ValueError(f"{path} is damaged near row {number}: {err}; copy the file again") from err


def group_rows_between(path: str, first: int, start: int) -> int:
    """Rows of the row groups [first, start)."""
    meta = _parquet(path).metadata
    return sum(meta.row_group(group).num_rows for group in range(first, start))


def cut_arrow(path: str) -> list[Range]:
    """Runs of rows."""
    batches = list(_arrow_batches(path))
    total = sum(batch.num_rows for batch in batches)
    per_row = max(1, os.path.getsize(path) // max(total, 1))
    cuts = range(0, total, ROWS_PER_UNIT)
    return [(at, min(at + ROWS_PER_UNIT, total), (min(at + ROWS_PER_UNIT, total) - at) * per_row) for at in cuts]


def read_arrow(path: str, start: int, stop: int) -> Iterator[Record]:
    """Rows [start, stop) of an Arrow stream file; batches before are mapped, not read."""
    base = 0
    for batch in _arrow_batches(path):
        low, high = max(start, base), min(stop, base + batch.num_rows)
        for at in range(low, high, 1024):
            for offset, row in enumerate(batch.slice(at - base, min(1024, high - at)).to_pylist()):
                yield at + offset + 1 - start, row, None
        base += batch.num_rows
        if base >= stop:
            return


def json_row(line: bytes) -> tuple[dict[str, Any] | None, str | None]:
    """The row of a line of JSON, or the reason why it is none."""
    try:
        row = json.loads(line.removeprefix(codecs.BOM_UTF8).decode("utf-8"))
    except UnicodeDecodeError as err:
        return None, f"not UTF-8: byte 0x{line[err.start]:02x} at offset {err.start} of the line"
    except (ValueError, RecursionError) as err:
        return None, f"not JSON: {err}"
    if not isinstance(row, dict):
        return None, f"the row is {type(row).__name__}, not an object"
    return row, None


def _parquet(path: str) -> Any:
    import pyarrow.parquet  # a quarter second that runs with a warm cache or only text need not pay

    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as err:
        raise ValueError(f"{path} is not a readable Parquet file: {err}; copy it again") from err


def _arrow_batches(path: str) -> Iterator[Any]:
    import pyarrow  # see _parquet

    try:
        with pyarrow.memory_map(path) as mapped, pyarrow.ipc.open_stream(mapped) as stream:
            yield from stream
    except (OSError, pyarrow.ArrowException) as err:
        raise ValueError(f"{path} is not a readable Arrow stream file: {err}; save the dataset again") from err


def _difference(path: str, first: int, start: int) -> int:
    return start - first


READERS: dict[str, Reader] = {
    "jsonl": Reader(cut_jsonl, read_jsonl, lines_between),
    "json": Reader(cut_whole, read_json, _difference),
    "parquet": Reader(cut_parquet, read_parquet, group_rows_between),
    "arrow": Reader(cut_arrow, read_arrow, _difference),
    "text": Reader(cut_whole, read_text, _difference),
}
SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
    ".md": "text",
}
