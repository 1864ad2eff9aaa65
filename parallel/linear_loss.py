"""Cross-entropy straight from hidden states, in chunks: the logits of all tokens never exist at once.

Per chunk the forward makes fp32 logits, the loss, and at once the gradients of hidden and weight, so nothing is kept of
a chunk and no logits are made twice. Positions without a target cost nothing: they are taken out first.
"""

from typing import Any

import torch

from parallel.collectives import all_reduce
from parallel.matmul import product_nt_fp32
from parallel.sharding import SINGLE, Axis, Place
from parallel.vocab_rows import Asked, HiddenGradient, VocabRows, add_weight_grad, all_hidden, picked, top_of


def _probabilities(logits_CV: torch.Tensor, local_C: torch.Tensor, mine_C: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Turn fp32 logits, their vocabulary cut over `axis`, into probabilities in place; gives each token's loss [C]."""
    picked_C = picked(logits_CV, local_C, mine_C)
    top_C = top_of(logits_CV, axis)
    if axis.size == 1:
        torch.softmax(logits_CV, 1, out=logits_CV)
        # The largest probability is 1 / sum(exp(z - top)): never underflows, so log-sum-exp is exact from it.
        return top_C - logits_CV.amax(1).log() - picked_C
    sums = torch.stack((logits_CV.sub_(top_C[:, None]).exp_().sum(1), picked_C))
    total_C, picked_C = all_reduce(sums, axis)
    logits_CV.div_(total_C[:, None])
    return top_C + total_C.log() - picked_C


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_RD: torch.Tensor,
        weight_VD: torch.Tensor,
        targets_T: torch.Tensor,
        scale: float,
        chunk: int,
        place: Place,
        vocab: VocabRows,
        differentiable: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        asked = Asked.of(targets_T, vocab)
        hidden_SD = asked.take(all_hidden(hidden_RD, place))
        dtype, device = hidden_SD.dtype, hidden_RD.device
        need_h, need_w = (differentiable and need for need in ctx.needs_input_grad[:2])
        weight = weight_VD[: vocab.rows].to(dtype)
        loss_S = torch.empty(asked.count, dtype=torch.float32, device=device)
        grad_h = HiddenGradient(asked, hidden_RD.shape[1], place, device) if need_h else None
        grad_w = torch.zeros(weight_VD.shape, dtype=torch.float32, device=device) if need_w else None
        with torch.autocast(device.type, enabled=False):
            for start in range(0, asked.count, chunk):
                part = slice(start, start + chunk)
                local_C, mine_C = asked.local_S[part], asked.mine_S[part]
                logits = product_nt_fp32(hidden_SD[part], weight)
                loss_S[part] = _probabilities(logits, local_C, mine_C, place.tp)
                if grad_h is None and grad_w is None:
                    continue
                if vocab.rows:
                    logits.scatter_add_(1, local_C[:, None], -mine_C[:, None].to(logits.dtype))
                dlogits = logits.to(dtype)
                if grad_h is not None:
                    grad_h.put(part, product_nt_fp32(dlogits, weight.t()))
                if grad_w is not None:
                    add_weight_grad(grad_w[: vocab.rows], dlogits, hidden_SD[part])
        ctx.grads, ctx.scale = (grad_h, grad_w), scale
        ctx.dtypes, ctx.shape = (hidden_RD.dtype, weight_VD.dtype), hidden_RD.shape
        loss_T = asked.spread(loss_S)
        ctx.mark_non_differentiable(loss_T)
        return loss_S.sum() * scale, loss_T

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        assert ctx.grads is not None, "the linear loss frees its gradients in the backward: it runs once"
        (grad_h, grad_w), ctx.grads = ctx.grads, None
        factor = grad.float() * ctx.scale
        if grad_w is not None:
            grad_w = grad_w.mul_(factor).to(ctx.dtypes[1])
        if grad_h is not None:
            grad_h = grad_h.wait(ctx.shape, factor).to(ctx.dtypes[0])
        return grad_h, grad_w, None, None, None, None, None, None


def linear_loss(
    hidden_RD: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_T: torch.Tensor,
    scale: float = 1.0,
    chunk: int = 1024,
    place: Place = SINGLE,
    vocab: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of `softmax(hidden @ weight.T)` against `targets_T` (-100 = no target).

    Args:
        hidden_RD: all rows of the hidden states, or this rank's rows under sequence parallel (padding rows behind T).
        weight_VD: the vocabulary's rows, with a tp axis this rank's.
        chunk: tokens that have logits at once.
        vocab: number of tokens, where the rows of all ranks are more; the padding rows take no part.

    Returns:
        `scale` x the sum of token losses (differentiable scalar, fp32) and the loss of each token in nats (detached
        fp32 [T], 0 where there is no target). The backward can run once.
    """
    rows = VocabRows.of(weight_VD.shape[0], vocab, place.tp)
    # Within the function grad mode is always off, and what needs a gradient is said as if it were on.
    return _LinearLoss.apply(hidden_RD, weight_VD, targets_T, scale, chunk, place, rows, torch.is_grad_enabled())
