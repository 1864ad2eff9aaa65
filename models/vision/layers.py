"""Layers of towers and connectors. Hidden states are all rows on every tp rank, whatever the decoder does with its."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from models.blocks.mlp import swiglu
from models.blocks.norm import rms_norm
from parallel.collectives import copy_to, reduce_from
from parallel.layers import ColumnLinear, RowLinear, parameter
from parallel.matmul import compute_dtype, linear
from parallel.sharding import REPLICATED, Place, Shard

QK_EPS = 1e-6
"""Of InternViT's norm of queries and keys, whatever its other norms have."""


class _QuickGelu(torch.autograd.Function):
    """x sigmoid(1.702 x) = silu(1.702 x) / 1.702: torch has silu and its gradient as one pass each."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return F.silu(x * 1.702).mul_(1 / 1.702)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad, x * 1.702)


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """x sigmoid(1.702 x), CLIP's activation."""
    return _QuickGelu.apply(x)


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "quick_gelu": quick_gelu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


class LayerNorm(nn.Module):
    """LayerNorm over the last dim, computed in fp32, given in the dtype of the next product."""

    def __init__(self, dim: int, eps: float, place: Place) -> None:
        super().__init__()
        self.eps = eps
        self.weight = parameter((dim,), REPLICATED, "ones", place)
        self.bias = parameter((dim,), REPLICATED, "zeros", place)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(x.float(), x.shape[-1:], weight, bias, self.eps).to(compute_dtype(x))


class RMSNorm(nn.Module):
    """RMSNorm over the last dim, computed in fp32, given in the dtype of the next product."""

    def __init__(self, dim: int, eps: float, place: Place) -> None:
        super().__init__()
        self.eps = eps
        self.weight = parameter((dim,), REPLICATED, "ones", place)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)


class QKNorm(nn.Module):
    """RMSNorm of queries and keys, each over all of its heads together: those of other tp ranks count too."""

    def __init__(self, dim: int, heads: int, place: Place) -> None:
        super().__init__()
        self.dim, self.place = dim, place
        self.q, self.k = (parameter((dim,), Shard(0, (dim,), (heads,)), "ones", place) for _ in range(2))

    def forward(self, qkv: torch.Tensor) -> torch.Tensor:
        q, k, v = qkv.chunk(3, 1)
        squares = torch.stack([x.float().square().sum(1) for x in (q, k)])
        if self.place.tp.size > 1:  # summed on the way back too: every rank's heads depend on the whole sum
            squares = copy_to(reduce_from(squares, self.place.tp), self.place.tp)
        scale_q, scale_k = (squares / self.dim + QK_EPS).rsqrt()[..., None].unbind(0)
        q, k = (q * scale_q * self.q.float()).to(v.dtype), (k * scale_k * self.k.float()).to(v.dtype)
        return torch.cat([q, k, v], 1)


class Linear(nn.Module):
    """A linear layer that every tp rank holds and computes whole: [..., in] -> [..., out]."""

    def __init__(self, inputs: int, outputs: int, bias: bool, place: Place, init: str = "normal") -> None:
        super().__init__()
        self.weight = parameter((outputs, inputs), REPLICATED, init, place)
        self.bias = parameter((outputs,), REPLICATED, "zeros", place) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = linear(x.flatten(0, -2), self.weight, self.bias)
        return out.unflatten(0, x.shape[:-1])


class LayerScale(nn.Module):
    """residual + weight * x, number by number (InternViT).

    Source: Touvron et al. 2021, Going deeper with image transformers.
    """

    def __init__(self, dim: int, place: Place) -> None:
        super().__init__()
        self.weight = parameter((dim,), REPLICATED, "ones", place)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return torch.addcmul(residual, x, self.weight.to(x.dtype))


class FeedForward(nn.Module):
    """down(activation(up(x))) + residual, both with biases, cut over tp in between."""

    def __init__(self, dim: int, inner: int, activation: str, place: Place) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.up = ColumnLinear(dim, (inner,), True, "normal", place)
        self.down = RowLinear(inner, dim, True, "normal_residual", place)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self.down(self.activation(self.up(x)), residual)


class GatedFeedForward(nn.Module):
    """down(silu(gate(x)) * up(x)) + residual, all with biases, cut over tp in between."""

    def __init__(self, dim: int, inner: int, place: Place) -> None:
        super().__init__()
        self.gate_up = ColumnLinear(dim, (inner, inner), True, "normal", place)
        self.down = RowLinear(inner, dim, True, "normal_residual", place)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self.down(swiglu(self.gate_up(x)), residual)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tiles: int) -> torch.Tensor:
    """Attention of equally long sequences without a mask: q [B L, H, K] and k, v [B M, H, K] -> [B L, H K]."""
    rows_q, rows_k, rows_v = (x.unflatten(0, (tiles, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(rows_q, rows_k, rows_v).transpose(1, 2).flatten(2).flatten(0, 1)
