"""Pictures of what is asked: found in a row as in training data, and put among the tokens of its prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from data.formats import Row, RowError
from data.pictures.errors import PictureError
from data.pictures.geometry import plan
from data.pictures.load import MAX_PIXELS, load
from data.pictures.loader import gathered
from data.pictures.looking import look_at
from data.pictures.notes import Seen
from data.pictures.patches import patches_of
from data.pictures.positions import rotary_positions
from data.pictures.rows import MARK
from data.pictures.types import PictureConfig
from data.tokenizer import add_special
from models.config import ModelConfig
from models.generation import Sight
from trainer.pictures import picture_config


@dataclass(frozen=True)
class Eyes:
    """What a model makes of pictures; one that sees none refuses rows that have some."""

    cfg: PictureConfig | None = None
    token_id: int | None = None
    """Of the token that stands for a feature."""
    max_pixels: int = MAX_PIXELS
    """Of a picture that is decoded."""

    @staticmethod
    def of(model: ModelConfig, tokenizer: Any) -> Eyes:
        """Those of a model; its token for pictures becomes one of the tokenizer's, as in training.

        Raises:
            ValueError: the model has no such token.
        """
        cfg = picture_config(model)
        if cfg is None:
            return BLIND
        add_special(tokenizer, cfg.token)
        token_id = tokenizer.convert_tokens_to_ids(cfg.token)
        if not 0 <= token_id < model.vocab_size:
            raise ValueError(
                f"the token {cfg.token!r}, which stands for pictures, has the id {token_id} in the tokenizer and the "
                f"model knows {model.vocab_size} tokens: it belongs to another model; name the right one"
            )
        return Eyes(cfg, token_id)

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
        places = [place for place, token in enumerate(tokens) if token == self.token_id]
        if len(places) != len(seen):
            raise RowError(
                f"the text has {len(places)} places for pictures ({MARK}), but there are {len(seen)} pictures"
            )
        if not seen:
            return list(tokens), None
        plans = [plan(each.width, each.height, self.cfg) for each in seen]
        times = np.ones(len(tokens), dtype=np.int64)
        times[places] = [each.tokens for each in plans]
        starts = (np.cumsum(times) - times)[places].tolist()
        long = np.repeat(np.array(tokens, dtype=np.int64), times).tolist()
        patches = [self._patches(each, planned) for each, planned in zip(seen, plans, strict=True)]
        pictures, features = gathered(plans, patches, starts, self.cfg)
        rotary = None
        if self.cfg.rotary:
            shapes = [(at, each.shape) for at, each in zip(starts, plans, strict=True)]
            rotary = torch.from_numpy(rotary_positions(len(long), shapes))
        return long, Sight(pictures, features, rotary)

    def _patches(self, seen: Seen, planned: Any) -> torch.Tensor:
        assert self.cfg is not None
        where = seen.where
        try:
            image = load(where.content if where.content is not None else where.path or "", self.max_pixels)
            return patches_of(image, planned, self.cfg)
        except PictureError as error:
            raise RowError(f"picture {where}: {error}") from error


BLIND = Eyes()
