"""The one door to a model of any kind."""

from __future__ import annotations

from typing import Any

import torch

from models import decoder
from models.config import ModelConfig, Runtime
from models.decoder import PLAIN, Chunk, Decoder
from models.dual.encoder import DualEncoder
from models.dual.qformer import QFormerPair
from parallel.sharding import SINGLE, Place

Model = Decoder | DualEncoder | QFormerPair


def build(cfg: ModelConfig, place: Place = SINGLE, runtime: Runtime = PLAIN, chunk: Chunk | None = None) -> Any:
    """A model on the meta device: names, shapes and records of every parameter, no memory.

    Returns:
        A `Model`: whoever asks knows by the config which, and what must have a decoder calls `models.decoder.build`.
    """
    if not cfg.compares:
        return decoder.build(cfg, place, runtime, chunk)
    assert chunk is None or chunk == Chunk.whole(cfg), "a model that compares is no pipeline"
    with torch.device("meta"):
        return (QFormerPair if cfg.family == "bert" else DualEncoder)(cfg, place, runtime)
