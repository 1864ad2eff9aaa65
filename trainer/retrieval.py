"""How well pictures and their captions find each other among all of a set.

A caption that stands with several pictures is right for each of them, and it is one candidate, however often it occurs.
Whatever is as near as the right one counts as found before it, so that vectors which are all alike find nothing.
Legend: N own pairs, M all pairs, U different captions, W width of the common space.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from data.batch import MicroBatch
from trainer.channels import Column

BEST = (1, 5)
"""Found among so many."""

FOUND = (
    *(Column(f"{side}@{best}", over="pairs") for side in ("caption", "picture") for best in BEST),
    *(Column(f"{side}_chance", over="pairs") for side in ("caption", "picture")),
)
"""Share of pictures that find their caption, of captions that find their picture, and what guessing finds @1."""


@dataclass(frozen=True)
class Candidates:
    """Which caption each pair has."""

    caption_M: torch.Tensor
    """int64: number of its caption, below U."""
    first_U: torch.Tensor
    """int64: the first pair that has it."""

    @staticmethod
    def of(key_M: torch.Tensor) -> Candidates:
        """From numbers that are the same for the same captions."""
        _, caption_M = key_M.unique(return_inverse=True)
        count = int(caption_M.max()) + 1 if len(key_M) else 0
        first_U = torch.full((count,), len(key_M), dtype=torch.int64, device=key_M.device)
        pair_M = torch.arange(len(key_M), device=key_M.device)
        return Candidates(caption_M, first_U.scatter_reduce_(0, caption_M, pair_M, "amin"))


def found(
    own: Sequence[torch.Tensor], everyone: Sequence[torch.Tensor], first: int, candidates: Candidates
) -> list[torch.Tensor]:
    """The columns `FOUND` of own pairs, fp32 [N] each.

    Args:
        own, everyone: pictures and texts, [N, W] and [M, W].
        first: own pair n is pair first + n of all.
    """
    (image_NW, text_NW), (image_MW, text_MW) = own, everyone
    mine_N = candidates.caption_M[first : first + len(image_NW)]
    near_NU = image_NW @ text_MW[candidates.first_U].T
    right_N = near_NU.gather(1, mine_N[:, None])
    before_N = (near_NU >= right_N).sum(1) - 1  # all that is as near, without itself
    near_NM, theirs_NM = text_NW @ image_MW.T, candidates.caption_M[None] == mine_N[:, None]
    right_N = near_NM.masked_fill(~theirs_NM, -torch.inf).amax(1, keepdim=True)
    ahead_N = ((near_NM >= right_N) & ~theirs_NM).sum(1)
    chances = (torch.full_like(right_N[:, 0], 1 / max(1, len(candidates.first_U))), theirs_NM.float().mean(1))
    return [(rank_N < best).float() for rank_N in (before_N, ahead_N) for best in BEST] + list(chances)


def caption_keys(batch: MicroBatch, pairs: int) -> torch.Tensor:
    """A number of each pair's caption, int64 [N] on the batch's device: the same for the same tokens."""
    borders = batch.cu_seqlens.tolist()
    tokens_T = batch.tokens_T.cpu().numpy()
    keys = [_key(tokens_T[borders[n] : borders[n + 1]]) for n in range(pairs)]
    return torch.tensor(keys, dtype=torch.int64, device=batch.tokens_T.device)


def _key(tokens_L: np.ndarray) -> int:
    return int.from_bytes(hashlib.blake2b(tokens_L.tobytes(), digest_size=8).digest(), "little", signed=True)
