"""Floating-point operations of text encoders, also of a Q-Former; what a step needs is said in `models/flops.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from models.config import ModelConfig
from models.vision.config import PooledConfig, QFormerConfig
from models.vision.flops import Work


def text_work(cfg: ModelConfig, doc_lengths: Sequence[int], trains: Callable[[str], bool]) -> list[Work]:
    """What the text encoder of a CLIP or SigLIP computes on texts of `doc_lengths` tokens, layer after layer.

    CLIP's tokens see those before them; SigLIP's texts are all as long as `max_seq_len`, and seen whole.
    """
    assert cfg.vision is not None
    connector = cfg.vision.connector
    if isinstance(connector, QFormerConfig):
        return _first_stage(cfg, connector, doc_lengths, trains)
    assert isinstance(connector, PooledConfig)
    dim, texts, length = cfg.hidden_size, len(doc_lengths), cfg.max_seq_len
    if cfg.family == "clip":
        tokens, pairs = sum(doc_lengths), sum(each * (each + 1) // 2 for each in doc_lengths)
    else:
        tokens, pairs = texts * length, texts * length**2
    weights, attention = 2.0 * tokens * dim * (4 * dim + 2 * cfg.intermediate_size), 4.0 * dim * pairs
    head = Work(2.0 * texts * dim * connector.width, trained=trains("head."))
    embedding = Work(0.0, trained=trains("embed.weight"))
    layers = [Work(weights, attention, trained=trains(f"layers.{i}.")) for i in range(cfg.num_layers)]
    return [embedding, *layers, head]


def _first_stage(
    cfg: ModelConfig, own: QFormerConfig, doc_lengths: Sequence[int], trains: Callable[[str], bool]
) -> list[Work]:
    """What a Q-Former's first stage computes besides reading the pictures once: each text to be compared, to be written
    behind its picture's queries, and to be matched; each pair and two that do not belong together are matched."""
    assert cfg.vision is not None
    width, queries, texts, tokens = own.hidden_size, own.queries, len(doc_lengths), sum(doc_lengths)
    tower, matches = cfg.vision.tower, 3 * texts
    features = tower.grid**2 + int(tower.has_class and tower.keep_class)
    rows = 5 * tokens + matches * queries
    layer = 2.0 * rows * width * (4 * width + 2 * own.intermediate_size)
    pairs = sum(n * n + n * (n + 1) // 2 + n * queries + 3 * (n + queries) ** 2 for n in doc_lengths)
    reading = -(-own.num_layers // own.cross_every)  # the features' keys and values are those that were read before
    cross = Work(4.0 * matches * queries * width**2, 4.0 * width * matches * queries * features)
    weights = own.num_layers * layer + reading * cross.weights
    attention = own.num_layers * 4.0 * width * pairs + reading * cross.attention
    head = 2.0 * tokens * width * (width + cfg.vocab_size) + 2.0 * texts * width * own.width
    return [Work(weights, attention, trained=trains("connector.")), Work(head, trained=trains("text."))]
