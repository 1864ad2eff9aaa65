"""SwiGLU feed-forward. Source: Shazeer 2020, GLU Variants Improve Transformer."""

from typing import Any

import torch
from torch import nn

from models.config import ModelConfig
from parallel.layers import ColumnLinear, RowLinear
from parallel.matmul import Again, packed_swiglu
from parallel.sharding import Place


def swiglu_product(gate_up: torch.Tensor) -> torch.Tensor:
    """gate | up [T, 2F] -> silu(gate) * up [T, F]."""
    gate, up = gate_up.chunk(2, -1)
    return nn.functional.silu(gate).mul_(up)


class _Swiglu(torch.autograd.Function):
    """Keeps gate | up only; writes both gradients into one buffer."""

    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate_up)
        return swiglu_product(gate_up)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, -1)
        out = torch.empty_like(gate_up)
        grad_gate, grad_up = out.chunk(2, -1)
        torch.ops.aten.silu.out(gate, out=grad_up)
        grad_up.mul_(grad)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return out


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """`swiglu_product`, differentiable."""
    return _Swiglu.apply(gate_up)


class SwiGLU(nn.Module):
    """normed [R, D] -> residual + down(silu(gate) * up)."""

    def __init__(self, cfg: ModelConfig, place: Place, selective: bool) -> None:
        super().__init__()
        ffn = cfg.intermediate_size
        self.selective = selective
        self.gate_up = ColumnLinear(cfg.hidden_size, (ffn, ffn), cfg.mlp_bias, "normal", place)
        self.down = RowLinear(ffn, cfg.hidden_size, cfg.mlp_bias, "normal_residual", place)

    def forward(self, normed_RD: torch.Tensor, residual_RD: torch.Tensor, again: Again | None) -> torch.Tensor:
        product = packed_swiglu(normed_RD, self.gate_up.weight, self.gate_up.bias)
        if product is not None:  # generation: on one device or under tp, without sequence parallel
            return self.down(product, residual_RD)
        gate_up = self.gate_up(normed_RD, again)
        product = swiglu(gate_up)
        return self.down(product, residual_RD, Again(swiglu_product, (gate_up.detach(),)) if self.selective else None)
