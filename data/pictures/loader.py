"""From the notes of a cache to the pictures of a document."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from data.batch import Document
from data.cache_files import TokenCache
from data.documents import Sought
from data.pictures.errors import PictureError
from data.pictures.seen import patches_of_all, plan_of, rotary_of
from data.pictures.types import PictureConfig, Pictures, Plan


@dataclass(frozen=True)
class PictureLoader:
    """Reads pictures again, for training, as the cache found them."""

    cfg: PictureConfig
    max_pixels: int
    """Pixels of the largest picture that is decoded."""
    workers: int = 1
    """Threads that decode."""

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self.workers, "pictures")

    def __call__(self, documents: Sequence[Sought]) -> list[Document]:
        """All the documents with their pictures, see `with_pictures`."""
        return list(self._pool.map(lambda each: self.with_pictures(*each), documents))

    def with_pictures(self, document: Document, cache: TokenCache, sample: int, start: int) -> Document:
        """The document with the pictures among its tokens, which begin at token `start` of the sample.

        Raises:
            ValueError: a picture is gone, or is another one than when the cache was made.
        """
        length = len(document.tokens_L)
        records = cache.pictures.of(sample, start, start + length)
        seen = [cache.pictures.seen(record) for record in records]
        plans = [plan_of(each, self.cfg) for each in seen]
        at = [int(record["start"]) - start for record in records]
        if self.cfg.rotary:
            document = replace(document, rotary_3L=rotary_of(length, at, seen, plans, self.cfg))
        if not plans:
            return document
        try:
            patches = patches_of_all(seen, plans, self.cfg, self.max_pixels)
        except PictureError as err:
            raise ValueError(
                f"the {err}; it was well when its row was tokenised: remove the token cache {cache.folder} and start "
                "again to look at all rows anew"
            ) from err
        pictures, features = gathered(plans, patches, at, self.cfg)
        return replace(document, pictures=pictures, features=features)


def gathered(
    plans: Sequence[Plan], patches: Sequence[torch.Tensor], starts: Sequence[int], cfg: PictureConfig
) -> tuple[Pictures, int]:
    """The pictures of a document, whose tokens begin at `starts`, together; and how many features their tiles have."""
    features = [features_of(each, cfg) for each in plans]
    first = np.concatenate([[0], np.cumsum(features)])[:-1]
    order = [np.where(each.order_F < 0, each.order_F, each.order_F + n) for each, n in zip(plans, first, strict=True)]
    slots = [begin + each.slots_F for begin, each in zip(starts, plans, strict=True)]
    pictures = Pictures(
        torch.cat(list(patches)),
        tuple(grid for each in plans for grid in each.grids),
        torch.from_numpy(np.concatenate(slots)),
        torch.from_numpy(np.concatenate(order)),
    )
    return pictures, sum(features)


def features_of(planned: Plan, cfg: PictureConfig) -> int:
    """Features that the tiles of a picture have."""
    if cfg.per_tile is not None:
        return cfg.per_tile * len(planned.grids)
    return sum(rows * cols // cfg.block**2 + cfg.extra for rows, cols in planned.grids)
