"""What words look at in the pictures of a text: gathered once, for scripts/inspect_model.py's page and numbers."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from models.inspection import Inspection
from scripts import inspect_heat as heat
from scripts.inspect_pictures import png
from scripts.inspect_report import Picture, Section
from scripts.inspect_texts import Text

MOST_WORDS = 12
LARGE_HEADS = 8
"""So many single heads are drawn of each word and picture: those that look most."""


@dataclass(frozen=True)
class Word:
    """Tokens that look together."""

    text: str
    says: bool
    """They say the word (the tokens before each of its own), rather than read it."""
    places: tuple[int, ...]
    document: int

    @property
    def title(self) -> str:
        """How the page calls it."""
        return f"{'before' if self.says else 'at'} {self.text!r}"


@dataclass(frozen=True)
class Look:
    """What a word takes from one picture."""

    word: Word
    picture: int
    total_LH: np.ndarray
    """Weight on all tokens of the picture, of the chosen layers and heads."""
    spots_LHS: np.ndarray
    """Weight on each spot of it, see `Inspection.look`."""


def find_words(asked: Sequence[str], text: Text) -> list[Word]:
    """The words that were asked for, as what says and what reads them, each time they stand in the text; without any,
    the last token of each document with pictures, which says what comes next.

    Raises:
        ValueError: a word stands nowhere, or too often.
    """
    if asked and not text.shown:
        raise ValueError("--word is about pictures, and none is shown; give --image PATH")
    if not asked:
        ends = [(i, stop - 1) for i, (start, stop) in enumerate(pairwise(text.borders)) if _sees(text, start, stop)]
        return [Word("what comes next", True, (last,), i) for i, last in ends]
    found: list[Word] = []
    for word in asked:
        times = [each for i in range(len(text.documents)) for each in _of_document(word, text, i)]
        if not times:
            raise ValueError(
                f"--word {word}: it does not stand in the text behind a picture; give a word of it as written there"
            )
        found += times
    if len(found) > 2 * MOST_WORDS:
        raise ValueError(
            f"--word: these stand {len(found) // 2} times in the text; give longer ones, for {MOST_WORDS} at most"
        )
    return found


def _sees(text: Text, start: int, stop: int) -> bool:
    return any(start <= each.start < stop for each in text.shown)


def _of_document(word: str, text: Text, document: int) -> Iterator[Word]:
    first, stop = text.borders[document : document + 2]
    behind = min((each.stop for each in text.shown if first <= each.start < stop), default=stop)
    at = text.documents[document].find(word) if word else -1
    while at >= 0:
        begins, ends = text.letters_T2[behind:stop].T
        places = behind + np.flatnonzero((begins < at + len(word)) & (ends > at))
        places = [int(place) for place in places if not any(each.start <= place < each.stop for each in text.shown)]
        if places:
            yield Word(word, True, tuple(place - 1 for place in places), document)
            yield Word(word, False, tuple(places), document)
        at = text.documents[document].find(word, at + len(word))


def gather_looks(
    inspection: Inspection, text: Text, words: Sequence[Word], layers: Sequence[int], heads: Sequence[int]
) -> list[Look]:
    """What each word takes from each picture of its document."""
    places = [word.places for word in words]
    spots, totals = [], []
    for layer in layers:
        spots.append(inspection.look(layer, places, heads).numpy())
        weights = list(inspection.attention(layer, heads))
        totals.append([[[w[list(at), each.start : each.stop].sum(1).mean().item() for w in weights]
                        for each in text.shown] for at in places])  # fmt: skip
    spots_LWHS, totals_LWIH = np.stack(spots), np.array(totals)
    ends = np.cumsum([0, *(len(each.regions_S4) for each in text.shown)])
    assert ends[-1] == spots_LWHS.shape[-1], "the pictures' spots are those of all tiles"
    found = []
    for number, word in enumerate(words):
        first, stop = text.borders[word.document : word.document + 2]
        for i, each in enumerate(text.shown):
            if first <= each.start < stop and each.start <= max(word.places):
                mine = spots_LWHS[:, number, :, ends[i] : ends[i + 1]]
                found.append(Look(word, i, totals_LWIH[:, number, i], mine))
    return found


def section_of(looks: Sequence[Look], text: Text, layers: Sequence[int], heads: Sequence[int], reads: bool) -> Section:
    """The part of the page."""
    pictures, rows = [], []
    for number, look in enumerate(looks):
        shown, total_LH = text.shown[look.picture], look.total_LH
        title = f"{look.word.title}, {shown.name}"
        means = [("all layers", look.spots_LHS.mean((0, 1)), float(total_LH.mean()))]
        for i, layer in enumerate(layers):
            means.append((f"layer {layer}", look.spots_LHS[i].mean(0), float(total_LH[i].mean())))
        pictures.append(Picture(f"look_{number}", f"{title}: mean over heads", png(heat.sheet, shown, means)))
        best = [divmod(int(n), len(heads)) for n in np.argsort(-total_LH, axis=None, kind="stable")[:LARGE_HEADS]]
        single = [(f"{layers[i]}.{heads[j]}", look.spots_LHS[i, j], float(total_LH[i, j])) for i, j in best]
        caption = f"{title}: the heads that look most (layer.head)"
        pictures.append(Picture(f"look_{number}_heads", caption, png(heat.sheet, shown, single)))
        rows.append(f"<tr><td>{html.escape(title)}</td>{''.join(f'<td>{x:.3f}</td>' for x in total_LH.mean(1))}</tr>")
    header = "".join(f"<th>{layer}</th>" for layer in layers)
    table = f"<table><tr><th>weight on the picture, by layer</th>{header}</tr>{''.join(rows)}</table>"
    how = (
        "Where a word's attention lies in a picture: bright is much weight; each panel has its own scale, and its "
        "percentage says how much of all the attention goes to this picture (the rest goes to the text). <b>Before</b> "
        "a word are the tokens that say it, <b>at</b> it those that read it. A feature's place is that of its patches, "
        "but the tower has let patches see each other: a bright patch without anything in it may hold a summary."
    )
    if reads:
        how += (
            " The connector's learnt queries have no place: what is shown are the word's weights on the queries times "
            "what each query read of the patches, the mean over all heads and layers in which they read."
        )
    return Section("What words look at in the pictures", how, tuple(pictures), f'<div class="wide">{table}</div>')


def look_numbers(looks: Sequence[Look], text: Text, layers: Sequence[int], heads: Sequence[int]) -> dict[str, Any]:
    """For the JSON file: regions once a picture, weights on them for each word, picture and layer."""
    shown = [
        {
            "name": each.name,
            "width": each.image.width,
            "height": each.image.height,
            "tokens": [each.start, each.stop],
            "regions": [None if np.isnan(box[0]) else [float(x) for x in box.round(3)] for box in each.regions_S4],
        }
        for each in text.shown
    ]
    return {"pictures": shown, "looks": [_numbers(look, layers, heads) for look in looks]}


def _numbers(look: Look, layers: Sequence[int], heads: Sequence[int]) -> dict[str, Any]:
    word = look.word
    return {
        "word": word.text,
        "says": word.says,
        "places": list(word.places),
        "picture": look.picture,
        "layers": [
            {
                "layer": layer,
                "weight": float(total_H.mean()),
                "spots": [float(f"{x:.6g}") for x in spots_HS.mean(0)],
                "heads": [{"head": head, "weight": float(x)} for head, x in zip(heads, total_H, strict=True)],
            }
            for layer, total_H, spots_HS in zip(layers, look.total_LH, look.spots_LHS, strict=True)
        ],
    }
