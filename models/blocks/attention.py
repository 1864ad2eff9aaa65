"""Grouped-query attention over packed documents, and its back ends by name.

A back end takes the fused q|k|v rows before rotation and returns the heads' outputs, [T, (H + 2G) K] -> [T, H K]. A
document never sees another: `eager` masks, the others run per document.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F

from models.blocks.context import Context, ring_attention, ulysses_attention
from models.blocks.norm import RMSNorm
from models.blocks.pieces import Piece, pieces_of
from models.blocks.rope import rotate_qk
from models.blocks.sdpa_cpu import cpu_attention
from models.blocks.virtual import LayerPrefix
from models.config import ModelConfig
from parallel.collectives import pad_rows
from parallel.layers import ColumnLinear, RowLinear
from parallel.matmul import Again
from parallel.sharding import Place


@dataclass(frozen=True)
class Packing:
    """What all layers of one forward share: rotation tables, document borders and the plan for each window.

    Under context parallel the borders still tell of all tokens. The tables are those of the tokens here (ring) or of
    all (Ulysses, whose back ends see all tokens).
    """

    cos_TK: torch.Tensor
    sin_TK: torch.Tensor
    borders: tuple[int, ...]
    max_seqlen: int
    pieces: dict[int | None, tuple[Piece, ...]]
    context: Context | None = None
    prefix: bool = False
    """Whether queries also meet the keys that their layer has learnt; the plan tells of them."""

    @staticmethod
    def of(
        cos_TK: torch.Tensor,
        sin_TK: torch.Tensor,
        borders: tuple[int, ...],
        windows: set[int | None],
        context: Context | None = None,
        prefix: bool = False,
    ) -> "Packing":
        longest = max(b - a for a, b in pairwise(borders))
        ring = context is not None and context.kind == "ring"  # has plans of its own
        pieces = {} if ring else {window: pieces_of(borders, window, cos_TK.device) for window in windows}
        return Packing(cos_TK, sin_TK, borders, longest, pieces, context, prefix)

    @property
    def tokens(self) -> int:
        """Tokens of this rank."""
        return self.borders[-1] if self.context is None else self.context.rows[self.context.axis.rank]


@dataclass(frozen=True)
class Heads:
    """Heads of this rank and the layer's window."""

    queries: int
    groups: int
    dim: int
    window: int | None

    @cached_property
    def parts(self) -> tuple[int, int, int]:
        return self.queries * self.dim, self.groups * self.dim, self.groups * self.dim


def _split(qkv: torch.Tensor, heads: Heads) -> list[torch.Tensor]:
    return [part.unflatten(1, (-1, heads.dim)) for part in qkv.split(heads.parts, 1)]


def eager(qkv: torch.Tensor, packing: Packing, heads: Heads) -> torch.Tensor:
    """The reference: scores of every pair of tokens, explicitly masked; fp32 softmax. Cost T squared."""
    q, k, v = _split(qkv, heads)
    cos, sin = packing.cos_TK[:, None], packing.sin_TK[:, None]

    def turned(x: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)

    repeat = heads.queries // heads.groups
    q, k, v = turned(q), turned(k).repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    scores_HTT = torch.einsum("thk,shk->hts", q, k) * heads.dim**-0.5
    total = qkv.shape[0]
    place_T = torch.arange(total, device=qkv.device)
    lengths = torch.tensor([b - a for a, b in pairwise(packing.borders)], device=qkv.device)
    doc_T = torch.arange(len(lengths), device=qkv.device).repeat_interleave(lengths)
    distance_TT = place_T[:, None] - place_T[None, :]
    hidden_TT = (distance_TT < 0) | (doc_T[:, None] != doc_T[None, :])
    if heads.window is not None:
        hidden_TT |= distance_TT >= heads.window
    weights_HTT = scores_HTT.float().masked_fill(hidden_TT, float("-inf")).softmax(-1).to(v.dtype)
    return torch.einsum("hts,shk->thk", weights_HTT, v).flatten(1)


def sdpa(qkv: torch.Tensor, packing: Packing, heads: Heads) -> torch.Tensor:
    """torch's fused attention, once for each run of equally long documents; cost = sum of squared document lengths."""
    pieces = packing.pieces[heads.window]
    if qkv.device.type == "cpu":
        return cpu_attention(qkv, packing.cos_TK, packing.sin_TK, heads.queries, heads.groups, heads.dim, pieces)
    return sdpa_pieces(qkv, packing, heads, pieces)


def sdpa_pieces(qkv: torch.Tensor, packing: Packing, heads: Heads, pieces: tuple[Piece, ...]) -> torch.Tensor:
    """The path through torch's public function, for devices other than the CPU."""
    qkv = rotate_qk(qkv, packing.cos_TK, packing.sin_TK, heads.parts[0] + heads.parts[1], heads.dim)
    q, k, v = _split(qkv, heads)
    outs = []
    for piece in pieces:
        rows_q = q[piece.q_start : piece.q_stop].unflatten(0, (piece.docs, -1)).transpose(1, 2)
        rows_k, rows_v = (
            x[piece.k_start : piece.q_stop].unflatten(0, (piece.docs, -1)).transpose(1, 2) for x in (k, v)
        )
        causal = piece.mask is None
        out = F.scaled_dot_product_attention(
            rows_q, rows_k, rows_v, attn_mask=piece.mask, is_causal=causal, enable_gqa=heads.queries != heads.groups
        )
        outs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outs).flatten(1)


