"""Context parallel: which rank has which tokens of a micro-batch, and the collectives attention needs for it.

Everything about sizes follows from one pure function, so no rank ever asks another how many tokens it has.
Sources: Ulysses: Jacobs et al. 2023; ring: Liu et al. 2023; even causal work by dealing out tokens from both ends:
Brandon et al. 2023 (in stripes), Grattafiori et al. 2024 (Llama 3, two chunks a rank); here document by document.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, Literal

import torch
import torch.distributed as dist

from parallel.sharding import Axis

Kind = Literal["ulysses", "ring"]
Range = tuple[int, int]
"""Tokens [start, stop) of the micro-batch."""
Placement = tuple[tuple[Range, ...], ...]
"""For each rank the tokens it has, in rising order."""

WHOLE_SHARE = 4
"""ring: a document of at most 1 / 4 of a rank's tokens is dealt out whole where it fits."""


def token_ranges(borders: Sequence[int], size: int, kind: Kind) -> Placement:
    """Deal out the tokens of packed documents, each once; the ranks' numbers of tokens differ by at most one.

    ulysses: one run of consecutive tokens a rank, whatever the documents are.
    ring: a long document is cut on both sides of its middle: rank r has the r-th chunk from its begin and the r-th from
    its end. Both together lie around the middle, so a rank's causal work in a document is its tokens times half the
    length, however uneven the chunks are. Documents of equal length, as many as ranks, and short documents are dealt
    out whole: their keys go nowhere. No range crosses a document's border.

    Args:
        borders: first token of each document and, last, the number of tokens.
        size: number of ranks.
    """
    edges = [borders[-1] * r // size for r in range(size + 1)]
    if kind == "ulysses":
        return tuple(((a, b),) if a < b else () for a, b in pairwise(edges))
    space = [b - a for a, b in pairwise(edges)]
    held: list[list[Range]] = [[] for _ in range(size)]
    documents = sorted(((a, b) for a, b in pairwise(borders) if a < b), key=lambda doc: (doc[0] - doc[1], doc[0]))
    while documents:
        length = documents[0][1] - documents[0][0]
        alike = [doc for doc in documents[:size] if doc[1] - doc[0] == length]
        emptiest = max(range(size), key=lambda r: space[r])
        if len(alike) == size and length <= min(space):
            takers = list(range(size))
        elif length * size * WHOLE_SHARE <= borders[-1] and length <= space[emptiest]:
            takers = [emptiest]
        else:
            takers = []
            shares = _level(length, space)
            _cut_around_the_middle(documents.pop(0)[0], shares, held)
            space = [free - share for free, share in zip(space, shares, strict=True)]
        for rank in takers:
            held[rank].append(documents.pop(0))
            space[rank] -= length
    return tuple(tuple(sorted(ranges)) for ranges in held)


def _level(length: int, space: Sequence[int]) -> list[int]:
    """Shares of `length` tokens that leave the ranks' free spaces as even as they can be."""
    order = sorted(range(len(space)), key=lambda r: (-space[r], r))
    tops = [space[r] for r in order]
    assert sum(tops) >= length, f"{length} tokens do not fit in {space}"
    some, level, more = 1, tops[0] - length, 0  # the `some` emptiest ranks take all of it
    while some < len(order) and level < tops[some]:
        some += 1
        level, more = divmod(sum(tops[:some]) - length, some)
    shares = [0] * len(space)
    for i, rank in enumerate(order[:some]):
        shares[rank] = space[rank] - level - (1 if i >= some - more else 0)
    return shares


def _cut_around_the_middle(start: int, shares: Sequence[int], held: list[list[Range]]) -> None:
    """Give rank r its share of the document that starts at `start`: half from the front, half from the back."""
    fronts = [-(-share // 2) for share in shares]
    backs = [share // 2 for share in shares]
    chunks = list(pairwise(accumulate([*fronts, *reversed(backs)], initial=start)))
    for rank in range(len(shares)):
        front, back = chunks[rank], chunks[-1 - rank]
        if front[1] == back[0]:  # the innermost rank's two are one
            front, back = (front[0], back[1]), (0, 0)
        held[rank] += [(a, b) for a, b in (front, back) if a < b]


def places(ranges: Sequence[Range]) -> torch.Tensor:
    """int64: the tokens of a rank's ranges, one by one."""
    return torch.cat([torch.arange(0), *(torch.arange(start, stop) for start, stop in ranges)])


def rows_of(placement: Placement) -> tuple[int, ...]:
    """How many tokens each rank has."""
    return tuple(sum(b - a for a, b in ranges) for ranges in placement)


def lengths_here(borders: Sequence[int], ranges: Sequence[Range]) -> list[int]:
    """How many tokens of each document lie in `ranges`."""
    return [sum(max(0, min(b, stop) - max(a, start)) for a, b in ranges) for start, stop in pairwise(borders)]


def context_problems(
    heads: int, kv_heads: int, tp: int, cp: int, kind: Kind, attention: str = "sdpa"
) -> list[tuple[str, object, str, str]]:
    """What cannot work, as (key, value, reason, way out). `heads` and `kv_heads` are the whole model's."""
    if cp == 1:
        return []
    if kind == "ring":
        if attention == "sdpa":
            return []
        reason = "ring attention joins blocks of keys inside torch's fused kernels; other back ends cannot"
        return [("engine.attention", attention, reason, "engine.attention=sdpa, or parallel.context=ulysses")]
    heads, groups = max(heads // tp, 1), max(kv_heads // tp, 1)

    def fits(size: int) -> bool:
        return heads % size == 0 and (groups % size == 0 or size % groups == 0)

    if fits(cp):
        return []
    near = max(size for size in range(1, cp + 1) if fits(size))
    of_rank = f" of a tensor-parallel rank (tp={tp})" if tp > 1 else ""
    reason = (
        f"Ulysses deals out the {heads} query and {groups} key/value heads{of_rank} over the {cp} context-parallel "
        "ranks: the query heads must divide evenly, key/value heads divide or be shared by equally many ranks"
    )
    return [("parallel.cp", cp, reason, f"parallel.context=ring, or parallel.cp={near}")]


# ---- Ulysses ---------------------------------------------------------------------------------------------------------


def _all_to_all(blocks: torch.Tensor, sent: Sequence[int], received: Sequence[int], axis: Axis) -> torch.Tensor:
    """Rows of `blocks` to their ranks, `sent[r]` of them to rank r; the rows that came, in rank order."""
    got = blocks.new_empty(sum(received), *blocks.shape[1:])
    dist.all_to_all_single(got, blocks.contiguous(), list(received), list(sent), group=axis.group)
    return got


class _ScatterHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, axis: Axis, rows: tuple[int, ...], *parts: torch.Tensor) -> torch.Tensor:
        ctx.axis, ctx.rows, ctx.shapes = axis, rows, [part.shape for part in parts]
        here, size = rows[axis.rank], axis.size
        blocks = []
        for part in parts:
            if part.shape[1] % size:  # fewer heads than ranks: each goes to several neighbours
                part = part.repeat_interleave(size // part.shape[1], 1)
            blocks.append(part.reshape(here, size, part.shape[1] // size * part.shape[2]))
        to_each = torch.cat(blocks, 2).transpose(0, 1).flatten(0, 1)
        return _all_to_all(to_each, [here] * size, rows, axis)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        axis, rows = ctx.axis, ctx.rows
        here, size = rows[axis.rank], axis.size
        back = _all_to_all(grad, rows, [here] * size, axis).view(size, here, grad.shape[1])
        grads, column = [], 0
        for shape in ctx.shapes:
            heads, dim = shape[1], shape[2]
            width = max(heads // size, 1) * dim
            block = back[:, :, column : column + width].transpose(0, 1)  # [here, size, width]
            if heads % size:
                block = block.unflatten(1, (heads, -1)).sum(2)
            grads.append(block.reshape(shape))
            column += width
        return None, None, *grads


class _GatherHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, axis: Axis, rows: tuple[int, ...], out: torch.Tensor) -> torch.Tensor:
        ctx.axis, ctx.rows = axis, rows
        here, size = rows[axis.rank], axis.size
        back = _all_to_all(out, rows, [here] * size, axis).view(size, here, out.shape[1])
        return back.transpose(0, 1).flatten(1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        axis, rows = ctx.axis, ctx.rows
        here, size = rows[axis.rank], axis.size
        to_each = grad.reshape(here, size, grad.shape[1] // size).transpose(0, 1).flatten(0, 1)
        return None, None, _all_to_all(to_each, [here] * size, rows, axis)


def scatter_heads(parts: Sequence[torch.Tensor], axis: Axis, rows: tuple[int, ...]) -> torch.Tensor:
    """From all heads of the tokens here to this rank's share of the heads of all tokens.

    Args:
        parts: each [rows here, heads, size]; heads divide by the axis, or the axis by them: then a head goes to several
            ranks and its gradients are summed.
        rows: tokens of each rank (consecutive runs, in rank order).

    Returns:
        [all tokens, width]: for each part its heads of this rank, side by side. On the wire, each way and again in the
        backward: (size - 1) / size x rows here x width x size elements.
    """
    return _ScatterHeads.apply(axis, rows, *parts)


def gather_heads(out: torch.Tensor, axis: Axis, rows: tuple[int, ...]) -> torch.Tensor:
    """The inverse for the result: [all tokens, heads here x K] -> [rows here, all heads x K]."""
    return _GatherHeads.apply(axis, rows, out)


# ---- ring ------------------------------------------------------------------------------------------------------------


class Passing:
    """A tensor on its way to the next rank of the ring while one comes from the rank before; `wait` gives that one."""

    def __init__(self, send: torch.Tensor, receive: torch.Tensor, axis: Axis, tag: int) -> None:
        after, before = (axis.rank + 1) % axis.size, (axis.rank - 1) % axis.size
        self.sent, self.received = send, receive  # kept alive until it is done
        self.works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, send, group=axis.group, tag=tag, group_peer=after),
                dist.P2POp(dist.irecv, receive, group=axis.group, tag=tag, group_peer=before),
            ]
        )

    def wait(self) -> torch.Tensor:
        """Block until both ways are done."""
        for work in self.works:
            work.wait()
        return self.received
