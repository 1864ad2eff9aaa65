"""What the prompts of a run show: pictures, read by each rank for the prompts that it writes to or learns from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch

from data.batch import Document
from data.prompts import Prompt
from models.generation import Sight


class Sights:
    """The pictures of prompts, each read once a step: texts, scores and updates look at the same ones.

    Args:
        read: prompts that show something as documents with their pictures, see `PromptData.shown`.
    """

    def __init__(self, read: Callable[[Sequence[Prompt]], list[Document]]) -> None:
        self._read = read
        self._kept: dict[int, Document] = {}

    def forget(self) -> None:
        """Give back what was read."""
        self._kept.clear()

    def of(self, prompts: Sequence[Prompt], lengths: Sequence[int]) -> list[Sight | None]:
        """What each of them shows to a generator; None = nothing.

        Args:
            lengths: tokens of the text that begins with each prompt.

        Raises:
            ValueError: a picture is gone, or is another one than when the prompts became tokens.
        """
        return [
            None if seen is None else _sight(seen, length)
            for seen, length in zip(self._seen(prompts), lengths, strict=True)
        ]

    def shown(self, documents: Sequence[Document], prompts: Sequence[Prompt]) -> list[Document]:
        """Documents that begin with these prompts, with their pictures.

        Raises:
            ValueError: see `of`.
        """
        return [
            document if seen is None else _with_pictures(document, seen)
            for document, seen in zip(documents, self._seen(prompts), strict=True)
        ]

    def _seen(self, prompts: Sequence[Prompt]) -> list[Document | None]:
        new = {each.row: each for each in prompts if each.patches and each.row not in self._kept}
        if new:
            self._kept |= zip(new, self._read(list(new.values())), strict=True)
        return [self._kept[each.row] if each.patches else None for each in prompts]


def _sight(seen: Document, tokens: int) -> Sight:
    assert seen.pictures is not None, "a prompt with patches has pictures"
    rotary_3L = _longer(seen.rotary_3L, tokens)
    return Sight(seen.pictures, seen.features, None if rotary_3L is None else torch.from_numpy(rotary_3L))


def _with_pictures(document: Document, seen: Document) -> Document:
    rotary_3L = _longer(seen.rotary_3L, len(document.tokens_L))
    return dataclasses.replace(document, pictures=seen.pictures, features=seen.features, rotary_3L=rotary_3L)


def _longer(rotary_3L: np.ndarray | None, tokens: int) -> np.ndarray | None:
    """For a text of so many tokens that begins with the prompt: what follows counts on from the greatest there."""
    if rotary_3L is None:
        return None
    after = np.arange(tokens - rotary_3L.shape[1]) + rotary_3L.max() + 1
    return np.concatenate([rotary_3L, np.tile(after, (3, 1))], 1)