def flash_attn(qkv: torch.Tensor, packing: Packing, heads: Heads) -> torch.Tensor:
    """The flash-attn package's kernel for documents of different lengths; half precision on a GPU only."""
    kernel = flash_kernel()
    qkv = rotate_qk(qkv, packing.cos_TK, packing.sin_TK, heads.parts[0] + heads.parts[1], heads.dim)
    q, k, v = _split(qkv, heads)
    borders = torch.tensor(packing.borders, dtype=torch.int32, device=qkv.device)
    window = (-1, -1) if heads.window is None else (heads.window - 1, 0)
    longest = packing.max_seqlen
    return kernel(q, k, v, borders, borders, longest, longest, causal=True, window_size=window).flatten(1)


def flash_kernel() -> Callable[..., torch.Tensor]:
    """The flash-attn package's varlen function.

    Raises:
        ValueError: the package is not installed.
    """
    try:
        return importlib.import_module("flash_attn").flash_attn_varlen_func
    except ImportError as err:
        raise ValueError(
            "engine.attention=flash_attn needs the package flash-attn, which is not installed here "
            f"({err}). Install it (pip install flash-attn, needs a CUDA GPU), or use engine.attention=sdpa."
        ) from err


BackEnd = Callable[[torch.Tensor, Packing, Heads], torch.Tensor]
BACK_ENDS: dict[str, BackEnd] = {
    "sdpa": sdpa,
    "flash_attn": flash_attn,
    "eager": eager,
}


def attention(
    qkv: torch.Tensor, packing: Packing, heads: Heads, back_end: BackEnd, prefix: LayerPrefix | None = None
) -> torch.Tensor:
    """The heads' outputs for the tokens here, [t, (H + 2G) K] -> [t, H K]; documents may go on at other cp ranks."""
    context = packing.context
    if context is None:
        return back_end(qkv, packing, heads)
    if context.kind == "ulysses":
        size = context.axis.size
        few = Heads(heads.queries // size, max(heads.groups // size, 1), heads.dim, heads.window)
        return ulysses_attention(_split(qkv, heads), context, lambda every: back_end(every, packing, few))
    qkv = rotate_qk(qkv, packing.cos_TK, packing.sin_TK, heads.parts[0] + heads.parts[1], heads.dim)
    q, k, v = _split(qkv, heads)
    if packing.prefix:
        assert prefix is not None, "a layer has no prefix"
        k, v = (torch.cat(parts) for parts in zip((k, v), prefix(k), strict=True))
    return ring_attention(q, k, v, context.rings[heads.window]).flatten(1)


class Attention(nn.Module):
    """normed [R, D] -> residual + out(attention(q, k, v)); attention itself sees the T tokens and no padding row."""

    def __init__(self, cfg: ModelConfig, layer: int, place: Place, back_end: str) -> None:
        super().__init__()
        groups = max(cfg.num_kv_heads // place.tp.size, 1)  # fewer groups than ranks: each lies on several
        self.heads = Heads(cfg.num_heads // place.tp.size, groups, cfg.head_dim, cfg.window(layer))
        self.back_end, self.place = BACK_ENDS[back_end], place
        units = (cfg.num_heads, cfg.num_kv_heads, cfg.num_kv_heads)
        self.qkv = ColumnLinear(cfg.hidden_size, cfg.qkv_parts, cfg.qkv_bias, "normal", place, units)
        self.out = RowLinear(cfg.qkv_parts[0], cfg.hidden_size, cfg.attention_out_bias, "normal_residual", place)
        self.q_norm = RMSNorm(cfg.head_dim, cfg.norm_eps, place, partial=True) if cfg.qk_norm else None
        self.k_norm = RMSNorm(cfg.head_dim, cfg.norm_eps, place, partial=True) if cfg.qk_norm else None
        self.prefix: LayerPrefix | None = None

    def forward(
        self, normed_RD: torch.Tensor, residual_RD: torch.Tensor, again: Again | None, packing: Packing
    ) -> torch.Tensor:
        qkv = self.qkv(normed_RD, again)
        tokens = packing.tokens
        if qkv.shape[0] > tokens:
            qkv = qkv[:tokens]
        if self.q_norm is not None and self.k_norm is not None:
            q, k, v = _split(qkv, self.heads)
            qkv = torch.cat([self.q_norm(q)[0].flatten(1), self.k_norm(k)[0].flatten(1), v.flatten(1)], 1)
        out = attention(qkv, packing, self.heads, self.back_end, self.prefix)
        if self.place.splits_rows:
            out = pad_rows(out, self.place.tp.size)
        return self.out(out, residual_RD)
