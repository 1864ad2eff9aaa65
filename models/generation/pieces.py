"""Who meets what in a step: neighbouring rows together, and prompts that several rows go on.

Keys and values of such a prompt are held once, beside the rows' slots, and read once a step: the queries of all its
rows meet it in one product, each row meets its own tokens by itself, and one softmax goes over both, so nothing is
approximated. Source: Juravsky et al. 2024 (Hydragen).

Legend: `B` rows of a piece; `N` prompts; `R` rows of the prompt that has most; `G` key/value heads; `L` query heads of
one; `C` places.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch


@dataclass(frozen=True)
class Common:
    """The prompts of a piece's rows: those numbered `start:stop`, of which the longest has `longest` tokens."""

    start: int
    stop: int
    longest: int
    mask: torch.Tensor | None
    """-inf where a prompt is shorter [N, 1, 1, longest]; None where none is."""
    most: int
    """R."""
    row_NR: torch.Tensor | None
    """The rows of each prompt one after another [N R], any row where there are fewer than R; None where that is their
    order."""
    place_B: torch.Tensor | None
    """Where each row stands there."""

    @staticmethod
    def of(prompt_B: Sequence[int], tokens: Sequence[int], device: torch.device) -> "Common":
        """Of rows that go on these prompts, of so many tokens each."""
        start, stop = min(prompt_B), max(prompt_B) + 1
        rows = [[row for row, own in enumerate(prompt_B) if own == prompt] for prompt in range(start, stop)]
        most, row_NR, place_B = max(map(len, rows)), None, None
        if [row for own in rows for row in own] != [*range(len(prompt_B))] or min(map(len, rows)) < most:
            flat = [row for own in rows for row in (*own, *[0] * (most - len(own)))]
            place = {row: number * most + i for number, own in enumerate(rows) for i, row in enumerate(own)}
            row_NR = torch.tensor(flat, device=device)
            place_B = torch.tensor([place[row] for row in range(len(prompt_B))], device=device)
        lengths = tokens[start:stop]
        mask = unseen_mask(lengths, device)
        return Common(start, stop, max(lengths), mask, most, row_NR, place_B)

    def gathered(self, x_BGLK: torch.Tensor) -> torch.Tensor:
        """What is of each row, [B, G, L, ...], for the rows of a prompt together [N, G, R L, ...]."""
        x = x_BGLK if self.row_NR is None else x_BGLK.index_select(0, self.row_NR)
        return x.unflatten(0, (-1, self.most)).transpose(1, 2).flatten(2, 3)

    def spread(self, x_NGM: torch.Tensor) -> torch.Tensor:
        """The way back: [B, G, L, ...], or where the rows stand in order [N, R, G, L, ...] without a copy."""
        x = x_NGM.unflatten(2, (self.most, -1)).transpose(1, 2)
        return x if self.place_B is None else x.flatten(0, 1).index_select(0, self.place_B)


@dataclass(frozen=True)
class Piece:
    """Rows `start:stop` against their first `longest` places; -inf in the mask [rows, 1, 1, longest] where a row has
    fewer, no mask where all have as many. All of them, or none, go on a prompt that is held apart."""

    start: int
    stop: int
    longest: int
    mask: torch.Tensor | None
    common: Common | None = None


def pieces_of(
    lengths: Sequence[int],
    device: torch.device,
    prompt_B: Sequence[int | None] | None = None,
    prompt_tokens: Sequence[int] = (),
) -> tuple[Piece, ...]:
    """Neighbouring rows together as long as the places that are looked at in vain stay few.

    Args:
        prompt_B: for each row the number of the prompt held apart that it goes on; None = none does.
        prompt_tokens: of each of those prompts.
    """
    cuts, prompts = {*_cuts(lengths)}, prompt_B or [None] * len(lengths)
    if prompt_tokens:
        cuts |= {*_cuts([0 if prompt is None else prompt_tokens[prompt] for prompt in prompts])}
        cuts |= {row for row, (a, b) in enumerate(pairwise(prompts), 1) if (a is None) is not (b is None)}
    pieces = []
    for start, stop in pairwise((*sorted(cuts), len(lengths))):
        own, theirs = lengths[start:stop], [prompt for prompt in prompts[start:stop] if prompt is not None]
        common = Common.of(theirs, prompt_tokens, device) if theirs else None
        pieces.append(Piece(start, stop, max(own), unseen_mask(own, device), common))
    return tuple(pieces)


def _cuts(lengths: Sequence[int]) -> list[int]:
    """The first row of each piece."""
    cuts, total, longest = [0], 0, 0
    for row, length in enumerate(lengths):
        total, longest = total + length, max(longest, length)
        if (row + 1 - cuts[-1]) * longest > 1.25 * total + 512:
            cuts, total, longest = [*cuts, row], length, length
    return cuts


def unseen_mask(lengths: Sequence[int], device: torch.device) -> torch.Tensor | None:
    """-inf at the places that a row of so many tokens does not have, else 0 [rows, 1, 1, longest]; None where all have
    as many."""
    longest = max(lengths)
    if min(lengths) == longest:
        return None
    unseen = torch.arange(longest, device=device) >= torch.tensor(lengths, device=device)[:, None]
    return torch.zeros(unseen.shape, device=device).masked_fill_(unseen, float("-inf"))[:, None, None]


def attend_both(
    q_BGLK: torch.Tensor,
    own_scores: torch.Tensor,
    own_values: torch.Tensor,
    common: Common,
    keys_NGCK: torch.Tensor,
    values_NGCV: torch.Tensor,
) -> torch.Tensor:
    """What queries find in their prompt and in their own tokens together [B, G, L, V]; fp32 softmax.

    Args:
        own_scores: of the queries against their row's own tokens, fp32 [B, G, L, tokens], masked.
        own_values: [B, G, tokens, V].
        keys_NGCK: of the prompts of `common`, as far as the longest goes; so are the values.
    """
    scores = torch.matmul(common.gathered(q_BGLK), keys_NGCK.transpose(-1, -2)).float()
    if common.mask is not None:
        scores += common.mask
    theirs = common.spread(scores)
    own_scores = own_scores.view(*theirs.shape[:-1], own_scores.shape[-1])
    weights = torch.cat([theirs, own_scores], -1).softmax(-1).to(own_values.dtype)
    if weights.dim() == 5:
        weights = weights.flatten(0, 1)
    found = torch.matmul(weights[..., common.longest :], own_values)
    theirs = common.spread(torch.matmul(common.gathered(weights[..., : common.longest]), values_NGCV))
    return found.view(theirs.shape).add_(theirs).view(found.shape)
