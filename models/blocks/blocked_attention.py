"""Attention on the CPU made of oneDNN products, for documents long enough: block after block of queries against all the
keys they may see.

torch's flash kernel for the CPU reaches 30 to 70 GFLOP/s a thread, an oneDNN product of the same sizes 120 to 190
(Zen 5, one thread, fp32). Three things keep the rest cheap. The query heads of a key/value head are rows of one
product. Scores are made in base 2, because torch's `exp2` is vectorised where its `exp` goes to MKL, which is three
times slower on processors of another maker. The backward makes scores transposed, keys x queries: what each query
subtracts (its log-sum-exp, its part of the softmax's gradient) is then the product's bias, and the gradient of the
scores is one product whose epilogue multiplies with the weights.

Source of the algorithm: Dao et al. 2022, FlashAttention (blocks, log-sum-exp, weights made again in the backward).
Shapes: q [N, H, Q, K], k [N, G, S, K], v [N, G, S, V], log-sum-exp [N, H, Q]; R = H / G query heads share a key head.
"""

import math
from itertools import pairwise

import torch

from parallel.matmul import product_nt, product_nt_plus

ROWS = 512
"""Rows of a product (queries times the heads that share a key head), where the limits of a block allow."""
SMALLEST, LARGEST = 64, 256
"""Queries of a block: half of its own keys are met in vain, and each product costs 11 microseconds to call."""
KEYS = 2048
"""Keys met at a time, which bounds what is held: three times ROWS x KEYS numbers."""
FEWEST_TOKENS, SMALLEST_HEAD, ENOUGH = 128, 32, 9_000_000
"""Queries and keys, K, and Q x S x R x K for each thread, from which this is faster. The flash kernel's time over ours,
forward and backward on one thread: 0.7 with K 16, 0.9 to 1.0 at 4 million, 0.95 to 1.3 at 7 to 8, 1.2 to 1.3 at 9,
1.4 to 2.4 from 512 tokens on (K 32 to 128, R 1 to 16). More than one thread was not measured."""
_LOG2E = math.log2(math.e)


