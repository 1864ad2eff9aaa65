"""What the pools run for speculative decoding over tensor-parallel ranks."""

from __future__ import annotations

import dataclasses

from models import ModelConfig
from models.generation import Completion, DraftStats, Generator
from parallel.sharding import SINGLE
from tests import generation_cases, tp_cases


def texts(cfg: ModelConfig, pooled: bool, whole_draft: bool) -> tuple[list[Completion], DraftStats]:
    """Rows of all settings with a draft that lies on the ranks as the model does, or whole on each."""
    place = tp_cases.here() if pooled else SINGLE
    small = dataclasses.replace(cfg, num_layers=1)
    draft = generation_cases.decoder(small, SINGLE if whole_draft else place)
    generator = Generator(generation_cases.decoder(cfg, place), config=generation_cases.SMALL, draft=draft)
    return generator.generate(generation_cases.requests_of(cfg)), generator.draft_stats
