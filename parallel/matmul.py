"""Matrix products and the linear function under every layer.

On a CPU, torch's fp32 `mm` goes to MKL, which uses half the vector width on processors of another maker. oneDNN,
shipped with torch as well, was measured at 165-190 GFLOP/s a thread where `mm` had 73-88 (1024 x 256 x 1408, Zen 5).
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from parallel.later import weight_gradient_now_or_later

_ONEDNN = torch.backends.mkldnn.is_available()
_SMALL = 4
"""Products thinner than this are faster in `mm`."""


def product_nt(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a @ b.T` for `a [M, K]`, `b [N, K]` of any strides -> [M, N]."""
    small = min(a.shape[0], b.shape[0], a.shape[1]) < _SMALL
    if small or not _ONEDNN or a.dtype is not torch.float32 or a.device.type != "cpu":
        return torch.mm(a, b.t())
    if not (b.is_contiguous() or b.t().is_contiguous()):
        b = b.contiguous()  # for a second operand with gaps between rows oneDNN has only a loop, 1000 times slower
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")


def product_nt_plus(
    a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor, times: torch.Tensor | None = None
) -> torch.Tensor:
    """`(a @ b.T + bias) * times` in one pass, for `a [M, K]`, `b [N, K]`, `bias [N]`, `times [M, N]` -> [M, N]."""
    if not _ONEDNN or a.dtype is not torch.float32 or a.device.type != "cpu":
        out = torch.addmm(bias, a, b.t())
        return out if times is None else out.mul_(times)
    if not (b.is_contiguous() or b.t().is_contiguous()):
        b = b.contiguous()
    if times is None:
        return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
    return torch.ops.mkldnn._linear_pointwise.binary(a, times, b, bias, "mul")


@contextmanager
def packed_weights(weights: Iterable[torch.Tensor], rows: int, pairs: Iterable[torch.Tensor] = ()) -> Iterator[None]:
    """While it lasts, `linear` without gradients uses copies of these weights in the order in which oneDNN reads them.

    Weights as they lie are put into that order anew by every product: with few rows that takes longer than the product
    itself. The copies take as much memory as the weights. A weight that is changed meanwhile is used as it lies; so are
    those of another device or dtype, and all under autocast to half precision.

    Args:
        rows: what the copies are made for; products of other numbers of rows work too.
        pairs: further weights, gate over up, for `packed_swiglu`.
    """
    parts = dict.fromkeys(weights, 1) | dict.fromkeys(pairs, 2)
    mine = [weight for weight in parts if _can_be_packed(weight) and "packed" not in vars(weight)]
    try:
        for weight in mine:
            halves = weight.detach().chunk(parts[weight])
            packed = tuple(torch.ops.mkldnn._reorder_linear_weight(half, rows) for half in halves)
            vars(weight)["packed"] = (weight._version, packed)
        yield
    finally:
        for weight in mine:
            vars(weight).pop("packed", None)


def _can_be_packed(weight: torch.Tensor) -> bool:
    fits = weight.dtype is torch.float32 and compute_dtype(weight) is torch.float32
    return _ONEDNN and fits and weight.device.type == "cpu" and min(weight.shape) >= _SMALL


