"""Floating-point operations a training step needs, for FLOP/s and MFU.

Counted are matrix products only: 2 per multiply-add, and twice the forward for the backward. Work that is done again
(recompute) and work that is saved (unsupervised tokens skip the head) count as what the step needs, not what it ran.
Sources: Chowdhery et al. 2022 (PaLM), appendix B; attention by document length and causal, as the kernels compute it.
"""

from collections.abc import Sequence

from models.config import ModelConfig


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


def step_flops(cfg: ModelConfig, doc_lengths: Sequence[int], supervised_tokens: int) -> float:
    """Forward and backward over documents of `doc_lengths` tokens, of which `supervised_tokens` reach the head.

    = 6 N T  +  6 V D S  +  6 H (K + K') sum of query-key pairs over layers and documents
    (a pair costs 2 K for the score and 2 K' for the value per query head, K' the value's head size, times 3 with the
    backward).
    """
    linear = 6.0 * matmul_params(cfg) * sum(doc_lengths)
    outputs = cfg.vocab_size if cfg.head == "lm" else 1
    head = 6.0 * outputs * cfg.hidden_size * supervised_tokens
    windows = [cfg.window(layer) for layer in range(cfg.num_layers)]
    counts = {window: windows.count(window) for window in set(windows)}
    pairs = sum(n * attended_pairs(length, window) for window, n in counts.items() for length in doc_lengths)
    value_dim = cfg.mla.value_dim if cfg.mla else cfg.head_dim
    return linear + head + 6.0 * cfg.num_heads * (cfg.head_dim + value_dim) * pairs
