"""Cross-entropy straight from hidden states, in chunks: the logits of all tokens never exist at once.

Per chunk the forward makes fp32 logits, the loss, and at once the gradients of hidden and weight, so nothing is kept of
a chunk and no logits are made twice. Positions without a target cost nothing: they are taken out first.
"""

from typing import Any

import torch
import torch.distributed as dist

from parallel.collectives import all_reduce
from parallel.matmul import compute_dtype, product_nt_fp32
from parallel.sharding import ALONE, Axis

IGNORE = -100
# A product is added to the weight gradient in row blocks of this many elements, so that it needs no second gradient.
_BLOCK = 1 << 22


def _probabilities(logits_CV: torch.Tensor, local_C: torch.Tensor, mine_C: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Turn fp32 logits, their vocabulary cut over `axis`, into probabilities in place; gives each token's loss [C]."""
    picked_C = logits_CV.gather(1, local_C[:, None]).squeeze(1)
    if axis.size > 1:
        picked_C = all_reduce(picked_C.masked_fill_(~mine_C, 0.0), axis)
    top_C = all_reduce(logits_CV.amax(1), axis, dist.ReduceOp.MAX)
    if axis.size == 1:
        torch.softmax(logits_CV, 1, out=logits_CV)
        # The largest probability is 1 / sum(exp(z - top)): never underflows, so log-sum-exp is exact from it.
        return top_C - logits_CV.amax(1).log() - picked_C
    total_C = all_reduce(logits_CV.sub_(top_C[:, None]).exp_().sum(1), axis)
    logits_CV.div_(total_C[:, None])
    return top_C + total_C.log() - picked_C


def _add_weight_grad(grad_VD: torch.Tensor, dlogits_CV: torch.Tensor, hidden_CD: torch.Tensor) -> None:
    rows = max(1, _BLOCK // grad_VD.shape[1])
    for start in range(0, grad_VD.shape[0], rows):
        block = dlogits_CV[:, start : start + rows]
        # The narrow operand first, see `weight_gradient`.
        grad_VD[start : start + rows] += product_nt_fp32(hidden_CD.t(), block.t()).t()


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: torch.Tensor,
        weight_VD: torch.Tensor,
        targets_T: torch.Tensor,
        scale: float,
        chunk: int,
        axis: Axis,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        dtype = compute_dtype(hidden_TD)
        kept = (targets_T != IGNORE).nonzero().squeeze(1)
        everything = kept.numel() == targets_T.numel()
        hidden_SD = (hidden_TD if everything else hidden_TD[kept]).to(dtype)
        first = axis.rank * weight_VD.shape[0]
        local_S = (targets_T if everything else targets_T[kept]) - first
        mine_S = (local_S >= 0) & (local_S < weight_VD.shape[0])
        local_S = local_S.masked_fill(~mine_S, 0)

        need_h, need_w = ctx.needs_input_grad[:2]
        weight = weight_VD.to(dtype)
        loss_S = torch.empty(kept.numel(), dtype=torch.float32, device=hidden_TD.device)
        grad_h = torch.empty(hidden_SD.shape, dtype=torch.float32, device=hidden_TD.device) if need_h else None
        grad_w = torch.zeros(weight_VD.shape, dtype=torch.float32, device=hidden_TD.device) if need_w else None
        with torch.autocast(hidden_TD.device.type, enabled=False):
            for start in range(0, kept.numel(), chunk):
                part = slice(start, start + chunk)
                logits = product_nt_fp32(hidden_SD[part], weight)
                loss_S[part] = _probabilities(logits, local_S[part], mine_S[part], axis)
                if grad_h is None and grad_w is None:
                    continue
                logits.scatter_add_(1, local_S[part, None], -mine_S[part, None].to(logits.dtype))
                dlogits = logits.to(dtype)
                if grad_h is not None:
                    grad_h[part] = product_nt_fp32(dlogits, weight.t())
                if grad_w is not None:
                    _add_weight_grad(grad_w, dlogits, hidden_SD[part])
        if grad_h is not None:
            all_reduce(grad_h, axis)
        ctx.grads, ctx.scale, ctx.kept, ctx.everything = (grad_h, grad_w), scale, kept, everything
        ctx.dtypes, ctx.shape = (hidden_TD.dtype, weight_VD.dtype), hidden_TD.shape
        loss_T = loss_S if everything else loss_S.new_zeros(targets_T.shape).index_copy_(0, kept, loss_S)
        ctx.mark_non_differentiable(loss_T)
        return loss_S.sum() * scale, loss_T

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        assert ctx.grads is not None, "the linear loss frees its gradients in the backward: it runs once"
        (grad_h, grad_w), ctx.grads = ctx.grads, None
        factor = grad.float() * ctx.scale
        if grad_h is not None:
            grad_h = grad_h.mul_(factor).to(ctx.dtypes[0])
            if not ctx.everything:
                grad_h = grad_h.new_zeros(ctx.shape).index_copy_(0, ctx.kept, grad_h)
        if grad_w is not None:
            grad_w = grad_w.mul_(factor).to(ctx.dtypes[1])
        return grad_h, grad_w, None, None, None, None


def linear_loss(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_T: torch.Tensor,
    scale: float = 1.0,
    chunk: int = 1024,
    axis: Axis = ALONE,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of `softmax(hidden @ weight.T)` against `targets_T` (-100 = no target).

    Returns `scale` x the sum of token losses (differentiable scalar, fp32) and the loss of each token in nats
    (detached fp32 [T], 0 where there is no target). `chunk` tokens have logits at once. With an axis larger than
    one, `weight_VD` is this rank's rows of the vocabulary. The backward can run once.
    """
    return _LinearLoss.apply(hidden_TD, weight_VD, targets_T, scale, chunk, axis)
