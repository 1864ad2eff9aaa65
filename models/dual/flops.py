"""Floating-point operations of text encoders; what a step needs of them is said in `models/flops.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from models.config import ModelConfig
from models.vision.config import PooledConfig
from models.vision.flops import Work


def text_work(cfg: ModelConfig, doc_lengths: Sequence[int], trains: Callable[[str], bool]) -> list[Work]:
    """What the text encoder of a CLIP or SigLIP computes on texts of `doc_lengths` tokens, layer after layer.

    CLIP's tokens see those before them; SigLIP's texts are all as long as `max_seq_len`, and seen whole.
    """
    dim, texts, length = cfg.hidden_size, len(doc_lengths), cfg.max_seq_len
    if cfg.family == "clip":
        tokens, pairs = sum(doc_lengths), sum(each * (each + 1) // 2 for each in doc_lengths)
    else:
        tokens, pairs = texts * length, texts * length**2
    weights, attention = 2.0 * tokens * dim * (4 * dim + 2 * cfg.intermediate_size), 4.0 * dim * pairs
    assert cfg.vision is not None and isinstance(cfg.vision.connector, PooledConfig)
    head = Work(2.0 * texts * dim * cfg.vision.connector.width, trained=trains("head."))
    embedding = Work(0.0, trained=trains("embed.weight"))
    layers = [Work(weights, attention, trained=trains(f"layers.{i}.")) for i in range(cfg.num_layers)]
    return [embedding, *layers, head]
