"""RMSNorm. Source: Zhang and Sennrich 2019, Root Mean Square Layer Normalization."""

from typing import Any

import torch
from torch import nn

from parallel.layers import parameter
from parallel.matmul import Again, compute_dtype
from parallel.sharding import REPLICATED, Place


class _RMSNorm(torch.autograd.Function):
    """x [..., D] -> x / rms(x) * weight, and 1 / rms(x). Keeps only x and 1 / rms; computes in fp32."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # vector_norm reads x once; pow().mean() would write a second tensor of its size.
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        rstd = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, rstd)
        ctx.mark_non_differentiable(rstd)
        return scaled(x, rstd, weight, dtype), rstd

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        dim = x.shape[-1]
        grad, w = grad.float(), weight.float()
        # With n = x rstd: dx = rstd (w g) - x rstd^3 / D <w g, x>;  dw = sum over tokens of g n.
        gx_ND = torch.mul(grad, x).view(-1, dim)
        grad_w = (rstd.view(1, -1) @ gx_ND).view(dim).to(weight.dtype) if ctx.needs_input_grad[1] else None
        factor = (gx_ND @ w).view(rstd.shape).mul_(rstd.pow(3)).div_(-dim)
        grad_x = torch.mul(grad, w, out=gx_ND.view(x.shape)).mul_(rstd).addcmul_(x, factor)
        return grad_x.to(x.dtype), grad_w, None, None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm over the last dim, differentiable, in the dtype of the next product."""
    return _RMSNorm.apply(x, weight, eps, compute_dtype(x))[0]


def scaled(x: torch.Tensor, rstd: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The norm's output from what it keeps; also how the backward makes it again."""
    return torch.mul(x, rstd).mul_(weight.float()).to(dtype)


class RMSNorm(nn.Module):
    """RMSNorm over the last dim, [..., D] -> [..., D], computed in fp32, given in the dtype of the next product.

    `partial`: each tp rank norms other rows or heads, so the weight's gradient is summed over tp.
    """

    def __init__(self, dim: int, eps: float, place: Place, partial: bool = False) -> None:
        super().__init__()
        self.eps = eps
        self.weight = parameter((dim,), REPLICATED, "ones", place, partial)

    def forward(self, x: torch.Tensor, again: bool = False) -> tuple[torch.Tensor, Again | None]:
        """The normed tensor and, if asked, how to make it again without this module's weight being gathered."""
        dtype = compute_dtype(x)
        out, rstd = _RMSNorm.apply(x, self.weight, self.eps, dtype)
        if not again:
            return out, None
        return out, Again(
            lambda x, rstd, w: scaled(x, rstd, w, dtype), (x.detach(), rstd, self.weight.detach().clone())
        )
