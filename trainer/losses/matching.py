"""What a Q-Former's first stage makes of the similarities of a global batch: the loss of comparing, hard negatives, and
which partners are found.

Source: Li et al. 2021, ALBEF, sections 3.2 and 3.3; Li et al. 2023, BLIP-2, section 3.2.
Legend: N pairs of the whole global batch, Q queries of a picture, P width of the space they are compared in.
"""

from __future__ import annotations

import hashlib

import torch
from torch.nn import functional as F

from parallel.dropout import mixed
from trainer.retrieval import BEST, Candidates

AT_ONCE = 2**24
"""Products of a query and a text that exist at one time."""
LEAST = 1e-4
"""What the chance of every other text is raised by, as in ALBEF's code: a similarity of nothing is drawn too."""
_ODD = -0x61C8864680B583EB


def similarities(image_NQP: torch.Tensor, text_NP: torch.Tensor) -> torch.Tensor:
    """What the best query of each picture says of each text, [N, N]; differentiable."""
    at_once = max(1, AT_ONCE // max(1, image_NQP.shape[1] * len(text_NP)))
    parts = [(part @ text_NP.t()).max(1).values for part in image_NQP.split(at_once)]
    return torch.cat(parts) if parts else image_NQP.new_zeros(0, 0)


def comparing(logits_NN: torch.Tensor, smoothing: float) -> torch.Tensor:
    """The contrastive loss of each pair, [N]: the mean of finding its text among all and its picture among all."""
    own_N = torch.arange(len(logits_NN), device=logits_NN.device)
    both = [F.cross_entropy(x, own_N, reduction="none", label_smoothing=smoothing) for x in (logits_NN, logits_NN.t())]
    return (both[0] + both[1]) / 2


def picture_keys(patches_PX: torch.Tensor, pictures: int) -> torch.Tensor:
    """int64 [N]: what tells equally large pictures apart by their bits, wherever they are."""
    bits = patches_PX.contiguous().view(torch.int32).long().view(pictures, -1)
    places = torch.arange(1, bits.shape[1] + 1, device=bits.device) * _ODD
    return mixed(mixed(bits ^ places).sum(1))


def same_pairs(caption_N: torch.Tensor, picture_N: torch.Tensor) -> torch.Tensor:
    """bool [N, N]: text j is as good as its own for picture i: the same words, or the same picture's."""
    return (caption_N[:, None] == caption_N) | (picture_N[:, None] == picture_N)


def hard_negatives(logits_NN: torch.Tensor, same_NN: torch.Tensor, key_N: torch.Tensor, counter: str) -> torch.Tensor:
    """For each row another column that is hard to tell from its own, int64 [N]; -1 where there is none.

    Drawn in proportion to the softmax of a row, by the largest of logarithms with Gumbel noise. The noise of two pairs
    follows from the pairs themselves and the counter, so that the order in which they stand does not matter.

    Args:
        same_NN: what must not be drawn.
        key_N: what tells the pairs apart.
        counter: what tells this draw from others: seed, step, direction.
    """
    base = int.from_bytes(hashlib.sha256(counter.encode()).digest()[:8], "big", signed=True)
    hashes = mixed(mixed(key_N ^ base)[:, None] + mixed(key_N * _ODD)[None])
    uniform = ((hashes >> 11) & (2**53 - 1)).double().add_(0.5).mul_(2.0**-53)
    chance = torch.softmax(logits_NN.double(), 1) + LEAST
    score_NN = (chance.log() - torch.log(-uniform.log())).masked_fill_(same_NN, -torch.inf)
    drawn_N = score_NN.argmax(1)
    return torch.where(same_NN.all(1), -1, drawn_N)


def found(logits_NN: torch.Tensor, candidates: Candidates) -> list[torch.Tensor]:
    """The columns `trainer.retrieval.FOUND` of every pair, fp32 [N] each, from what each picture says of each text.

    A caption is one candidate, however often it occurs; what is as near as the right one counts as found before it.
    """
    mine_N, texts_U = candidates.caption_M, candidates.first_U
    near_NU, near_NN = logits_NN[:, texts_U], logits_NN.t()
    caption_N = (near_NU >= near_NU.gather(1, mine_N[:, None])).sum(1) - 1
    right_NN = mine_N[:, None] == mine_N
    best_N1 = near_NN.masked_fill(~right_NN, -torch.inf).amax(1, keepdim=True)
    picture_N = ((near_NN >= best_N1) & ~right_NN).sum(1)
    chances = (torch.full_like(logits_NN[:, 0], 1 / max(1, len(texts_U))), right_NN.float().mean(1))
    return [(rank_N < best).float() for rank_N in (caption_N, picture_N) for best in BEST] + list(chances)
