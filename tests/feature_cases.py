"""What the pools run of rows that are gathered."""

from __future__ import annotations

import torch

from parallel.features import Shares
from tests.cases import here


def gathered(sizes: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows of this rank, all rows, and the gradient of (rank + 1) x the sum of their cubes on every rank."""
    axis = here().data
    x = torch.randn(sizes[axis.rank], 3, 2, generator=torch.Generator().manual_seed(axis.rank)).requires_grad_()
    shares = Shares.of(len(x), axis, torch.device("cpu"))
    assert shares.sizes == sizes and shares.first == sum(sizes[: axis.rank]) and shares.total == sum(sizes)
    everyone = shares.gather(x)
    ((axis.rank + 1) * (everyone**3).sum()).backward()
    assert x.grad is not None
    return x.detach(), everyone.detach(), x.grad
