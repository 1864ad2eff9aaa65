"""Weight gradients that wait come out as those that do not, each once."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from parallel.later import Later, weight_gradient_now_or_later
from parallel.matmul import Again, linear


def run(later: Later | None, weight: nn.Parameter, bias: nn.Parameter, defer: bool) -> torch.Tensor:
    """Forward and backward of one linear layer, twice over with other inputs; the input's gradients."""
    grads = []
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(7, 6, generator=generator).requires_grad_()
        out = linear(x, weight, bias, again=Again(lambda t: t * 1.0, (x.detach(),)) if seed == 2 else None)
        if later is None:
            out.square().sum().backward()
        else:
            with later.deferring(defer):
                out.square().sum().backward()
            runner = later.take()
            if defer:
                assert weight.grad is None or seed == 2
            runner()
            runner()  # what ran is gone
        assert x.grad is not None
        grads.append(x.grad)
    return torch.cat(grads)


@pytest.mark.parametrize("defer", [False, True])
def test_gradients_are_those_of_a_plain_backward(defer: bool) -> None:
    params = [nn.Parameter(torch.randn(5, 6, generator=torch.Generator().manual_seed(0))), nn.Parameter(torch.ones(5))]
    plain = [nn.Parameter(p.detach().clone()) for p in params]
    got = run(Later(params), params[0], params[1], defer)
    want = run(None, plain[0], plain[1], False)
    assert torch.equal(got, want)
    for p, q in zip(params, plain, strict=True):
        assert p.grad is not None and q.grad is not None
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=0)


def test_a_full_backward_never_waits() -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    later = Later([weight])
    with later.deferring(False):
        assert weight_gradient_now_or_later(weight, lambda: torch.ones(2, 2)) is not None
    assert weight_gradient_now_or_later(weight, lambda: torch.ones(2, 2)) is not None


def test_a_parameter_outside_a_pipeline_never_waits() -> None:
    assert weight_gradient_now_or_later(torch.ones(1), lambda: torch.full((1,), 3.0)) == torch.full((1,), 3.0)


def test_a_queue_that_was_not_taken_is_told() -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    later = Later([weight])
    with later.deferring():
        assert weight_gradient_now_or_later(weight, lambda: torch.ones(2, 2)) is None
    with pytest.raises(AssertionError, match="not taken"), later.deferring():
        pass


def test_what_waits_does_not_build_a_graph_and_adds_up() -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    later = Later([weight])
    for _ in range(2):
        with later.deferring():
            weight_gradient_now_or_later(weight, lambda: weight * 2.0)
        later.take()()
    assert weight.grad is not None and not weight.grad.requires_grad
    assert torch.equal(weight.grad, torch.full((2, 2), 4.0))
