"""What a distribution over a vocabulary cut over ranks says, without its logits ever lying on one rank: log-probability
of given tokens, entropy, the k most probable tokens. From logits, or from hidden states in chunks.
"""

from typing import Any

import torch
from torch.nn import functional as F

from parallel.collectives import all_reduce, start_gather_rows
from parallel.matmul import product_nt_fp32
from parallel.sharding import ALONE, SINGLE, Axis, Place
from parallel.vocab_rows import Asked, HiddenGradient, VocabRows, add_weight_grad, all_hidden, picked, top_of

_TINY = torch.finfo(torch.float32).tiny


def _statistics(
    logits_CV: torch.Tensor, local_C: torch.Tensor, mine_C: torch.Tensor, axis: Axis
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of the token, log-sum-exp and entropy [3, C], and this rank's probabilities, from fp32 logits
    that are overwritten."""
    picked_C = picked(logits_CV, local_C, mine_C)
    top_C = top_of(logits_CV, axis)
    shifted = logits_CV.sub_(top_C[:, None])
    p_CV = shifted.exp()
    sums = torch.stack((p_CV.sum(1), shifted.mul_(p_CV).sum(1), picked_C))
    total_C, energy_C, picked_C = all_reduce(sums, axis)
    log_C = total_C.log()
    found = torch.stack((picked_C - top_C - log_C, top_C + log_C, log_C - energy_C / total_C))
    return found, p_CV.div_(total_C[:, None])


def _dlogits(
    p_CV: torch.Tensor,
    entropy_C: torch.Tensor,
    local_C: torch.Tensor,
    mine_C: torch.Tensor,
    grad_log_C: torch.Tensor | None,
    grad_entropy_C: torch.Tensor | None,
) -> torch.Tensor:
    """Gradient of the logits, g (1[token] - p) - h p (log p + entropy), from probabilities that are overwritten."""
    if grad_entropy_C is not None:
        # Where p has become 0 its logarithm may be anything finite.
        factor = p_CV.clamp_min(_TINY).log_().add_(entropy_C[:, None]).mul_(-grad_entropy_C[:, None])
        out = p_CV.mul_(factor if grad_log_C is None else factor.sub_(grad_log_C[:, None]))
    else:
        out = p_CV.mul_(-grad_log_C[:, None]) if grad_log_C is not None else p_CV.zero_()
    if grad_log_C is not None and out.shape[1]:
        out.scatter_add_(1, local_C[:, None], (grad_log_C * mine_C)[:, None])
    return out


def _again(hidden_CD: torch.Tensor, weight_VD: torch.Tensor, log_sum_C: torch.Tensor) -> torch.Tensor:
    """A chunk's probabilities from the hidden states and what the forward kept of its logits."""
    return product_nt_fp32(hidden_CD, weight_VD).sub_(log_sum_C[:, None]).exp_()


class _FromLogits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_TV: torch.Tensor, tokens_T: torch.Tensor, vocab: VocabRows
    ) -> tuple[torch.Tensor, torch.Tensor]:
        asked = Asked.of(tokens_T, vocab)
        own = asked.take(logits_TV)[:, : vocab.rows]
        own = own.to(torch.float32, copy=True)
        log_S, log_sum_S, entropy_S = _statistics(own, asked.local_S, asked.mine_S, vocab.axis)[0]
        ctx.save_for_backward(logits_TV, log_sum_S, entropy_S)
        ctx.asked, ctx.vocab = asked, vocab
        ctx.set_materialize_grads(False)
        return asked.spread(log_S), asked.spread(entropy_S)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor, None, None]:
        logits_TV, log_sum_S, entropy_S = ctx.saved_tensors
        asked, rows = ctx.asked, ctx.vocab.rows
        grads_S = [None if g is None else asked.take(g).float() for g in grads]
        p = asked.take(logits_TV)[:, :rows].to(torch.float32, copy=True).sub_(log_sum_S[:, None]).exp_()
        dlogits = _dlogits(p, entropy_S, asked.local_S, asked.mine_S, *grads_S)
        out = torch.zeros_like(logits_TV)
        out[:, :rows] = asked.spread(dlogits).to(out.dtype)
        return out, None, None