def pays(q: torch.Tensor, k: torch.Tensor) -> bool:
    """Whether this is the faster way for these queries and keys, all or causal."""
    if q.device.type != "cpu" or q.dtype is not torch.float32 or not torch.backends.mkldnn.is_available():
        return False
    _, heads, queries, size = q.shape
    groups, keys = k.shape[1:3]
    if min(queries, keys) < FEWEST_TOKENS or size < SMALLEST_HEAD:
        return False
    return queries * keys * (heads // groups) * size >= ENOUGH * torch.get_num_threads()


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [N, H, Q, V] (rows of tokens in memory) and log-sum-exp [N, H, Q].

    Args:
        causal: a query sees the keys up to its own; needs Q = S. Otherwise it sees all.
        scale: factor on the scores; None is 1 / sqrt(K).
    """
    docs, heads, queries, size = q.shape
    groups, keys = k.shape[1:3]
    factor: float = size**-0.5 if scale is None else scale
    out = q.new_empty(docs, queries, heads, v.shape[3]).transpose(1, 2)
    log_sum = q.new_empty(docs, heads, queries)
    q_GR, out_GR, sum_GR = (x.unflatten(1, (groups, -1)) for x in (q, out, log_sum))
    k, v = k.contiguous(), v.contiguous()
    blocks = _blocks(queries, heads // groups)
    hidden = _hidden(blocks, q) if causal else None
    for doc in range(docs):
        for group in range(groups):
            own_k, own_v = k[doc, group], v[doc, group]
            for start, stop in blocks:
                ranges = _key_ranges(start, stop, keys, causal)
                rows = _rows(q_GR[doc, group, :, start:stop], factor * _LOG2E)
                made, sums = _block_forward(rows, own_k, own_v, ranges, hidden, stop - start)
                out_GR[doc, group, :, start:stop] = made.view(-1, stop - start, v.shape[3])
                sum_GR[doc, group, :, start:stop] = sums.view(-1, stop - start)
    return out, log_sum


def _block_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    ranges: list[tuple[int, int]],
    hidden: torch.Tensor | None,
    queries: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A block of scaled queries [R queries, K] against ranges of keys: output [R queries, V] and log-sum-exp.

    `hidden`: [queries, queries] or more, -inf where a query's key comes after it; None if all keys are seen.
    """
    out = total = top = None
    for start, stop in ranges:
        weights = product_nt(q, k[start:stop])
        if hidden is not None and stop == ranges[-1][1]:
            own = weights.view(-1, queries, stop - start)[:, :, -queries:]
            own += hidden[:queries, :queries]
        before, top = top, weights.amax(1, keepdim=True)
        if before is not None:
            torch.maximum(before, top, out=top)
        weights.sub_(top).exp2_()
        sums, part = weights.sum(1, keepdim=True), product_nt(weights, v[start:stop].t())
        if out is None or total is None or before is None:
            out, total = part, sums
        else:
            shrunk = before.sub_(top).exp2_()
            total, out = total.mul_(shrunk).add_(sums), out.mul_(shrunk).add_(part)
    assert out is not None and total is not None and top is not None, "no keys"
    return out.div_(total), total.log2_().add_(top).mul_(1.0 / _LOG2E)


def attend_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    log_sum: torch.Tensor,
    causal: bool,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q (rows of tokens in memory), k and v from that of the output.

    `out` and `log_sum` may be those over more keys than `k` has: then these are the gradients through `k` and `v`.
    """
    docs, heads, queries, size = q.shape
    groups, keys = k.shape[1:3]
    factor: float = size**-0.5 if scale is None else scale
    grad_q = q.new_empty(docs, queries, heads, size).transpose(1, 2)
    k, v = k.contiguous(), v.contiguous()
    grad_k, grad_v = torch.zeros_like(k), torch.zeros_like(v)
    drop = (grad * out).sum(3).neg_()
    minus = log_sum * -_LOG2E
    q_GR, grad_GR, grad_q_GR, drop_GR, minus_GR = (x.unflatten(1, (groups, -1)) for x in (q, grad, grad_q, drop, minus))
    blocks = _blocks(queries, heads // groups)
    hidden = _hidden(blocks, q).t().contiguous() if causal else None
    for doc in range(docs):
        for group in range(groups):
            at = (doc, group)
            for start, stop in blocks:
                here = (*at, slice(None), slice(start, stop))
                made = _block_backward(
                    _rows(q_GR[here], factor * _LOG2E),
                    _rows(grad_GR[here], 1.0),
                    (minus_GR[here].reshape(-1), drop_GR[here].reshape(-1)),
                    (k[at], v[at], grad_k[at], grad_v[at]),
                    _key_ranges(start, stop, keys, causal),
                    hidden,
                    stop - start,
                )
                torch.mul(made.view(size, -1, stop - start).permute(1, 2, 0), factor, out=grad_q_GR[here])
    return grad_q, grad_k.mul_(1.0 / _LOG2E), grad_v


def _block_backward(
    q: torch.Tensor,
    grad: torch.Tensor,
    biases: tuple[torch.Tensor, torch.Tensor],
    of_group: tuple[torch.Tensor, ...],
    ranges: list[tuple[int, int]],
    hidden: torch.Tensor | None,
    queries: int,
) -> torch.Tensor:
    """The gradient of the unscaled queries, transposed [K, R queries]; those of keys and values are added.

    Args:
        q: [R queries, K], scaled and for base 2, so that the keys' gradient comes out log2(e) times too large.
        grad: [R queries, V].
        biases: for each row minus its log-sum-exp in base 2, and minus the product of output and gradient.
        of_group: keys, values and their gradients so far.
        hidden: as in the forward, transposed.
    """
    k, v, grad_k, grad_v = of_group
    grad_q = None
    for start, stop in ranges:
        some = slice(start, stop)
        weights = product_nt_plus(k[some], q, biases[0])
        if hidden is not None and stop == ranges[-1][1]:
            own = weights.view(stop - start, -1, queries)[-queries:]
            own += hidden[:queries, None, :queries]
        weights.exp2_()
        scores = product_nt_plus(v[some], grad, biases[1], weights)
        grad_v[some].add_(product_nt(weights, grad.t()))
        grad_k[some].add_(product_nt(scores, q.t()))
        part = product_nt(k[some].t(), scores.t())
        grad_q = part if grad_q is None else grad_q.add_(part)
    assert grad_q is not None, "no keys"
    return grad_q


def _rows(x: torch.Tensor, factor: float) -> torch.Tensor:
    """[R, queries, K] of any strides times `factor` -> [R queries, K], contiguous."""
    return torch.mul(x, factor, out=x.new_empty(x.shape)).flatten(0, 1)


def _blocks(queries: int, repeat: int) -> list[tuple[int, int]]:
    """Ranges of queries, equally long but for the last."""
    most = min(max(ROWS // repeat, SMALLEST), LARGEST)
    size = -(-queries // -(-queries // most))
    return [(start, min(start + size, queries)) for start in range(0, queries, size)]


def _hidden(blocks: list[tuple[int, int]], like: torch.Tensor) -> torch.Tensor:
    """-inf above the diagonal, as wide as a block."""
    size = blocks[0][1]
    return like.new_full((size, size), float("-inf")).triu_(1)


def _key_ranges(start: int, stop: int, keys: int, causal: bool) -> list[tuple[int, int]]:
    """The keys that the queries start:stop meet; the last range ends with their own where they are causal."""
    earlier = start if causal else keys
    return list(pairwise([*range(0, max(earlier, 1), KEYS), stop if causal else keys]))