def _packed(weight: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The copies that `x` may be multiplied with; none where the weight has changed or gradients are wanted."""
    version, packed = vars(weight).get("packed", (None, ()))
    if not packed or version != weight._version or torch.is_grad_enabled() or x.dtype is not torch.float32:
        return ()
    return packed if compute_dtype(x) is torch.float32 else ()


def packed_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, residual: torch.Tensor | None = None
) -> torch.Tensor | None:
    """`linear` through the packed copy; None where there is none."""
    packed = _packed(weight, x)
    if len(packed) != 1:
        return None
    if residual is None:
        return torch.ops.mkldnn._linear_pointwise(x, packed[0], bias, "none", [], "")
    return torch.ops.mkldnn._linear_pointwise.binary(x, residual, packed[0], bias, "add")


def packed_swiglu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor | None:
    """silu(x gate^T) * (x up^T) for a packed `weight` [2F, D], gate over up; None where there is no such copy.

    silu and the product with it are done on the way out of the matrix products.
    """
    packed = _packed(weight, x)
    if len(packed) != 2:
        return None
    biases = (None, None) if bias is None else bias.chunk(2)
    gate = torch.ops.mkldnn._linear_pointwise(x, packed[0], biases[0], "swish", [], "")
    return torch.ops.mkldnn._linear_pointwise.binary(x, gate, packed[1], biases[1], "mul")


def weight_gradient(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """`grad.T @ x` for `grad [T, O]`, `x [T, I]` -> [O, I].

    oneDNN copies its first operand when that is a transposed view, so the narrower of the two goes first.
    """
    if grad.shape[1] > 2 * x.shape[1]:
        return product_nt(x.t(), grad.t()).t().contiguous()
    return product_nt(grad.t(), x.t())


def product_nt_fp32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a @ b.T` accumulated and returned in fp32, also for half-precision operands."""
    if a.dtype is torch.float32:
        return product_nt(a, b)
    if a.device.type == "cuda":
        return torch.mm(a, b.t(), out_dtype=torch.float32)
    return product_nt(a.float(), b.float())


def plus(out: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None) -> torch.Tensor:
    """A fresh product with what is added to it, in place where types allow."""
    if bias is not None:
        out += bias
    if residual is None:
        return out
    return out.add_(residual) if residual.dtype == out.dtype else residual + out


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype a matrix product of `x` runs in: autocast's where it is on, else that of `x`."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


@dataclass(frozen=True)
class Again:
    """How to make a tensor again in the backward from tensors that are kept anyway: `fn(*tensors)`."""

    fn: Callable[..., torch.Tensor]
    tensors: tuple[torch.Tensor, ...]


class _Linear(torch.autograd.Function):
    """x W^T + b (+ residual). Keeps the leaf `weight` itself, never a view or cast of it: under ZeRO-3 a kept view
    would hold the gathered weight until the backward. Keeps `x`, or what `again` needs to make it, if the weight is
    trained."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
        again: Again | None,
    ) -> torch.Tensor:
        dtype = compute_dtype(x)
        ctx.dtype, ctx.x_dtype, ctx.again = dtype, x.dtype, again.fn if again else None
        ctx.weight = weight
        x = x.to(dtype)
        kept = again.tensors if again else (x,)
        ctx.save_for_backward(weight, *(kept if ctx.needs_input_grad[1] else ()))
        with torch.autocast(x.device.type, enabled=False):
            out = plus(product_nt(x, weight.to(dtype)), bias, residual)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight, *kept = ctx.saved_tensors
        need_x, need_w, need_b, need_r = ctx.needs_input_grad[:4]
        grad_c = grad.to(ctx.dtype)
        with torch.autocast(grad.device.type, enabled=False):
            grad_x = product_nt(grad_c, weight.to(ctx.dtype).t()).to(ctx.x_dtype) if need_x else None
            grad_w = None
            if need_w:
                grad_w = weight_gradient_now_or_later(
                    ctx.weight, partial(_grad_w, grad_c, ctx.again, kept, weight.dtype)
                )
            grad_b = grad.sum(0, dtype=torch.float32).to(weight.dtype) if need_b else None
        return grad_x, grad_w, grad_b, grad if need_r else None, None


def _grad_w(
    grad_c: torch.Tensor, again: Callable[..., torch.Tensor] | None, kept: list[torch.Tensor], dtype: torch.dtype
) -> torch.Tensor:
    """The weight's gradient of `_Linear` from the output's gradient, in the dtype of the product, and what was kept."""
    with torch.autocast(grad_c.device.type, enabled=False):
        x = again(*kept).to(grad_c.dtype) if again else kept[0]
        return weight_gradient(grad_c, x).to(dtype)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    again: Again | None = None,
) -> torch.Tensor:
    """`x [T, I] @ weight [O, I].T + bias [O] + residual [T, O]`, differentiable, in autocast's dtype where it is on.

    `again` replaces the kept input: the backward makes it from tensors that live anyway (selective recompute).
    """
    out = packed_linear(x, weight, bias, residual)
    return _Linear.apply(x, weight, bias, residual, again) if out is None else out