class _FromHidden(torch.autograd.Function):
    """Keeps hidden rows as they came and two numbers a token, and the probabilities of as many tokens as it may; the
    backward makes the logits of the others again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_RD: torch.Tensor,
        weight_VD: torch.Tensor,
        tokens_T: torch.Tensor,
        vocab: VocabRows,
        chunk: int,
        place: Place,
        keep: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        asked = Asked.of(tokens_T, vocab)
        hidden_SD = asked.take(all_hidden(hidden_RD, place))
        weight = weight_VD[: vocab.rows].to(hidden_SD.dtype)
        out = torch.empty(3, asked.count, dtype=torch.float32, device=hidden_RD.device)
        kept: list[torch.Tensor] = []
        with torch.autocast(hidden_RD.device.type, enabled=False):
            for start in range(0, asked.count, chunk):
                part = slice(start, start + chunk)
                out[:, part], p_CV = _statistics(
                    product_nt_fp32(hidden_SD[part], weight), asked.local_S[part], asked.mine_S[part], vocab.axis
                )
                if start + len(p_CV) <= keep:
                    kept.append(p_CV)
                del p_CV  # or it would live beside the next chunk's
        log_S, log_sum_S, entropy_S = out
        ctx.save_for_backward(hidden_RD, weight_VD, log_sum_S, entropy_S)
        ctx.asked, ctx.vocab, ctx.chunk, ctx.place, ctx.dtype = asked, vocab, chunk, place, hidden_SD.dtype
        ctx.kept = kept
        ctx.set_materialize_grads(False)
        return asked.spread(log_S), asked.spread(entropy_S)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        hidden_RD, weight_VD, log_sum_S, entropy_S = ctx.saved_tensors
        asked, vocab = ctx.asked, ctx.vocab
        need_h, need_w = ctx.needs_input_grad[:2]
        device = hidden_RD.device
        grads_S = [None if g is None else asked.take(g).float() for g in grads]
        with torch.autocast(device.type, enabled=False):
            hidden_SD = asked.take(all_hidden(hidden_RD.to(ctx.dtype), ctx.place))
            weight = weight_VD[: vocab.rows].to(ctx.dtype)
            grad_h = HiddenGradient(asked, hidden_RD.shape[1], ctx.place, device) if need_h else None
            grad_w = torch.zeros(weight_VD.shape, dtype=torch.float32, device=device) if need_w else None
            for start in range(0, asked.count, ctx.chunk):
                part = slice(start, start + ctx.chunk)
                at = [x[part] for x in (entropy_S, asked.local_S, asked.mine_S)]
                grads_C = [g if g is None else g[part] for g in grads_S]
                p_CV = ctx.kept.pop(0) if ctx.kept else _again(hidden_SD[part], weight, log_sum_S[part])
                dlogits = _dlogits(p_CV, *at, *grads_C).to(ctx.dtype)
                if grad_h is not None:
                    grad_h.put(part, product_nt_fp32(dlogits, weight.t()))
                if grad_w is not None:
                    add_weight_grad(grad_w[: vocab.rows], dlogits, hidden_SD[part])
                del p_CV, dlogits
        return (
            grad_h.wait(hidden_RD.shape).to(hidden_RD.dtype) if grad_h is not None else None,
            grad_w.to(weight_VD.dtype) if grad_w is not None else None,
            None, None, None, None, None,
        )  # fmt: skip


def token_log_probs(
    hidden_RD: torch.Tensor,
    weight_VD: torch.Tensor,
    tokens_T: torch.Tensor,
    place: Place = SINGLE,
    vocab: int | None = None,
    chunk: int = 1024,
    keep: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each token under `softmax(hidden @ weight.T)`, and the entropy, in nats; both differentiable.

    Args:
        hidden_RD: hidden states as they come to the head: all rows, or this rank's under sequence parallel.
        weight_VD: this rank's rows of the head.
        tokens_T: int64; -100 where nothing is asked: there both results are 0 and no gradient flows.
        vocab: number of tokens, where the rows of all ranks are more (padding).
        chunk: tokens whose logits exist at the same time.
        keep: tokens whose probabilities (fp32, this rank's part) are kept for the backward, in whole chunks; the
            logits of the others are made twice.

    Returns:
        Two fp32 [T], the same on every rank of tp. For a temperature, divide the hidden states by it.
    """
    rows = VocabRows.of(weight_VD.shape[0], vocab, place.tp)
    differentiable = torch.is_grad_enabled() and (hidden_RD.requires_grad or weight_VD.requires_grad)
    return _FromHidden.apply(hidden_RD, weight_VD, tokens_T, rows, chunk, place, keep if differentiable else 0)


def token_log_probs_of_logits(
    logits_TV: torch.Tensor, tokens_T: torch.Tensor, axis: Axis = ALONE, vocab: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `token_log_probs`, from this rank's columns of the (finite) logits [T, V / tp], any float dtype."""
    return _FromLogits.apply(logits_TV, tokens_T, VocabRows.of(logits_TV.shape[1], vocab, axis))


@torch.no_grad()
def top_k_of_logits(
    logits_TV: torch.Tensor, k: int, axis: Axis = ALONE, vocab: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k most probable tokens from this rank's columns of the logits: fp32 log-probabilities, falling, and ids
    (both [T, k], the same on every rank). Each rank sends its own k best. Not differentiable."""
    rows = VocabRows.of(logits_TV.shape[1], vocab, axis)
    return _top_k(logits_TV[:, : rows.rows].float(), k, rows)


@torch.no_grad()
def top_k(
    hidden_RD: torch.Tensor,
    weight_VD: torch.Tensor,
    k: int,
    place: Place = SINGLE,
    vocab: int | None = None,
    chunk: int = 1024,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `top_k_of_logits`, from hidden states and the head's rows as in `token_log_probs`. Under sequence parallel
    the result has all rows, padding included."""
    rows = VocabRows.of(weight_VD.shape[0], vocab, place.tp)
    hidden = all_hidden(hidden_RD, place)
    weight = weight_VD[: rows.rows].to(hidden.dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        parts = [_top_k(product_nt_fp32(part, weight), k, rows) for part in hidden.split(chunk)]
    return torch.cat([values for values, _ in parts]), torch.cat([ids for _, ids in parts])


def _top_k(logits_CV: torch.Tensor, k: int, rows: VocabRows) -> tuple[torch.Tensor, torch.Tensor]:
    axis, count = rows.axis, logits_CV.shape[0]
    values, ids = logits_CV.topk(min(k, rows.rows), 1)
    missing = k - values.shape[1]
    values = F.pad(values, (0, missing), value=float("-inf"))
    ids = F.pad(ids + rows.first, (0, missing))
    top_C = top_of(logits_CV, axis)
    total_C = all_reduce((logits_CV - top_C[:, None]).exp_().sum(1), axis)
    if axis.size > 1:
        values, ids = (
            start_gather_rows(x, axis).wait().view(axis.size, count, k).transpose(0, 1).flatten(1)
            for x in (values, ids)
        )
    values, at = values.topk(k, 1)
    return values - (top_C + total_C.log())[:, None], ids.gather(1, at)
