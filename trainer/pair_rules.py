"""Which stages train a model that compares pictures with texts, and what such a run cannot have."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from trainer.problems import Problem

if TYPE_CHECKING:
    from trainer.config import RunConfig

FAMILIES = {"clip": ("clip", "siglip"), "qformer": ("bert",)}
"""Families of models that a stage trains; all others train decoders."""
SMALL = {"clip": "tiny_clip", "qformer": "tiny_blip2_itm"}
"""The smallest model of each, to show."""


def problems(cfg: RunConfig) -> list[Problem]:
    """What a pair of encoders, or a stage that trains one, does not go with."""
    return [*_stage(cfg), *(_pair(cfg) if cfg.model.compares else ())]


def _stage(cfg: RunConfig) -> Iterator[Problem]:
    stage, family = cfg.stage.name, cfg.model.family
    wanted = FAMILIES.get(stage)
    if wanted is not None and family not in wanted:
        reason = f"compares pictures with texts, and a model of model.family={family} does not do so its way"
        way = f"a model of family {' or '.join(wanted)} (such as model={SMALL[stage]})"
        yield Problem("stage.name", stage, reason, way)
    elif wanted is None and cfg.model.compares:
        mine = next((name for name, families in FAMILIES.items() if family in families), "clip")
        reason = f"is a pair of encoders that are compared, and stage.name={stage} needs a decoder"
        yield Problem("model.family", family, reason, f"stage={mine}, or a model with a decoder")


def _pair(cfg: RunConfig) -> Iterator[Problem]:
    if cfg.adapter is not None:
        reason = "is put on the layers of a decoder, and the model is a pair of encoders"
        yield Problem("adapter.name", cfg.adapter.name, reason, "adapter=none, or train parts only (optim.parts)")
    if cfg.parallel.sequence_parallel:
        reason = "cuts the rows between layers, and the texts of a pair of encoders are not cut"
        yield Problem("parallel.sequence_parallel", True, reason, "parallel.sequence_parallel=false")
    if cfg.stage.name in FAMILIES and 0 < cfg.data.global_batch_rows < 2:
        rows = cfg.data.global_batch_rows
        reason = "a row is a pair, and one alone has no other to be told from: its loss is 0"
        yield Problem("data.global_batch_rows", rows, reason, "data.global_batch_rows=64; the more the better")
    if cfg.model.family == "bert":
        yield from _qformer(cfg)


def _qformer(cfg: RunConfig) -> Iterator[Problem]:
    word, words = getattr(cfg.stage, "first_word", None), cfg.model.vocab_size
    if word is not None and word >= words:
        reason = f"is no word of the model, which has model.vocab_size={words}"
        yield Problem(
            "stage.first_word", word, reason, f"stage.first_word={words - 1}, or null for the tokenizer's own"
        )
    last = cfg.optim.parts.decoder.last_layers
    if last is not None:
        reason = "counts layers of a decoder, and the texts of a Q-Former share theirs with the queries (connector)"
        yield Problem("optim.parts.decoder.last_layers", last, reason, "optim.parts.decoder.last_layers=null")
