"""Weight gradients put off: the backward hands the input's gradient on at once, the weight's is computed when there is
nothing more urgent to do.

The split that zero-bubble schedules fill their gaps with (Qi et al. 2023, Zero Bubble Pipeline Parallelism): a stage's
backward is two products of equal size a linear layer, and the stage before waits for the first one only.

Put off are the products of linear layers. Norm weights and biases are computed at once: they are vectors, and their
sums read what the input's gradient has just read. The table of the embedding too: nothing comes before it. The head's
weight gradient is made in the *forward*, chunk by chunk with the logits it needs (`linear_loss.py`); to put it off
would mean to keep [T, V] logits or to make them again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

_KEY = "later"


class Later:
    """The queue of one pipeline stage. Its parameters know it, so that layers need not be told."""

    def __init__(self, params: Iterable[nn.Parameter]) -> None:
        self._deferring = False
        self._queue: list[tuple[torch.Tensor, Callable[[], torch.Tensor]]] = []
        for param in params:
            vars(param)[_KEY] = self

    @contextmanager
    def deferring(self, defer: bool = True) -> Iterator[None]:
        """Inside, weight gradients are queued instead of computed (if `defer`)."""
        assert not self._queue, "the weight gradients of the micro-batch before were not taken"
        self._deferring = defer
        try:
            yield
        finally:
            self._deferring = False

    @property
    def deferring_now(self) -> bool:
        """Whether `put` would queue."""
        return self._deferring

    def put(self, weight: torch.Tensor, compute: Callable[[], torch.Tensor]) -> bool:
        """Queue a weight's gradient; False where it must be computed now."""
        if self._deferring:
            self._queue.append((weight, compute))
        return self._deferring

    def take(self) -> Callable[[], None]:
        """What was queued since the last call, as a function that computes it into `.grad`. It runs once."""
        taken, self._queue = self._queue, []

        @torch.no_grad()
        def run() -> None:
            while taken:
                weight, compute = taken.pop(0)  # what it kept is freed as soon as it is used
                grad = compute()
                if weight.grad is None:
                    weight.grad = grad
                else:
                    weight.grad += grad

        return run


def put_off(weight: torch.Tensor) -> bool:
    """Whether a gradient of `weight` asked for now would be computed later."""
    later = vars(weight).get(_KEY)
    return later is not None and later.deferring_now


def weight_gradient_now_or_later(weight: torch.Tensor, compute: Callable[[], torch.Tensor]) -> torch.Tensor | None:
    """For the backward of a linear layer: the gradient of its leaf `weight`, or None if `compute` runs later.

    `weight` is the parameter itself, as the forward got it: what `save_for_backward` gives back may be an alias
    without its attributes (under activation checkpointing). `compute` keeps what it needs alive and runs at most once,
    without autograd and perhaps outside of the autocast of the backward.
    """
    later = vars(weight).get(_KEY)
    return None if later is not None and later.put(weight, compute) else compute()
