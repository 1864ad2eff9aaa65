"""Rows of one picture and the words that tell what it shows, for models that compare the two.

{"image": ..., "caption": ...} or {"image": ..., "text": ...}; or a conversation of which the assistant's only message
is the caption, whatever it was asked. The picture has no place in the text.
"""

from __future__ import annotations

from typing import Any

from data.rows import Caption, Row, RowError, check_messages, sharegpt_messages, string_of, turns_of

TURNS = ("messages", "conversations", "conversation")


def is_caption(row: Row) -> bool:
    """Whether a row has a caption, under its own name or as the completion of nothing."""
    return "caption" in row or ("completion" in row and not str(row.get("prompt", "")).replace("<image>", "").strip())


def captioned(row: Row) -> Row:
    """The row with its caption as `text`, where any format of pictures in rows finds a place for the picture.

    Raises:
        RowError: there is no caption, or it is no text.
    """
    if "caption" not in row:
        if not any(name in row for name in (*TURNS, "text")):
            raise RowError("field caption is missing")
        return row
    return {name: value for name, value in row.items() if name != "caption"} | {"text": string_of(row, "caption")}


def parse_caption(row: Row) -> Caption:
    """A row as `captioned` gives it."""
    return Caption(string_of(row, "text"))


def parse_told(row: Row) -> Caption:
    """A conversation in which the assistant speaks once."""
    return _told(turns_of(row, TURNS))


def parse_shared(row: Row) -> Caption:
    """The same of {from, value} turns."""
    return _told(sharegpt_messages(turns_of(row, TURNS)))


def _told(turns: list[Any]) -> Caption:
    said = [turn["content"] for turn in check_messages(turns) if turn["role"] == "assistant"]
    if len(said) != 1:
        raise RowError(f"a caption is one message of the assistant, and the row has {len(said)}")
    return Caption(said[0])


def check_caption(text: str, pictures: int) -> None:
    """Raises:
    RowError: the row is no picture with its caption.
    """
    if pictures != 1:
        has = "no picture" if not pictures else f"{pictures} pictures"
        raise RowError(f"the row has {has}, and a caption tells of one")
    if not text:
        raise RowError("the caption is empty")


def ends_of(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Tokens before and behind a text by the tokenizer's own rule (CLIP's marks, BERT's [CLS] and [SEP]); its end of
    text where the rule says nothing."""
    backend = tokenizer.backend_tokenizer
    plain, marked = (backend.encode("a", add_special_tokens=given).ids for given in (False, True))
    for at in range(len(marked) - len(plain) + 1):
        if marked[at : at + len(plain)] == plain:
            before, behind = tuple(marked[:at]), tuple(marked[at + len(plain) :])
            break
    else:
        before, behind = (), ()
    if not behind and tokenizer.eos_token_id is not None:
        behind = (tokenizer.eos_token_id,)
    return before, behind
