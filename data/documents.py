"""From pieces to documents: one of a text, a caption or a judged answer, two of a pair, with facts that stages ask for.

A micro-batch of pairs has the facts `side` (0 chosen, 1 rejected) and `pair` (its number in the micro-batch, the same
for both), and `margin` if any pair of the run has one (0 where a pair has none). A micro-batch of judged answers has
`label` (1 good, 0 bad). What fills up a micro-batch that has nothing left to do has -1 in all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from data.batch import Document
from data.cache_files import TokenCache
from data.order import Pieces

Numbers = Sequence[np.ndarray]
"""float64 [samples, documents of a sample] of each cache."""

Sought = tuple[Document, TokenCache, int, int]
"""A document whose pictures are to be read, its cache and sample, and its first token there."""


def documents_of(
    caches: Sequence[TokenCache],
    numbers: Mapping[str, Numbers],
    pieces: Pieces,
    chosen: Sequence[int],
    look: Callable[[Sequence[Sought]], list[Document]] | None = None,
) -> list[Document]:
    """The documents of the chosen pieces, one after another; a token without a target if there are none.

    Args:
        caches: of one kind.
        numbers: facts of documents beside those of the kind, by name.
        look: reads the pictures of documents.
    """
    margins = has_margins(caches)
    found: list[Document] = []
    sought: list[Sought] = []
    for number, piece in enumerate(chosen):
        at = int(pieces.start_P[piece])
        for document in _documents(caches, numbers, pieces, piece, number, margins):
            found.append(document)
            sought.append((document, caches[pieces.source_P[piece]], int(pieces.sample_P[piece]), at))
            at += len(document.tokens_L)
    if look is not None:
        found = look(sought)
    return found or [_nothing(caches, numbers, margins)]


def has_margins(caches: Sequence[TokenCache]) -> bool:
    """Whether any pair says how much better its chosen answer is."""
    return any(cache.has_margins for cache in caches)


def _documents(
    caches: Sequence[TokenCache],
    numbers: Mapping[str, Numbers],
    pieces: Pieces,
    piece: int,
    number: int,
    margins: bool,
) -> list[Document]:
    source, sample = int(pieces.source_P[piece]), int(pieces.sample_P[piece])
    cache, start, length = caches[source], int(pieces.start_P[piece]), int(pieces.length_P[piece])
    tokens_L, learn_L = cache.tokens(sample, start, length), cache.learn(sample, start, length)
    channel = int(pieces.channel_P[piece])
    if cache.notes is None:
        if cache.kind == "captions":  # the text's vector is that of its last token, also where it was shortened
            tokens_L = np.append(tokens_L[:-1], cache.tokens(sample, int(cache.samples["length"][sample]) - 1, 1))
        return [Document(tokens_L, learn_L, channel)]
    split, value = int(cache.notes["split"][sample]), float(cache.notes["value"][sample])

    def computed(side: int) -> dict[str, float]:
        return {name: float(each[source][sample, side]) for name, each in numbers.items()}

    if cache.kind == "unpaired":
        return [Document(tokens_L, learn_L, channel, {"label": value, **computed(0)})]
    facts = {"pair": float(number), **({"margin": 0.0 if math.isnan(value) else value} if margins else {})}
    return [
        Document(tokens_L[part], learn_L[part], channel, {"side": float(side), **facts, **computed(side)})
        for side, part in enumerate((slice(0, split), slice(split, length)))
    ]


def _nothing(caches: Sequence[TokenCache], numbers: Mapping[str, Numbers], margins: bool) -> Document:
    of_kind = {"text": (), "captions": (), "unpaired": ("label",), "preference": ("side", "pair")}[caches[0].kind]
    names = (*of_kind, *(("margin",) if margins else ()), *numbers)
    token_L = np.zeros(1, dtype=np.int64)
    return Document(token_L, token_L.astype(bool), 0, dict.fromkeys(names, -1.0))
