"""Pictures of what is asked: found in a row as in training data, and put among the tokens of its prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from data.formats import Row, RowError
from data.pictures.errors import PictureError
from data.pictures.load import MAX_PIXELS
from data.pictures.loader import gathered
from data.pictures.looking import look_at
from data.pictures.notes import Seen
from data.pictures.rows import MARK
from data.pictures.seen import patches_of_all, plan_of, rotary_of
from data.pictures.types import PictureConfig
from data.tokenizer import add_special
from models.config import ModelConfig
from models.generation import Sight
from trainer.pictures import picture_config


@dataclass(frozen=True)
class Eyes:
    """What a model makes of pictures; one that sees none refuses rows that have some."""

    cfg: PictureConfig | None = None
    token_ids: tuple[int, ...] = ()
    """Of the tokens that stand for a feature."""
    max_pixels: int = MAX_PIXELS
    """Of a picture that is decoded."""

    @staticmethod
    def of(model: ModelConfig, tokenizer: Any) -> Eyes:
        """Those of a model; its tokens for pictures and videos become the tokenizer's, as in training.

        Raises:
            ValueError: the model has no such token.
        """
        cfg = picture_config(model)
        if cfg is None:
            return BLIND
        for text in cfg.tokens:
            add_special(tokenizer, text)
        token_ids = tuple(tokenizer.convert_tokens_to_ids(text) for text in cfg.tokens)
        for text, token_id in zip(cfg.tokens, token_ids, strict=True):
            if not 0 <= token_id < model.vocab_size:
                raise ValueError(
                    f"the token {text!r}, which stands for pictures, has the id {token_id} in the tokenizer and the "
                    f"model knows {model.vocab_size} tokens: it belongs to another model; name the right one"
                )
        return Eyes(cfg, token_ids)

    def look(self, row: Row, folder: str) -> tuple[Row, tuple[Seen, ...]]:
        """The row with the model's own text in the places of pictures, and its pictures as far as their size.

        Args:
            folder: what relative paths start from.

        Raises:
            RowError: a picture cannot be used, or the model sees none.
        """
        row, seen, _ = look_at(row, folder, self.cfg, self.max_pixels)
        return row, seen

    def shown(self, tokens: Sequence[int], seen: Sequence[Seen]) -> tuple[list[int], Sight | None]:
        """A prompt's tokens with as many for each picture as it has features, and what they show.

        Raises:
            RowError: a picture cannot be read, or there are more or fewer places than pictures.
        """
        if self.cfg is None:
            assert not seen, "refused when they were looked at"
            return list(tokens), None
        places = [place for place, token in enumerate(tokens) if token in self.token_ids]
        if len(places) != len(seen):
            raise RowError(
                f"the text has {len(places)} places for pictures ({MARK}), but there are {len(seen)} pictures"
            )
        if not seen:
            return list(tokens), None
        plans = [plan_of(each, self.cfg) for each in seen]
        times = np.ones(len(tokens), dtype=np.int64)
        times[places] = [each.tokens for each in plans]
        starts = (np.cumsum(times) - times)[places].tolist()
        long = np.repeat(np.array(tokens, dtype=np.int64), times).tolist()
        try:
            patches = patches_of_all(seen, plans, self.cfg, self.max_pixels)
        except PictureError as error:
            raise RowError(str(error)) from error
        pictures, features = gathered(plans, patches, starts, self.cfg)
        rotary = None
        if self.cfg.rotary:
            rotary = torch.from_numpy(rotary_of(len(long), starts, seen, plans, self.cfg))
        return long, Sight(pictures, features, rotary)


BLIND = Eyes()
