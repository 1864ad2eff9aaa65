"""Floating-point operations a training step needs, for FLOP/s and MFU.

Counted are matrix products only: 2 per multiply-add, and twice the forward for the backward. Work that is done again
(recompute) and work that is saved (unsupervised tokens skip the head) count as what the step needs, not what it ran.
What is frozen needs no gradients of its weights, and no backward at all where nothing before it is trained.
Sources: Chowdhery et al. 2022 (PaLM), appendix B; attention by document length and causal, as the kernels compute it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

from models.config import ModelConfig
from models.dual.flops import text_work
from models.vision.flops import Grids, Work, gated_work, vision_work

EMBEDDING = "embed.weight"


def matmul_params(cfg: ModelConfig) -> int:
    """Weights a token is multiplied with: all linear layers, without embedding, norms, biases and head. Of the experts
    those it goes to (drops are not known beforehand) and the shared one, and the router."""
    return sum(layer_matmul_params(cfg, layer) for layer in range(cfg.num_layers))


def layer_matmul_params(cfg: ModelConfig, layer: int) -> int:
    """`matmul_params` of one layer."""
    moe, hidden = cfg.moe, cfg.hidden_size
    if moe is None or not cfg.is_moe(layer):
        return _attention_params(cfg) + 3 * hidden * cfg.intermediate_size
    routed = 3 * hidden * moe.expert_size * moe.top_k + hidden * moe.num_experts
    return _attention_params(cfg) + routed + 3 * hidden * moe.shared_size + (hidden if moe.shared_gate else 0)


def _attention_params(cfg: ModelConfig) -> int:
    hidden, heads, mla = cfg.hidden_size, cfg.num_heads, cfg.mla
    if mla is None:
        q, k, v = cfg.qkv_parts
        return hidden * (q + k + v) + q * hidden
    queries = heads * cfg.head_dim
    q = hidden * queries if mla.q_rank is None else mla.q_rank * (hidden + queries)
    kv = hidden * (mla.kv_rank + mla.rope_dim) + mla.kv_rank * heads * (mla.nope_dim + mla.value_dim)
    return q + kv + heads * mla.value_dim * hidden


def attended_pairs(length: int, window: int | None) -> int:
    """Query-key pairs of one causal document: query i (from 0) sees min(i + 1, window) keys."""
    reach = length if window is None else min(window, length)
    return reach * (reach + 1) // 2 + (length - reach) * reach


def step_flops(
    cfg: ModelConfig,
    doc_lengths: Sequence[int],
    supervised_tokens: int,
    grids: Grids = (),
    trains: Callable[[str], bool] | None = None,
) -> float:
    """Forward and backward over documents of `doc_lengths` tokens, of which `supervised_tokens` reach the head.

    = 6 N T  +  6 V D S  +  6 H (K + K') sum of query-key pairs over layers and documents
    (a pair costs 2 K for the score and 2 K' for the value per query head, K' the value's head size, times 3 with the
    backward), and the same of tower and connector, whose patches see all of their tile or window.

    Args:
        grids: rows and columns of patches of the tiles that are looked at. Without any no work is counted for eyes, nor
            for a gradient that would only reach them.
        trains: whether the parameters whose names begin so are trained; everything by default.
    """
    learns = trains or _everything
    eyes = [] if cfg.vision is None else vision_work(cfg.vision, cfg.hidden_size, grids, learns)
    if cfg.compares:
        return needed(eyes) + needed(text_work(cfg, doc_lengths, learns))
    tied = cfg.tied_embeddings and cfg.head == "lm"
    outputs = cfg.vocab_size if cfg.head == "lm" else 1
    head = Work(2.0 * outputs * cfg.hidden_size * supervised_tokens, trained=learns(EMBEDDING if tied else "head."))
    embedding = Work(0.0, trained=learns(EMBEDDING))
    return needed([*eyes, embedding, *_decoder_work(cfg, doc_lengths, grids, learns), head])


def needed(works: Iterable[Work]) -> float:
    """FLOPs of forward and backward of what runs one behind the other.

    A trained module takes three times its forward: output, gradient of its input and of its weights; less where nothing
    asks for the gradient of what comes in. A frozen one behind something trained takes the gradients of its inputs
    only, and one before everything trained just its forward.
    """
    total, passed = 0.0, False
    for work in works:
        total += work.weights + work.attention
        if work.trained:
            total += 2 * (work.weights + work.attention) - (0.0 if passed else work.raw)
        elif passed:
            total += work.weights + 2 * work.attention
        passed = passed or work.trained
    return total


def _decoder_work(
    cfg: ModelConfig, doc_lengths: Sequence[int], grids: Grids, trains: Callable[[str], bool]
) -> list[Work]:
    tokens = sum(doc_lengths)
    heads = cfg.num_heads * (cfg.head_dim + (cfg.mla.value_dim if cfg.mla else cfg.head_dim))
    windows = [cfg.window(layer) for layer in range(cfg.num_layers)]
    pairs = {window: sum(attended_pairs(length, window) for length in doc_lengths) for window in set(windows)}
    works = [
        Work(2.0 * layer_matmul_params(cfg, i) * tokens, 2.0 * heads * pairs[window], trained=trains(f"layers.{i}."))
        for i, window in enumerate(windows)
    ]
    gated = None if cfg.vision is None else gated_work(cfg.vision, cfg.hidden_size, tokens, grids)
    if gated is None or cfg.vision is None or cfg.vision.cross is None:
        return works
    before = cfg.vision.cross.before(cfg.num_layers)
    gated = dataclasses.replace(gated, trained=trains("connector."))
    return [each for i, work in enumerate(works) for each in ([gated, work] if i in before else [work])]


def _everything(name: str) -> bool:
    return True
