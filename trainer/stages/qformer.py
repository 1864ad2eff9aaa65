"""The first stage of a Q-Former: pictures and texts are compared, matched, and texts are written from pictures.

Source: Li et al. 2023, BLIP-2, section 3.2.
Legend: N pairs of a micro-batch, M pairs to match, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F

from data.batch import IGNORED, MicroBatch
from models.dual.qformer import Matches
from trainer.channels import Column, by_channel
from trainer.retrieval import FOUND
from trainer.stages.clip import pairs_of

Problem = tuple[str, object, str, str]


@dataclass(frozen=True)
class QFormerStageConfig:
    """The Q-Former's own first stage, on pictures with captions; needs a model of family bert."""

    name: Literal["qformer"] = "qformer"
    """Which training stage to run."""
    label_smoothing: float = 0.1
    """Of comparing and of writing: share of the probability that is spread evenly over all."""
    first_word: int | None = None
    """Id of the token that stands in place of a text's first one where texts are written (the published models added
    one to BERT's vocabulary); null: the first one stays."""

    @property
    def learns_from(self) -> Literal["captions"]:
        """The kind of data."""
        return "captions"

    def problems(self) -> list[Problem]:
        """Values wrong in themselves, as (key, value, reason, way out)."""
        found: list[Problem] = []
        if not 0 <= self.label_smoothing < 1:
            reason = "is a share: at least 0 and below 1"
            found.append(("stage.label_smoothing", self.label_smoothing, reason, "stage.label_smoothing=0.1"))
        if self.first_word is not None and self.first_word < 0:
            reason = "is the id of a token"
            found.append(("stage.first_word", self.first_word, reason, "stage.first_word=null"))
        return found


@dataclass(frozen=True)
class Matched:
    """A micro-batch with what is known of the whole global batch."""

    batch: MicroBatch
    matches: Matches
    label_M: torch.Tensor
    """int64: whether they belong together; -100 for one that is there only so that every rank runs the same."""
    channel_M: torch.Tensor
    features_BSD: torch.Tensor | None
    """What the tower gave in the first pass, where it is frozen."""
    compared_N: torch.Tensor
    """fp32: the loss of comparing each pair with all others."""
    found_KN: torch.Tensor
    """The columns `trainer.retrieval.FOUND` among the whole global batch, or among all that is held out."""
    gradient: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None
    """Of the summed loss of comparing, in what the model says of these pictures [N, Q, P] and texts [N, P], and this
    micro-batch's share of that in the scale; None where nothing is learnt."""
    pairs_a_match: float
    pairs_a_word: float
    """Pairs of the global batch by matches, and by words to write."""


class QFormerStage:
    """Three losses of one model, see ``trainer.matching`` for what comes before the step.

    Args:
        cfg: the stage section.
        num_channels: number of channels of the run.
    """

    contract = (
        "loss = comparing + matching + writing: each picture and text against all others of the global batch, pairs\n"
        "       and hard negatives told apart, the words of a text from its picture and those before;\n"
        "       means over pairs, matches and words of the whole global batch: all ranks, all micro-batches."
    )
    columns = (
        Column("loss", over="pairs"),
        Column("compare", over="pairs"),
        Column("match", over="matches"),
        Column("write", over="words"),
        Column("match_right", over="matches"),
        *FOUND,
        Column("pairs"),
        Column("matches"),
        Column("words"),
    )

    def __init__(self, cfg: QFormerStageConfig, num_channels: int):
        self.cfg, self.num_channels = cfg, num_channels

    def count(self, micro_batches: Sequence[MicroBatch]) -> float:
        """This rank's share of the pairs."""
        return float(sum(pairs_of(batch) for batch in micro_batches))

    def forward(self, model: nn.Module, batch: Matched, weight: float) -> tuple[torch.Tensor, torch.Tensor]:
        """``weight`` times the summed loss of one micro-batch, whose gradient is exact while the value of comparing is
        not in it, and its columns by channel."""
        inner, words = batch.batch, batch.batch.targets_T != IGNORED
        read: Any = model(
            **inner.inputs,
            features_BSD=batch.features_BSD,
            targets_T=inner.targets_T,
            smoothing=self.cfg.label_smoothing,
            first_word=self.cfg.first_word,
            matches=batch.matches,
        )
        match_M = F.cross_entropy(read.matched_M2, batch.label_M, reduction="none", ignore_index=IGNORED)
        write_T = read.written_T
        loss = batch.pairs_a_match * match_M.sum() + batch.pairs_a_word * write_T.sum()
        if batch.gradient is not None:
            given = read.image_NQP, read.text_NP, read.scale
            loss = loss + sum((x * g).sum() for x, g in zip(given, batch.gradient, strict=True))
        return weight * loss, self._terms(batch, match_M, read.matched_M2, write_T, words)

    def _terms(
        self,
        batch: Matched,
        match_M: torch.Tensor,
        matched_M2: torch.Tensor,
        write_T: torch.Tensor,
        words: torch.Tensor,
    ) -> torch.Tensor:
        """What is counted by pairs, by matches and by words, as columns."""
        inner, compared_N = batch.batch, batch.compared_N
        matches = batch.label_M != IGNORED
        pairs = {"loss": compared_N, "compare": compared_N, "pairs": torch.ones_like(compared_N)}
        pairs |= {column.name: told_N for column, told_N in zip(FOUND, batch.found_KN, strict=True)}
        right_M = matched_M2.argmax(1) == batch.label_M
        tried = {"loss": match_M * batch.pairs_a_match, "match": match_M, "match_right": right_M, "matches": matches}
        written = {"loss": write_T * batch.pairs_a_word, "write": write_T, "words": words}
        channels = inner.doc_channel_N[: pairs_of(inner)], batch.channel_M, inner.channel_T
        whole_CK = torch.zeros(self.num_channels, len(self.columns), dtype=torch.float64, device=match_M.device)
        for named, channel in zip((pairs, tried, written), channels, strict=True):
            nothing = torch.zeros(len(channel), device=match_M.device)
            terms = [named.get(column.name, nothing) for column in self.columns]
            whole_CK += by_channel(terms, channel, self.num_channels)
        return whole_CK
