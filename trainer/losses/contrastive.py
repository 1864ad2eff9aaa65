"""Losses of pictures and texts that are compared: each own pair against all pairs of the global batch.

Legend: N own pairs, M pairs of the global batch, W width of the common space. Own pair n is pair `first + n` of all.
Features have length 1; the similarity of picture i and text j is `scale * image_i @ text_j + bias`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F


@dataclass(frozen=True)
class Sides:
    """Pictures and texts of own pairs and of all, fp32."""

    image_NW: torch.Tensor
    text_NW: torch.Tensor
    image_MW: torch.Tensor
    text_MW: torch.Tensor
    first: int
    scale: torch.Tensor
    bias: torch.Tensor

    @property
    def own_N(self) -> torch.Tensor:
        """Which of all pairs the own ones are."""
        return torch.arange(self.first, self.first + len(self.image_NW), device=self.image_NW.device)


def info_nce(sides: Sides, label_smoothing: float = 0.0) -> torch.Tensor:
    """Loss of each own pair, [N]: cross-entropy of its text among all texts, and of its picture among all pictures,
    half of each. Of the smoothed labels a share is spread evenly over all M.

    Source: Radford et al. 2021, Learning Transferable Visual Models From Natural Language Supervision, figure 3.
    """

    def among_all(own_NW: torch.Tensor, other_MW: torch.Tensor) -> torch.Tensor:
        logits_NM = sides.scale * (own_NW @ other_MW.T) + sides.bias
        return F.cross_entropy(logits_NM, sides.own_N, reduction="none", label_smoothing=label_smoothing)

    return (among_all(sides.image_NW, sides.text_MW) + among_all(sides.text_NW, sides.image_MW)) / 2


def sigmoid(sides: Sides, label_smoothing: float = 0.0) -> torch.Tensor:
    """Loss of each own picture, [N]: for every text of the batch, whether it is the picture's own, summed over them.

    Source: Zhai et al. 2023, Sigmoid Loss for Language Image Pre-Training, algorithm 1.
    """
    assert not label_smoothing, "a label of this loss is yes or no"
    logits_NM = sides.scale * (sides.image_NW @ sides.text_MW.T) + sides.bias
    sign_NM = torch.full_like(logits_NM, -1.0).scatter_(1, sides.own_N[:, None], 1.0)
    return -F.logsigmoid(sign_NM * logits_NM).sum(1)


CONTRASTIVE: dict[str, Callable[[Sides, float], torch.Tensor]] = {"infonce": info_nce, "sigmoid": sigmoid}
