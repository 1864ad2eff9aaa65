"""Pictures and texts that are compared: each picture shall be nearest to its own text among all of the global batch.

Legend: N pairs of a micro-batch, M of the global batch, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from data.batch import MicroBatch
from parallel.features import Shares
from trainer.channels import Column, by_channel
from trainer.contrast import Compared, Pull, compared
from trainer.losses.contrastive import CONTRASTIVE, Sides
from trainer.retrieval import FOUND, Candidates, found

Problem = tuple[str, object, str, str]


@dataclass(frozen=True)
class ClipConfig:
    """Two encoders, of pictures and of texts, from pairs of them; needs such a model (model.family=clip or siglip)."""

    name: Literal["clip"] = "clip"
    """Which training stage to run."""
    loss: Literal["infonce", "sigmoid"] = "infonce"
    """infonce: a picture's text among all texts, and the other way round (CLIP); sigmoid: of every picture and every
    text whether they belong together (SigLIP)."""
    label_smoothing: float = 0.0
    """infonce: share of each label that is spread over all pairs of the batch."""

    @property
    def learns_from(self) -> Literal["captions"]:
        """The kind of data."""
        return "captions"

    def problems(self) -> list[Problem]:
        """Values wrong in themselves, as (key, value, reason, way out)."""
        key, value = "stage.label_smoothing", self.label_smoothing
        if not 0 <= value < 1:
            return [(key, value, "is a share of each label: at least 0 and below 1", f"{key}=0.1")]
        if value and self.loss == "sigmoid":
            return [(key, value, "has no meaning for stage.loss=sigmoid, whose labels are yes or no", f"{key}=0")]
        return []


@dataclass(frozen=True)
class PairBatch:
    """A micro-batch and what the whole global batch says of it."""

    batch: MicroBatch
    shares: Shares
    """Pairs of all ranks."""
    candidates: Candidates | None = None
    """Captions of all ranks, where this is the only micro-batch: it is compared as it is encoded."""
    pull: Pull | None = None
    """Where there are several: the gradient of its features."""
    terms_CK: torch.Tensor | None = None
    """What is reported of it, where that is known before the step."""


class Clip:
    """InfoNCE or sigmoid loss over the whole global batch. What it is given is made by `trainer.comparing`.

    Args:
        cfg: the stage section.
        num_channels: number of channels of the run.
    """

    columns = (Column("loss", over="pairs"), *FOUND, Column("pairs"))

    def __init__(self, cfg: ClipConfig, num_channels: int):
        self.cfg, self.num_channels = cfg, num_channels
        loss = {
            "infonce": "-log p(its text | all texts) / 2 - log p(its picture | all pictures) / 2",
            "sigmoid": "-log sigmoid(+-similarity) to its own text and to each other one",
        }[cfg.loss]
        self.contract = (
            f"loss = sum over pairs of {loss} / number of pairs,\n"
            "       compared with and counted over the whole global batch: all ranks, all micro-batches. What is held\n"
            "       out is compared with all of it; a caption of several pictures is right for each of them."
        )

    def count(self, micro_batches: Sequence[MicroBatch]) -> float:
        """This rank's share of the loss's denominator: its pairs."""
        return float(sum(pairs_of(batch) for batch in micro_batches))

    def forward(self, model: nn.Module, batch: Any, weight: float) -> tuple[torch.Tensor, torch.Tensor]:
        """`weight` times the summed loss of one micro-batch (or a stand-in with its gradient), and what is reported.

        Args:
            batch: a PairBatch.
        """
        assert isinstance(batch, PairBatch)
        if batch.pull is None and batch.terms_CK is not None:
            return torch.zeros(()), batch.terms_CK
        encoded = model(**batch.batch.inputs)
        features, scalars = (encoded.image_NW, encoded.text_NW), (encoded.scale, encoded.bias)
        if batch.pull is not None:
            assert batch.terms_CK is not None
            return weight * batch.pull.stand_in(features, scalars), batch.terms_CK
        assert batch.candidates is not None
        sides = compared(features, scalars, batch.shares)
        loss_N = self.loss_of(sides)
        return weight * loss_N.sum(), self.terms(batch.batch, loss_N, self.found(sides, batch.candidates))

    def loss_of(self, sides: Compared) -> torch.Tensor:
        """The loss of each own pair, [N]."""
        (image_NW, text_NW), (image_MW, text_MW), (scale, bias) = sides.own, sides.everyone, sides.scalars
        given = Sides(image_NW, text_NW, image_MW, text_MW, sides.first, scale, bias)
        return CONTRASTIVE[self.cfg.loss](given, self.cfg.label_smoothing)

    @torch.no_grad()
    def found(self, sides: Compared, candidates: Candidates) -> list[torch.Tensor]:
        """The columns `FOUND` of each own pair, [N] each."""
        return found(sides.own, sides.everyone, sides.first, candidates)

    def terms(self, batch: MicroBatch, loss_N: torch.Tensor, found_N: Sequence[torch.Tensor]) -> torch.Tensor:
        """Columns by channel, float64 [C, K]."""
        channel_N = batch.doc_channel_N[: len(loss_N)]
        return by_channel((loss_N, *found_N, torch.ones_like(loss_N)), channel_N, self.num_channels)


def pairs_of(batch: MicroBatch) -> int:
    """Pictures with their texts; none in what fills up."""
    return 0 if batch.pictures is None else len(batch.pictures.grids)
