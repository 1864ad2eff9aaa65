"""What kind of data a stage learns from, and which formats of rows give it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from data.captions import is_caption, parse_caption, parse_shared, parse_told
from data.formats import FORMATS, Format, is_messages, is_sharegpt, is_text
from data.pairs import is_ask, is_judged, is_pair, parse_ask, parse_both, parse_judged, parse_pair
from data.rows import Row

KindName = Literal["text", "preference", "unpaired", "prompts", "captions"]


@dataclass(frozen=True)
class Kind:
    """A kind of data."""

    what: str
    """For messages to the user."""
    stages: str
    """Which stages learn from it, for messages."""
    formats: Mapping[str, Format]
    """In the order in which detection asks."""
    noted: bool = True
    """Something is kept of each sample besides its tokens (data/notes.py)."""


_PAIR = "chosen, rejected, with prompt or both with the same beginning"

KINDS: dict[KindName, Kind] = {
    "text": Kind("texts and conversations", "stage=sft or stage=pretrain", FORMATS, noted=False),
    "preference": Kind(
        "preference pairs", "stage=dpo or stage=reward", {"preference": Format(_PAIR, is_pair, parse_pair)}
    ),
    "unpaired": Kind(
        "judged answers",
        "stage=dpo stage.loss=kto",
        {
            "unpaired": Format("prompt, completion, label", is_judged, parse_judged),
            "preference": Format(_PAIR, is_pair, parse_both),
        },
    ),
    "prompts": Kind(
        "prompts",
        "stage=grpo or stage=ppo",
        {
            "prompt": Format("prompt or question or instruction", is_ask, parse_ask),
            "messages": Format("messages: [{role, content}]", is_messages, parse_ask),
            "sharegpt": Format("conversations: [{from, value}]", is_sharegpt, parse_ask),
            "preference": Format(_PAIR, is_pair, parse_ask),
        },
    ),
    "captions": Kind(
        "pictures with captions",
        "stage=clip or stage=qformer",
        {
            "caption": Format("image, caption", is_caption, parse_caption),
            "messages": Format("image, messages: [{role, content}]", is_messages, parse_told),
            "sharegpt": Format("image, conversations: [{from, value}]", is_sharegpt, parse_shared),
            "text": Format("image, text", is_text, parse_caption),
        },
        noted=False,
    ),
}
FORMAT_NAMES = tuple(dict.fromkeys(name for kind in KINDS.values() for name in kind.formats))


def detect_format(rows: list[Row], where: str, key: str, kind: KindName = "text") -> str:
    """The format of a source from its first rows' fields.

    Args:
        rows: the first readable rows.
        where: path of the source, for the message.
        key: the source's name in the config, such as `data.sources[0]`.
        kind: what the stage learns from.

    Raises:
        ValueError: no format of the kind fits; names what the rows are instead, or their fields and the legal formats.
    """
    for row in rows:
        for name, form in KINDS[kind].formats.items():
            if form.matches(row):
                return name
    fields = ", ".join(sorted({str(field) for row in rows for field in row})) or "none"
    found = _recognised(rows)
    if found is not None and (kind != "text" or found == KINDS["preference"]):
        raise ValueError(
            f"{key}.path={where} holds {found.what} (its fields: {fields}), but this stage learns from "
            f"{_wanted(kind)}; give it such rows, or take {found.stages}"
        )
    raise ValueError(
        f"{key}.format=auto: cannot tell the format of {where} from its fields ({fields}); "
        f"rename them to fit one of: {_legal(kind)}; or, if one of them is meant, set {key}.format"
    )


def check_format(name: str, key: str, kind: KindName) -> None:
    """Refuse a format that was asked for and gives another kind of data than the stage learns from.

    Raises:
        ValueError: says which formats the stage can read.
    """
    if name not in KINDS[kind].formats:
        gives = next(each for each in KINDS.values() if name in each.formats)
        raise ValueError(
            f"{key}.format={name} gives {gives.what}, but this stage learns from {_wanted(kind)}; give it such rows "
            f"and {key}.format=auto, or take {gives.stages}"
        )


def _recognised(rows: list[Row]) -> Kind | None:
    """The kind of rows that fit another one, the most telling fields first."""
    order: tuple[KindName, ...] = ("preference", "unpaired", "text", "prompts", "captions")
    for kind in (KINDS[name] for name in order):
        if any(form.matches(row) for row in rows for form in kind.formats.values()):
            return kind
    return None


def _wanted(kind: KindName) -> str:
    return f"{KINDS[kind].what} ({_legal(kind)})"


def _legal(kind: KindName) -> str:
    return "; ".join(f"{name} ({form.fields})" for name, form in KINDS[kind].formats.items())
