"""What the loss and the log-probabilities of a cut vocabulary share: which rows a rank holds, which positions are asked
for, the hidden rows that go in and their gradient on the way out.

A rank holds rows [first, first + rows) of the vocabulary; where the ranks do not divide it the last ones hold fewer
(perhaps none), and what lies behind those rows in their weights is padding that takes no part in anything.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from parallel.collectives import Pending, all_reduce, pad_rows, start_all_reduce, start_gather_rows, start_scatter_rows
from parallel.matmul import compute_dtype, product_nt_fp32
from parallel.sharding import Axis, Place

IGNORE = -100
# A product is added to the weight gradient in row blocks of this many elements, so that it needs no second gradient.
_BLOCK = 1 << 22


@dataclass(frozen=True)
class VocabRows:
    """The tokens of the vocabulary that are this rank's."""

    axis: Axis
    first: int
    rows: int

    @staticmethod
    def of(held: int, vocab: int | None, axis: Axis) -> "VocabRows":
        """`held` rows lie on each rank, padding included; `vocab` tokens there are, None if there is no padding."""
        vocab = held * axis.size if vocab is None else vocab
        first = min(axis.rank * held, vocab)
        return VocabRows(axis, first, min(held, vocab - first))


@dataclass(frozen=True)
class Asked:
    """The positions where a token is asked for (not -100), and where those tokens lie: S of T positions."""

    total: int
    index_S: torch.Tensor | None
    """None: all positions."""
    local_S: torch.Tensor
    """Row of this rank, 0 where it is another's."""
    mine_S: torch.Tensor

    @staticmethod
    def of(tokens_T: torch.Tensor, vocab: VocabRows) -> "Asked":
        index = (tokens_T != IGNORE).nonzero().squeeze(1)
        everything = index.numel() == tokens_T.numel()
        local_S = (tokens_T if everything else tokens_T[index]) - vocab.first
        mine_S = (local_S >= 0) & (local_S < vocab.rows)
        return Asked(tokens_T.numel(), None if everything else index, local_S.masked_fill(~mine_S, 0), mine_S)

    @property
    def count(self) -> int:
        return self.local_S.numel()

    def take(self, x_T: torch.Tensor) -> torch.Tensor:
        """The asked rows of [T, ...]."""
        return x_T[: self.total] if self.index_S is None else x_T[self.index_S]

    def spread(self, x_S: torch.Tensor) -> torch.Tensor:
        """Rows back at their positions [T, ...], zero elsewhere."""
        if self.index_S is None:
            return x_S
        return x_S.new_zeros(self.total, *x_S.shape[1:]).index_copy_(0, self.index_S, x_S)


def all_hidden(hidden_RD: torch.Tensor, place: Place) -> torch.Tensor:
    """All rows of the hidden states, padding included, in the dtype products run in. Not differentiable."""
    hidden = hidden_RD.to(compute_dtype(hidden_RD))
    return start_gather_rows(hidden, place.tp).wait() if place.splits_rows else hidden


class HiddenGradient:
    """The fp32 gradient of the asked rows, put in by chunks and summed over tp while the next things are computed."""

    def __init__(self, asked: Asked, dim: int, place: Place, device: torch.device) -> None:
        self.asked, self.place = asked, place
        self.grad_SD = torch.empty(asked.count, dim, dtype=torch.float32, device=device)
        self.pending: list[Pending] = []

    def put(self, part: slice, grad_CD: torch.Tensor) -> None:
        """Rows `part` of the asked ones. The last part comes last."""
        self.grad_SD[part] = grad_CD
        if self.place.splits_rows and part.stop >= self.asked.count:
            whole = pad_rows(self.asked.spread(self.grad_SD), self.place.tp.size)
            self.pending.append(start_scatter_rows(whole, self.place.tp))
        elif self.place.tp.size > 1 and not self.place.splits_rows:
            self.pending.append(start_all_reduce(self.grad_SD[part], self.place.tp))

    def wait(self, like_RD: torch.Size, factor: torch.Tensor | None = None) -> torch.Tensor:
        """The gradient of the hidden states as they came in, of shape `like_RD`."""
        done = [pending.wait() for pending in self.pending]
        if not self.asked.count:
            return self.grad_SD.new_zeros(like_RD)
        grad = done[0] if self.place.splits_rows else self.grad_SD
        if factor is not None:
            grad.mul_(factor)
        return grad if self.place.splits_rows else self.asked.spread(grad)


def add_weight_grad(grad_VD: torch.Tensor, dlogits_CV: torch.Tensor, hidden_CD: torch.Tensor) -> None:
    """`grad += dlogits.T @ hidden`, in blocks."""
    rows = max(1, _BLOCK // grad_VD.shape[1])
    for start in range(0, grad_VD.shape[0], rows):
        block = dlogits_CV[:, start : start + rows]
        # The narrow operand first, see `weight_gradient`.
        grad_VD[start : start + rows] += product_nt_fp32(hidden_CD.t(), block.t()).t()


def top_of(logits_CV: torch.Tensor, axis: Axis) -> torch.Tensor:
    """The largest logit of each token over all ranks [C]."""
    empty = logits_CV.shape[1] == 0
    top_C = logits_CV.new_full((logits_CV.shape[0],), float("-inf")) if empty else logits_CV.amax(1)
    return all_reduce(top_C, axis, dist.ReduceOp.MAX)


def picked(logits_CV: torch.Tensor, local_C: torch.Tensor, mine_C: torch.Tensor) -> torch.Tensor:
    """The logit of each token where it is on this rank, else 0 [C]."""
    if logits_CV.shape[1] == 0:
        return logits_CV.new_zeros(logits_CV.shape[0])
    return logits_CV.gather(1, local_C[:, None]).squeeze(1).masked_fill_(~mine_C, 0.0)
