"""What a prompt shows beside its tokens: pictures, whose features stand in the places of some of them or are read by
layers of their own.

Legend: `F` tokens that stand for a feature; `P` patches; `X` numbers of a patch; `L` tokens of the prompt, or rows
with virtual ones; `T` tokens of all prompts that are run together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from models.config import ModelConfig
from models.decoder import Decoder
from models.vision.eyes import Pictures, read, see
from models.vision.gated import Reading


@dataclass(frozen=True, eq=False)
class Sight:
    """The pictures of one prompt."""

    pictures: Pictures
    """Slots count from the prompt's first token, features from the first of its own."""
    features: int
    """How many its tiles have."""
    rotary_3L: torch.Tensor | None = None
    """int64 [3, L]: time, row and column of each token, for models with `rope.sections`."""

    @property
    def shift(self) -> int:
        """What is added to the place of a later token to have its position: pictures have their own."""
        if self.rotary_3L is None:
            return 0
        return int(self.rotary_3L.max()) + 1 - self.rotary_3L.shape[1]

    def identity(self) -> str:
        """The same for the same pictures in the same places."""
        own = self.pictures
        made = hashlib.blake2b(repr((own.grids, self.features)).encode(), digest_size=16)
        for tensor in (own.patches_PX, own.slots_F, own.order_F, self.rotary_3L):
            if tensor is not None:
                made.update(tensor.cpu().contiguous().numpy().tobytes())
        return made.hexdigest()

    def problem(self, tokens: int, cfg: ModelConfig) -> str:
        """Why a prompt of so many tokens cannot be run with it; empty if it can."""
        if cfg.vision is None:
            return "the prompt has pictures, but the model sees none (model.vision=null); ask without them"
        own = self.pictures
        if len(own.slots_F) and not 0 <= int(own.slots_F.min()) <= int(own.slots_F.max()) < tokens:
            return f"the pictures stand at tokens {own.slots_F.min()} to {own.slots_F.max()} of a prompt of {tokens}"
        if cfg.rope.sections and (self.rotary_3L is None or self.rotary_3L.shape != (3, tokens)):
            return "the model turns tokens by time, row and column (rope.sections): give rotary_3L of every token"
        return ""

    def shows(self, other: Sight) -> bool:
        """Whether its pictures are those of `other`, in the same places."""
        mine, theirs = self.pictures, other.pictures
        return (
            mine.grids == theirs.grids
            and torch.equal(mine.slots_F, theirs.slots_F)
            and torch.equal(mine.order_F, theirs.order_F)
            and torch.equal(mine.patches_PX, theirs.patches_PX)
        )


@dataclass(frozen=True)
class _Joined:
    """The pictures of several prompts, see `Pictures`."""

    patches_PX: torch.Tensor
    grids: tuple[tuple[int, int], ...]
    slots_F: torch.Tensor
    order_F: torch.Tensor


def looked(
    model: Decoder,
    hidden_LD: torch.Tensor,
    sights: Sequence[Sight | None],
    starts: Sequence[int],
    borders: Sequence[int],
    own_T: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Reading | None]:
    """Embedded prompts with features in their places, after one look at all pictures; the rest stays as it is. Where
    layers of their own read features, those beside it.

    Args:
        starts: where each prompt begins among the tokens of all.
        borders: of the prompts among the rows.
        own_T: the rows of those tokens, where virtual ones stand between them.
    """
    showing = [(sight, start) for sight, start in zip(sights, starts, strict=True) if sight is not None]
    if not showing:
        return hidden_LD, None
    vision = model.cfg.vision
    assert vision is not None and model.vision is not None and model.connector is not None, "a model that sees"
    joined = _joined(showing, hidden_LD, own_T)
    if vision.cross is not None:
        return hidden_LD, read(hidden_LD, model.vision, model.connector, joined, vision, borders)
    return see(hidden_LD, model.vision, model.connector, joined, vision, model.place), None


def _joined(showing: Sequence[tuple[Sight, int]], like: torch.Tensor, own_T: torch.Tensor | None) -> _Joined:
    order, slots, first = [], [], 0
    for sight, start in showing:
        own_F = sight.pictures.order_F
        order.append(torch.where(own_F < 0, own_F, own_F + first))
        slots.append(sight.pictures.slots_F + start)
        first += sight.features
    slots_F = torch.cat(slots).to(like.device)
    return _Joined(
        torch.cat([sight.pictures.patches_PX for sight, _ in showing]).to(like),
        tuple(grid for sight, _ in showing for grid in sight.pictures.grids),
        slots_F if own_T is None else own_T[slots_F],
        torch.cat(order).to(like.device),
    )


def turned_by(
    sights: Sequence[Sight | None], lengths: Sequence[int], cfg: ModelConfig, device: torch.device
) -> torch.Tensor | None:
    """Time, row and column of every token of the prompts, int64 [3, T]; None where they are plain positions."""
    if not cfg.rope.sections or all(sight is None for sight in sights):
        return None
    parts = []
    for sight, length in zip(sights, lengths, strict=True):
        own = None if sight is None else sight.rotary_3L
        parts.append(torch.arange(length).repeat(3, 1) if own is None else own)
    return torch.cat(parts, 1).to(device)
