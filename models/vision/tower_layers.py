"""What all towers are made of: layers in which the tokens of a sequence see each other, and which of them are run.

Legend: P rows of hidden states, all sequences (tiles, windows) one after another; D hidden size, H heads, K head size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from models.blocks.pieces import Piece
from models.blocks.rope import rotate_qk
from models.blocks.sdpa_cpu import cpu_attention
from models.vision.config import TowerConfig
from models.vision.layers import FeedForward, GatedFeedForward, LayerNorm, LayerScale, QKNorm, RMSNorm
from parallel.layers import ColumnLinear, RowLinear
from parallel.sharding import Place, keep


@dataclass(frozen=True)
class Seen:
    """Who sees whom: runs of equally long sequences, and how queries and keys are turned."""

    pieces: tuple[Piece, ...]
    cos_PK: torch.Tensor | None = None
    sin_PK: torch.Tensor | None = None
    causal: bool = False
    """Tokens see those before them only (texts)."""


def self_attention(qkv: torch.Tensor, heads: int, seen: Seen) -> torch.Tensor:
    """Each sequence's tokens see all of it, or what is before them: q | k | v [P, 3 H K] (may be overwritten) ->
    [P, H K]."""
    dim = qkv.shape[1] // (3 * heads)
    if qkv.device.type == "cpu":
        return cpu_attention(qkv, seen.cos_PK, seen.sin_PK, heads, heads, dim, seen.pieces, seen.causal)
    if seen.cos_PK is not None and seen.sin_PK is not None:
        qkv = rotate_qk(qkv, seen.cos_PK, seen.sin_PK, 2 * heads * dim, dim)
    return sequence_attention(qkv, heads, seen.pieces, seen.causal)


def sequence_attention(
    qkv: torch.Tensor, heads: int, pieces: Sequence[Piece], causal: bool = False
) -> torch.Tensor:  # fmt: skip
    """Through torch's public function, for devices other than the CPU: q | k | v, turned already."""
    dim = qkv.shape[1] // (3 * heads)
    outs = []
    for piece in pieces:
        rows = qkv[piece.q_start : piece.q_stop].view(piece.docs, -1, 3, heads, dim)
        q, k, v = rows.permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        outs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outs).flatten(1)


def tower_norm(cfg: TowerConfig, place: Place) -> nn.Module:
    """The norm of the tower's layers."""
    kind = RMSNorm if cfg.rms_norm or cfg.kind == "qwen2_5_vl" else LayerNorm
    return kind(cfg.hidden_size, cfg.norm_eps, place)


class Layer(nn.Module):
    """Pre-norm attention within sequences and feed-forward, [P, D] -> [P, D]."""

    def __init__(self, cfg: TowerConfig, place: Place) -> None:
        super().__init__()
        self.heads = cfg.num_heads // place.tp.size
        dim, inner = cfg.hidden_size, cfg.intermediate_size
        self.attn_norm, self.mlp_norm = (tower_norm(cfg, place) for _ in range(2))
        self.qkv = ColumnLinear(dim, (dim, dim, dim), cfg.qkv_bias, "normal", place, (cfg.num_heads,) * 3)
        self.qk_norm = QKNorm(dim, cfg.num_heads, place) if cfg.qk_norm else None
        self.out = RowLinear(dim, dim, True, "normal_residual", place)
        self.mlp = (
            GatedFeedForward(dim, inner, place)
            if cfg.kind == "qwen2_5_vl"
            else FeedForward(dim, inner, cfg.activation, place)
        )
        scales = cfg.kind == "intern"
        self.attn_scale, self.mlp_scale = (LayerScale(dim, place) if scales else None for _ in range(2))

    def forward(self, x: torch.Tensor, seen: Seen) -> torch.Tensor:
        qkv = self.qkv(self.attn_norm(x))
        if self.qk_norm is not None:
            qkv = self.qk_norm(qkv)
        attended = self_attention(qkv, self.heads, seen)
        if self.attn_scale is None or self.mlp_scale is None:
            x = self.out(attended, x)
            return self.mlp(self.mlp_norm(x), x)
        nothing = torch.zeros_like(x)  # row layers add the residual themselves, and it is not scaled
        x = self.attn_scale(self.out(attended, nothing), x)
        return self.mlp_scale(self.mlp(self.mlp_norm(x), nothing), x)


def make_layers(cfg: TowerConfig, place: Place) -> nn.ModuleList:
    """The layers of a tower. Those behind the wanted features are kept for the checkpoint's sake and not run."""
    layers = nn.ModuleList(Layer(cfg, place) for _ in range(cfg.num_layers))
    for idle in layers[cfg.runs :]:
        keep_all(idle)
    return layers


def run_layers(
    layers: Iterable[nn.Module], x: torch.Tensor, seen: Sequence[Seen], recompute: bool
) -> torch.Tensor:  # fmt: skip
    """[P, D] -> fp32 [P, D], as the decoder's rows between layers are, through as many layers as `seen` tells of."""
    x = x.float()
    for layer, own in zip(layers, seen, strict=False):
        if recompute and torch.is_grad_enabled():
            again: Any = checkpoint(layer, x, own, use_reentrant=False, preserve_rng_state=False)
            x = again
        else:
            x = layer(x, own)
    return x


def keep_all(module: nn.Module) -> None:
    """Freeze what is never run and saved all the same."""
    for param in module.parameters():
        keep(param)
