"""Multi-head latent attention over packed documents. Source: DeepSeek-AI 2024, DeepSeek-V2, section 2.1.

Keys and values of all heads are made from one latent vector a token, plus one rotated key part that all heads share. In
training they are made in full (the form that absorbs the up-projections into the query pays only with a cache).

Every tp rank makes the latents of the rows it has. Under sequence parallel those are its own only: the latents and not
the hidden states are gathered (V3: 2,112 numbers a token, not 7,168), nothing is computed twice, and the gradients
of the weights behind them are partial. Otherwise every rank has all rows and gets the latents' whole gradient.

Legend: `H` heads of this rank; `N` nope_dim, `R` rope_dim, `K` = N + R, `V` value_dim.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from models.blocks.attention import Packing, flash_kernel
from models.blocks.context import ring_attention, ulysses_attention
from models.blocks.mla_cpu import cpu_latent_attention
from models.blocks.norm import RMSNorm
from models.blocks.rope import score_factor, turned_pairs
from models.config import MLAConfig, ModelConfig
from parallel.collectives import enter, pad_rows
from parallel.layers import ColumnLinear, RowLinear, parameter
from parallel.matmul import Again, linear
from parallel.sharding import REPLICATED, Place

LATENT_EPS = 1e-6
"""Of the latents' norms, whatever `norm_eps` says: the reference code and transformers do not pass it on."""


@dataclass(frozen=True)
class LatentHeads:
    """Heads of this rank, their sizes, and the factor on the scores."""

    count: int
    sizes: MLAConfig
    scale: float


class Projected(NamedTuple):
    """What attention is made from: queries [T, H K], keys without rotation | values [T, H (N + V)], and the part of the
    keys that all heads share, before rotation [T, R]."""

    q: torch.Tensor
    kv: torch.Tensor
    rope_key: torch.Tensor

    def first(self, tokens: int) -> "Projected":
        """Without the rows after so many tokens (padding)."""
        return self if self.q.shape[0] == tokens else Projected(*(x[:tokens] for x in self))


def heads_of(made: Projected, packing: Packing, heads: LatentHeads) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The rotated queries and keys [T, H, K] and the values [T, H, V], by plain differentiable operations."""
    s = heads.sizes
    q_nope, q_rope = made.q.unflatten(1, (heads.count, -1)).split((s.nope_dim, s.rope_dim), -1)
    k_nope, v = made.kv.unflatten(1, (heads.count, -1)).split((s.nope_dim, s.value_dim), -1)
    cos, sin = packing.cos_TK.to(q_rope.dtype), packing.sin_TK.to(q_rope.dtype)
    k_rope = turned_pairs(made.rope_key[:, None], cos, sin).expand(-1, heads.count, -1)
    return torch.cat([q_nope, turned_pairs(q_rope, cos, sin)], -1), torch.cat([k_nope, k_rope], -1), v


def padded(heads: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Heads made equally large with zeros, for kernels that want them so."""
    width = max(x.shape[-1] for x in heads)
    return [F.pad(x, (0, width - x.shape[-1])) for x in heads]


def eager(made: Projected, packing: Packing, heads: LatentHeads) -> torch.Tensor:
    """The reference: all scores of a document, masked; fp32 softmax."""
    q, k, v = heads_of(made, packing, heads)
    outs = []
    for start, stop in pairwise(packing.borders):
        scores_HTT = torch.einsum("thk,shk->hts", q[start:stop], k[start:stop]) * heads.scale
        later_TT = torch.ones(scores_HTT.shape[1:], dtype=torch.bool, device=q.device).triu(1)
        weights_HTT = scores_HTT.float().masked_fill(later_TT, float("-inf")).softmax(-1).to(v.dtype)
        outs.append(torch.einsum("hts,shv->thv", weights_HTT, v[start:stop]))
    return torch.cat(outs).flatten(1)


def sdpa(made: Projected, packing: Packing, heads: LatentHeads) -> torch.Tensor:
    """torch's fused attention, once for each run of equally long documents."""
    s = heads.sizes
    if made.q.device.type == "cpu" and s.value_dim <= s.nope_dim + s.rope_dim:
        tables = (packing.cos_TK, packing.sin_TK)
        return cpu_latent_attention(*made, *tables, s, heads.scale, packing.pieces[None])
    return sdpa_pieces(made, packing, heads)


def sdpa_pieces(made: Projected, packing: Packing, heads: LatentHeads) -> torch.Tensor:
    """The path through torch's public function, for devices other than the CPU."""
    parts = heads_of(made, packing, heads)
    outs = []
    for piece in packing.pieces[None]:
        rows = slice(piece.q_start, piece.q_stop)
        q, k, v = (x[rows].unflatten(0, (piece.docs, -1)).transpose(1, 2) for x in parts)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=heads.scale)
        outs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outs).flatten(1)


