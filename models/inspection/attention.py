"""The attention weights of a layer, made again from what entered it: kernels never write them down."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from models.blocks.attention import Attention, Packing
from models.blocks.mla import LatentAttention, Projected, heads_of
from models.decoder import Layer


@dataclass(frozen=True)
class HeadNumbers:
    """How one head looks at a text: means over its tokens."""

    entropy: float
    """Nats; 0 = one token gets all the weight."""
    first: float
    """Weight on the first token of the document (an attention sink)."""
    itself: float
    """Weight on the token itself."""
    previous: float
    """Weight on the token before; the first token of a document has none and does not count."""
    distance: float
    """Tokens back that the weight lies on average."""


def visible(borders: Sequence[int], window: int | None, device: torch.device) -> torch.Tensor:
    """bool [T, T]: whether a token (row) may look at another (column): its document, not later, in the window."""
    length_N = torch.tensor([b - a for a, b in pairwise(borders)], device=device)
    doc_T = torch.arange(len(length_N), device=device).repeat_interleave(length_N)
    place_T = torch.arange(borders[-1], device=device)
    back_TT = place_T[:, None] - place_T[None, :]
    seen_TT = (back_TT >= 0) & (doc_T[:, None] == doc_T[None, :])
    return seen_TT if window is None else seen_TT & (back_TT < window)


@torch.no_grad()
def attention_weights(
    layer: Layer, hidden_TD: torch.Tensor, packing: Packing, heads: Sequence[int]
) -> Iterator[torch.Tensor]:
    """The weights [T, T] of some query heads, one after another: rows look at columns, each row sums to 1.

    Args:
        hidden_TD: what entered the layer.
        packing: rotation tables and borders of the forward.
    """
    normed_TD = layer.attn_norm(hidden_TD)[0]
    attn = layer.attn
    if isinstance(attn, LatentAttention):
        q_THK, k_TGK, scale, window = *_latent(attn, normed_TD, packing), attn.heads.scale, None
    else:
        assert isinstance(attn, Attention)
        q_THK, k_TGK = _grouped(attn, normed_TD, packing)
        scale, window = attn.heads.dim**-0.5, attn.heads.window
    hidden_TT = ~visible(packing.borders, window, hidden_TD.device)
    shared = q_THK.shape[1] // k_TGK.shape[1]
    for head in heads:
        scores_TT = (q_THK[:, head] @ k_TGK[:, head // shared].T).float() * scale
        yield scores_TT.masked_fill_(hidden_TT, float("-inf")).softmax(1)


def _grouped(attn: Attention, normed_TD: torch.Tensor, packing: Packing) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, _ = attn.qkv(normed_TD).split(attn.heads.parts, 1)
    q_THK, k_TGK = (x.unflatten(1, (-1, attn.heads.dim)) for x in (q, k))
    if attn.q_norm is not None and attn.k_norm is not None:
        q_THK, k_TGK = attn.q_norm(q_THK)[0], attn.k_norm(k_TGK)[0]
    cos, sin = packing.cos_TK[:, None], packing.sin_TK[:, None]

    def turned(x: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    return turned(q_THK), turned(k_TGK)


def _latent(attn: LatentAttention, normed_TD: torch.Tensor, packing: Packing) -> tuple[torch.Tensor, torch.Tensor]:
    query = normed_TD
    if attn.q_down is not None and attn.q_norm is not None:
        query = attn.q_norm(attn.q_down(normed_TD))[0]
    s = attn.heads.sizes
    latent, rope_key = attn.kv_down(normed_TD).split((s.kv_rank, s.rope_dim), 1)
    made = Projected(attn.q_up(query), attn.kv_up(attn.kv_norm(latent)[0]), rope_key)
    q_THK, k_THK, _ = heads_of(made, packing, attn.heads)
    return q_THK, k_THK


def head_numbers(weights_TT: torch.Tensor, borders: Sequence[int]) -> HeadNumbers:
    """What the weights of one head say in five numbers."""
    total, device = weights_TT.shape[0], weights_TT.device
    place_T = torch.arange(total, device=device)
    first_T = torch.cat([torch.full((b - a,), a, device=device) for a, b in pairwise(borders)])
    back_T = (weights_TT * (place_T[:, None] - place_T[None, :])).sum(1)
    before_T = weights_TT.diagonal(-1)[first_T[1:] != place_T[1:]]
    return HeadNumbers(
        entropy=torch.special.entr(weights_TT).sum(1).mean().item(),
        first=weights_TT.gather(1, first_T[:, None]).mean().item(),
        itself=weights_TT.diagonal().mean().item(),
        previous=before_T.mean().item() if len(before_T) else 0.0,
        distance=back_T.mean().item(),
    )
