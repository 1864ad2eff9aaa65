"""What a stage that compares pictures with texts has to know before a step: the features of the whole global batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from data.batch import MicroBatch, Row
from parallel.features import Shares
from parallel.groups import Groups
from trainer.contrast import Compared, Pull, feature_gradients, of_all
from trainer.preparation import Scorer
from trainer.retrieval import Candidates, caption_keys
from trainer.stages.clip import Clip, PairBatch, pairs_of


@dataclass(frozen=True)
class Comparing:
    """Called with the micro-batches of a step (or of all that is held out) before it, by all ranks together: as
    many on each."""

    stage: Clip
    groups: Groups
    engine: Scorer

    def __call__(self, batches: Sequence[MicroBatch], rows: Sequence[Row] | None) -> list[PairBatch]:
        """The only micro-batch with what it needs to be compared as it is encoded; several are encoded here."""
        keys = [caption_keys(batch, pairs_of(batch)) for batch in batches]
        shares = Shares.of(sum(len(key_N) for key_N in keys), self.groups.data, self.groups.device)
        candidates = Candidates.of(shares.gather(torch.cat(keys)))
        if rows is not None and len(batches) == 1:
            return [PairBatch(batches[0], shares, candidates)]
        encoded = self.engine.score(batches, encode)
        features, scalars = [(each.image_NW, each.text_NW) for each in encoded], encoded[0][2:]
        assert all(len(image_NW) == len(key_N) for (image_NW, _), key_N in zip(features, keys, strict=True))
        features = [(image_NW, text_NW[: len(image_NW)]) for image_NW, text_NW in features]  # one fills up
        compared = features, scalars

        def ask(sides: Compared) -> list[torch.Tensor]:
            return self.stage.found(sides, candidates)

        pulls: Sequence[Pull | None] = [None] * len(batches)
        if rows is None:
            losses = [loss_N for (loss_N,) in of_all(lambda sides: [self.stage.loss_of(sides)], *compared, shares)]
        else:
            losses, pulls = feature_gradients(self.stage.loss_of, *compared, shares)
        terms = map(self.stage.terms, batches, losses, of_all(ask, *compared, shares))
        ready = zip(batches, pulls, terms, strict=True)
        return [PairBatch(batch, shares, pull=pull, terms_CK=each) for batch, pull, each in ready]


def encode(model: nn.Module, batch: MicroBatch, weight: float) -> tuple[None, Any]:
    """What the model makes of a micro-batch's pictures and texts, as the second of what a forward gives."""
    return None, model(**batch.inputs)
