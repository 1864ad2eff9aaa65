"""Losses of features that are compared with those of the whole global batch: however it is cut over ranks and
micro-batches, the loss and its gradient are those of one.

With one micro-batch a rank its forward gathers the features of all ranks. With several, all are encoded first without
a graph, the gradient of the global loss with respect to every feature is taken, and each micro-batch is encoded again
with a stand-in for the loss whose gradient that is: features times their gradients.

Source: Gao et al. 2021, Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup (GradCache).
Legend: N samples of this rank (or a micro-batch), M of all ranks and micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from parallel.features import Shares

ROWS_AT_ONCE = 1024
"""Own samples that are compared with all others at a time where the features are given: bounds the memory."""


@dataclass(frozen=True)
class Compared:
    """Features of samples and of all they are compared with."""

    own: tuple[torch.Tensor, ...]
    """[N, ...] each, such as of pictures and of texts."""
    everyone: tuple[torch.Tensor, ...]
    """[M, ...] each, the own ones among them."""
    first: int
    """Own sample n is sample `first + n` of all."""
    scalars: tuple[torch.Tensor, ...]
    """Learnt numbers that the loss reads besides (scale, bias)."""


LossOf = Callable[[Compared], torch.Tensor]
"""The loss of each own sample, [N]."""


@dataclass(frozen=True)
class Pull:
    """The gradient of the global batch's summed loss with respect to what one micro-batch brings."""

    features: tuple[torch.Tensor, ...]
    scalars: tuple[torch.Tensor, ...]
    """This rank's share, in its first micro-batch; 0 in the others. Ranks are summed where gradients are."""

    def stand_in(self, features: Sequence[torch.Tensor], scalars: Sequence[torch.Tensor]) -> torch.Tensor:
        """A number whose gradient is that of the loss; its value says nothing."""
        pairs = zip((*features, *scalars), (*self.features, *self.scalars), strict=True)
        return sum(((x * grad).sum() for x, grad in pairs), start=torch.zeros((), device=features[0].device))


def compared(features: Sequence[torch.Tensor], scalars: Sequence[torch.Tensor], shares: Shares) -> Compared:
    """The only micro-batch of this rank beside those of the others, differentiable."""
    everyone = tuple(shares.gather(x) for x in features)
    return Compared(tuple(features), everyone, shares.first, tuple(scalars))


def feature_gradients(
    loss_of: LossOf, features: Sequence[Sequence[torch.Tensor]], scalars: Sequence[torch.Tensor], shares: Shares
) -> tuple[list[torch.Tensor], list[Pull]]:
    """Losses and gradients of the global batch, by micro-batch.

    Args:
        loss_of: the loss of samples that are compared with all.
        features: of each micro-batch, without a graph.
        scalars: the same in all micro-batches.
        shares: samples of this rank's micro-batches together, and of the other ranks'.

    Returns:
        The loss of each sample [N], and the gradient of the sum over all samples of all ranks, of each micro-batch.
    """
    joined, sizes = _joined(features), [len(parts[0]) for parts in features]
    own = tuple(x.clone().requires_grad_() for x in joined)
    everyone = tuple(shares.gather(x).clone().requires_grad_() for x in joined)
    numbers = tuple(x.detach().clone().requires_grad_() for x in scalars)
    losses = []
    with torch.enable_grad():
        for part in _parts(Compared(own, everyone, shares.first, numbers)):
            loss_N = loss_of(part)
            loss_N.sum().backward()
            losses.append(loss_N.detach())
    grads = [_grad(mine) + shares.sum_mine(_grad(every)) for mine, every in zip(own, everyone, strict=True)]
    by_batch = zip(*(grad.split(sizes) for grad in grads), strict=True)
    of_numbers = tuple(_grad(x) for x in numbers)
    nothing = tuple(torch.zeros_like(x) for x in of_numbers)
    pulls = [Pull(tuple(parts), nothing if at else of_numbers) for at, parts in enumerate(by_batch)]
    return list(torch.cat(losses).split(sizes)), pulls


@torch.no_grad()
def of_all(
    ask: Callable[[Compared], Sequence[torch.Tensor]],
    features: Sequence[Sequence[torch.Tensor]],
    scalars: Sequence[torch.Tensor],
    shares: Shares,
) -> list[list[torch.Tensor]]:
    """What ``ask`` says of each sample ([N] tensors) compared with all, by micro-batch; without gradients."""
    joined, sizes = _joined(features), [len(parts[0]) for parts in features]
    whole = Compared(joined, tuple(shares.gather(x) for x in joined), shares.first, tuple(scalars))
    told = [torch.cat(parts) for parts in zip(*(ask(part) for part in _parts(whole)), strict=True)]
    return [list(parts) for parts in zip(*(x.split(sizes) for x in told), strict=True)]


def _joined(features: Sequence[Sequence[torch.Tensor]]) -> tuple[torch.Tensor, ...]:
    return tuple(torch.cat([x.detach() for x in parts]) for parts in zip(*features, strict=True))


def _parts(whole: Compared) -> list[Compared]:
    """The own samples some at a time, at least once."""
    return [
        Compared(tuple(x[at : at + ROWS_AT_ONCE] for x in whole.own), whole.everyone, whole.first + at, whole.scalars)
        for at in range(0, max(1, len(whole.own[0])), ROWS_AT_ONCE)
    ]


def _grad(leaf: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
