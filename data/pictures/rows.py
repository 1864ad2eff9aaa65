"""Pictures and videos of a row: where they are named, and which place in the text stands for each.

A row names its pictures in `images` (a list) or `image`, its videos in `videos` or `video`, or inside the content of
messages; `references` says how each is written. In the text `<image>` and `<video>` stand for them, in order; where no
text has one, all of them come first.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from data.pictures.references import RATES, Reference, address_of, picture_of, video_of
from data.rows import Row, RowError, kind_of

__all__ = ["MARK", "VIDEO_MARK", "Reference", "placed", "replaced", "split_row"]

MARK, VIDEO_MARK = "<image>", "<video>"
"""What stands for a picture and for a video in the text of rows, whatever the model's own tokens are."""
MARKS = (MARK, VIDEO_MARK)

FIELDS = ("images", "image", "videos", "video")
PARTS = {"image": MARK, "image_url": MARK, "video": VIDEO_MARK, "video_url": VIDEO_MARK}
"""Types of a message's parts that show something."""
TURNS = ("messages", "conversations", "conversation", "prompt", "chosen", "rejected")
QUESTIONS = ("prompt", "instruction", "question", "text")
ANSWERS = ("chosen", "rejected")
"""Fields of which each goes on from all the others."""
EITHER = re.compile("|".join(MARKS))


def split_row(row: Row, folder: str, answered: bool = True) -> tuple[Row, tuple[Reference, ...]]:
    """The row with text only, and its pictures in order; a row without any comes back as it is.

    Args:
        folder: what relative paths start from.
        answered: captions and answers beside a question are what is learnt, not what judges an answer.

    Raises:
        RowError: what should be a picture is none, or a message's picture has no address.
    """
    named = {MARK: [part for name in FIELDS[:2] for part in _listed(row.get(name))], VIDEO_MARK: _videos(row)}
    inside: dict[str, list[Any]] = {mark: [] for mark in MARKS}
    if not any(named.values()) and not any(_has_parts(row.get(name)) for name in TURNS):
        return row, ()
    rest = {name: value for name, value in row.items() if name not in FIELDS}
    rest |= {name: _flat(rest[name], inside) for name in TURNS if isinstance(rest.get(name), list)}
    found = {mark: _named(mark, named[mark], inside[mark], folder) for mark in MARKS}
    rest = _in_known_fields(rest) if answered else rest
    first = "".join(mark * len(found[mark]) for mark in MARKS if not _anywhere(rest, mark))
    if first:
        rest = _in_front(rest, first + "\n")
    return rest, _in_order(rest, found) if found[VIDEO_MARK] else found[MARK]


def placed(row: Row, texts: Sequence[str]) -> Row:
    """The row of `split_row` with `texts` in the places of its pictures and videos, one after another."""
    made: Row = {}
    rest = iter(texts)
    for name in _first_fields(row):
        made[name] = replaced(row[name], _with(rest))
    behind = list(rest)
    for name in ANSWERS:
        if name in row:
            made[name] = replaced(row[name], _with(iter(behind)))
    return {name: made[name] for name in row}


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


def _videos(row: Row) -> list[Any]:
    """What the fields name; a list in `video` is that of one video's frames."""
    one = row.get("video")
    return _listed(row.get("videos")) + ([] if one in (None, "", []) else [one])


def _named(mark: str, named: list[Any], inside: list[Any], folder: str) -> tuple[Reference, ...]:
    """Those of one kind, from the fields or from the messages."""
    own = [part for part in inside if part is not None]
    if own and (named or len(own) < len(inside)):
        what, field = ("pictures", "images") if mark == MARK else ("videos", "videos")
        raise RowError(f"{what} are named both in the messages and in the field {field}; name each once")
    make = picture_of if mark == MARK else video_of
    return tuple(make(part, folder) for part in (own or named))


def _is_picture(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") in PARTS


def _flat(turns: list[Any], inside: dict[str, list[Any]]) -> list[Any]:
    """Messages whose contents are strings; what they show is appended to `inside` by its mark, None for what has no
    address of its own."""
    flat = []
    for turn in turns:
        content = turn.get("content") if isinstance(turn, dict) else None
        if isinstance(content, list) and any(_is_picture(part) for part in content):
            text = ""
            for part in content:
                if _is_picture(part):
                    mark = PARTS[part["type"]]
                    inside[mark].append(_address(part, mark))
                    text += mark
                elif isinstance(part, dict) and isinstance(part.get("text"), str):
                    text += part["text"]
                else:
                    kind = part.get("type") if isinstance(part, dict) else kind_of(part)
                    raise RowError(f"a message has a content part of type {kind!r}; known are text, image and video")
            turn = {**turn, "content": text}
        flat.append(turn)
    return flat


def _address(part: Row, mark: str) -> Any:
    if mark == MARK:
        return address_of(part, ("image", "path", "url", "image_url"))
    found = address_of(part, ("video", "frames", "path", "url", "video_url", "bytes"))
    return found and {"frames": found} | {name: part[name] for name in RATES if name in part}


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


def _first_fields(row: Row) -> list[str]:
    """Fields in the order of their texts in a document, but for the answers of a pair."""
    known = ("system", "prompt", "instruction", "input", "question", "text")
    names = [name for name in known if name in row]
    return names + [name for name in row if name not in known and name not in ANSWERS]


def _with(texts: Iterator[str]) -> Callable[[str], str]:
    return lambda each: EITHER.sub(lambda _: next(texts), each)


def _in_order(row: Row, found: dict[str, tuple[Reference, ...]]) -> tuple[Reference, ...]:
    """Pictures and videos as their places follow each other in the row's documents."""
    first: list[str] = []
    for name in _first_fields(row):
        replaced(row[name], lambda each: first.extend(EITHER.findall(each)) or each)
    documents = []
    for name in ANSWERS:
        if name in row:
            documents.append([*first])
            replaced(row[name], lambda each, marks=documents[-1]: marks.extend(EITHER.findall(each)) or each)
    for marks in documents or [first]:
        for mark, what in ((MARK, "pictures"), (VIDEO_MARK, "videos")):
            if marks.count(mark) != len(found[mark]):
                raise RowError(
                    f"the text has {marks.count(mark)} places for {what}, but the row has {len(found[mark])} {what}"
                )
        if marks != (documents or [first])[0]:
            raise RowError("chosen and rejected show pictures and videos in different order")
    rest = {mark: iter(references) for mark, references in found.items()}
    return tuple(next(rest[mark]) for mark in (documents or [first])[0])
