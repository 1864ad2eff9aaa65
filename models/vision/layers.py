"""Layers of towers and connectors. Hidden states are all rows on every tp rank, whatever the decoder does with its."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from parallel.layers import ColumnLinear, RowLinear, parameter
from parallel.matmul import compute_dtype, linear
from parallel.sharding import REPLICATED, Place

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
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


class Linear(nn.Module):
    """A linear layer that every tp rank holds and computes whole: [..., in] -> [..., out]."""

    def __init__(self, inputs: int, outputs: int, bias: bool, place: Place, init: str = "normal") -> None:
        super().__init__()
        self.weight = parameter((outputs, inputs), REPLICATED, init, place)
        self.bias = parameter((outputs,), REPLICATED, "zeros", place) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = linear(x.flatten(0, -2), self.weight, self.bias)
        return out.unflatten(0, x.shape[:-1])


class FeedForward(nn.Module):
    """down(activation(up(x))) + residual, both with biases, cut over tp in between."""

    def __init__(self, dim: int, inner: int, activation: str, place: Place) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.up = ColumnLinear(dim, (inner,), True, "normal", place)
        self.down = RowLinear(inner, dim, True, "normal_residual", place)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self.down(self.activation(self.up(x)), residual)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tiles: int) -> torch.Tensor:
    """Attention of equally long sequences without a mask: q [B L, H, K] and k, v [B M, H, K] -> [B L, H K]."""
    rows_q, rows_k, rows_v = (x.unflatten(0, (tiles, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(rows_q, rows_k, rows_v).transpose(1, 2).flatten(2).flatten(0, 1)