def flash_attn(made: Projected, packing: Packing, heads: LatentHeads) -> torch.Tensor:
    """The flash-attn package's varlen kernel (heads of up to 256), which wants q, k and v of one size: v is padded."""
    kernel = flash_kernel()
    q, k, v = padded(heads_of(made, packing, heads))
    borders = torch.tensor(packing.borders, dtype=torch.int32, device=q.device)
    longest = packing.max_seqlen
    out = kernel(q, k, v, borders, borders, longest, longest, causal=True, softmax_scale=heads.scale)
    return out[..., : heads.sizes.value_dim].flatten(1)


BACK_ENDS: dict[str, Callable[[Projected, Packing, LatentHeads], torch.Tensor]] = {
    "sdpa": sdpa,
    "flash_attn": flash_attn,
    "eager": eager,
}


class DownLinear(nn.Module):
    """Hidden states to a latent, the same weight on every tp rank: x [R, in] -> [R, out], row by row."""

    def __init__(self, inputs: int, outputs: int, bias: bool, place: Place) -> None:
        super().__init__()
        self.weight = parameter((outputs, inputs), REPLICATED, "normal", place, place.splits_rows)
        self.bias = parameter((outputs,), REPLICATED, "zeros", place, place.splits_rows) if bias else None

    def forward(self, x: torch.Tensor, again: Again | None = None) -> torch.Tensor:
        return linear(x, self.weight, self.bias, again=again)


class LatentAttention(nn.Module):
    """normed [R, D] -> residual + out(attention(q, k, v)), k and v from one latent."""

    def __init__(self, cfg: ModelConfig, place: Place, back_end: str) -> None:
        super().__init__()
        assert cfg.mla is not None
        s, heads = cfg.mla, cfg.num_heads
        self.place, self.back_end = place, BACK_ENDS[back_end]
        self.heads = LatentHeads(heads // place.tp.size, s, score_factor(cfg.rope) * cfg.head_dim**-0.5)
        self.q_down = self.q_norm = None
        query = cfg.hidden_size
        if s.q_rank is not None:
            query = s.q_rank
            self.q_down = DownLinear(cfg.hidden_size, s.q_rank, cfg.qkv_bias, place)
            self.q_norm = RMSNorm(s.q_rank, LATENT_EPS, place, place.splits_rows)
        self.q_up = ColumnLinear(query, (heads * cfg.head_dim,), False, "normal", place, (heads,))
        self.kv_down = DownLinear(cfg.hidden_size, s.kv_rank + s.rope_dim, cfg.qkv_bias, place)
        self.kv_norm = RMSNorm(s.kv_rank, LATENT_EPS, place, place.splits_rows)
        made = heads * (s.nope_dim + s.value_dim)
        self.kv_up = ColumnLinear(s.kv_rank, (made,), False, "normal", place, (heads,))
        self.out = RowLinear(heads * s.value_dim, cfg.hidden_size, cfg.attention_out_bias, "normal_residual", place)

    def forward(
        self, normed_RD: torch.Tensor, residual_RD: torch.Tensor, again: Again | None, packing: Packing
    ) -> torch.Tensor:
        selective = again is not None
        if self.q_down is not None and self.q_norm is not None:
            q = self.q_up(*self.q_norm(self.q_down(normed_RD, again), selective))
        else:
            q = self.q_up(normed_RD, again)
        s = self.heads.sizes
        latent, rope_key = self.kv_down(normed_RD, again).split((s.kv_rank, s.rope_dim), 1)
        kv = self.kv_up(*self.kv_norm(latent, selective))
        # Each rank's heads give a part of the shared key's gradient.
        made = Projected(q, kv, enter(rope_key, self.place)).first(packing.tokens)
        out = self._attend(made, packing)
        return self.out(pad_rows(out, self.place.tp.size) if self.place.splits_rows else out, residual_RD)

    def _attend(self, made: Projected, packing: Packing) -> torch.Tensor:
        context, heads, s = packing.context, self.heads, self.heads.sizes
        if context is None:
            return self.back_end(made, packing, heads)
        if context.kind == "ulysses":  # the shared key goes to every rank
            few = replace(heads, count=heads.count // context.axis.size)
            widths = (few.count * (s.nope_dim + s.rope_dim), few.count * (s.nope_dim + s.value_dim), s.rope_dim)
            parts = [*(x.unflatten(1, (heads.count, -1)) for x in (made.q, made.kv)), made.rope_key[:, None]]

            def attention(every: torch.Tensor) -> torch.Tensor:
                return self.back_end(Projected(*every.split(widths, 1)), packing, few)

            return ulysses_attention(parts, context, attention)
        q, k, v = padded(heads_of(made, packing, heads))
        return ring_attention(q, k, v, context.rings[None], heads.scale)[..., : s.value_dim].flatten(1)
