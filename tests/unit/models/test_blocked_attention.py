"""Attention made of products: against the plain formula in fp64, whatever its blocks are, and where it is used."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from models.blocks import blocked_attention, kernels
from models.blocks.attention import Heads, Packing, eager, sdpa
from models.blocks.blocked_attention import attend, attend_backward, pays
from models.blocks.rope import Rope
from models.config import ModelConfig

TOLERANCE = 1e-6  # of the norm; the flash kernel has 2e-7 to 3e-7 in these cases
Four = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def rows(docs: int, length: int, heads: int, size: int) -> torch.Tensor:
    """[docs, heads, length, size] as it lies in a fused buffer: rows of tokens with gaps between them."""
    return torch.randn(docs * length, heads + 1, size)[:, 1:].unflatten(0, (docs, length)).transpose(1, 2)


def inputs(queries: int, keys: int, heads: int, groups: int, value: int = 32, docs: int = 2) -> Four:
    """q, k, v and the output's gradient; K = 32."""
    torch.manual_seed(0)
    sizes = ((queries, heads, 32), (keys, groups, 32), (keys, groups, value), (queries, heads, value))
    q, k, v, grad = (rows(docs, *size) for size in sizes)
    return q, k, v, grad


def plain(q: torch.Tensor, k: torch.Tensor, causal: bool, scale: float) -> torch.Tensor:
    """Scores of every pair."""
    scores = scale * q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(2, 3)
    return scores.masked_fill(torch.ones_like(scores).triu(1).bool(), float("-inf")) if causal else scores


def assert_equals_plain(tensors: Four, causal: bool, scale: float | None) -> None:
    """Output, log-sum-exp and the three gradients."""
    q, k, v, grad = tensors
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    factor = q.shape[3] ** -0.5 if scale is None else scale
    scores = plain(wide[0], wide[1], causal, factor)
    expected = scores.softmax(-1) @ wide[2].repeat_interleave(q.shape[1] // k.shape[1], 1)
    expected.backward(grad.double())
    out, log_sum = attend(q, k, v, causal, scale)
    found = [out, log_sum, *attend_backward(grad, q, k, v, out, log_sum, causal, scale)]
    wanted = [expected, scores.logsumexp(-1), *(leaf.grad for leaf in wide)]
    for name, got, want in zip(("out", "log-sum-exp", "q", "k", "v"), found, wanted, strict=True):
        assert want is not None and got.shape == want.shape
        off = ((got.double() - want).norm() / want.norm()).item()
        assert off < TOLERANCE, f"{name}: {off:.1e}"


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [2, 64, 331])
def test_equals_the_formula(length: int, causal: bool, heads: int, groups: int) -> None:
    assert_equals_plain(inputs(length, length, heads, groups), causal, None)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("keys", [16, 50, 1000])
def test_keys_in_many_ranges(monkeypatch: pytest.MonkeyPatch, keys: int, causal: bool) -> None:
    """Ranges shorter than a block, not a multiple of one, and one range for all."""
    monkeypatch.setattr(blocked_attention, "KEYS", keys)
    monkeypatch.setattr(blocked_attention, "LARGEST", 40)
    assert_equals_plain(inputs(210, 210, 4, 2), causal, 0.3)


def test_other_keys_and_a_value_size_of_its_own() -> None:
    """As in a ring (more or fewer keys than queries) and in latent attention."""
    assert_equals_plain(inputs(70, 300, 4, 2, value=24), False, None)
    assert_equals_plain(inputs(300, 70, 4, 2, value=40), False, None)


@pytest.mark.parametrize("keys", [50, 200])
def test_scores_far_apart(monkeypatch: pytest.MonkeyPatch, keys: int) -> None:
    """Weights from 1 down to underflow; scores of hundreds have an absolute error of their own, so an easier bound."""
    monkeypatch.setattr(blocked_attention, "KEYS", keys)
    monkeypatch.setattr(blocked_attention, "LARGEST", 40)
    q, k, v, grad = inputs(200, 200, 2, 1)
    q = 300 * q
    out, log_sum = attend(q, k, v, True)
    scores = plain(q.double(), k.double(), True, 32**-0.5)
    torch.testing.assert_close(log_sum.double(), scores.logsumexp(-1), rtol=1e-6, atol=1e-3)
    torch.testing.assert_close(out.double(), scores.softmax(-1) @ v.double(), rtol=0, atol=1e-3)
    for found in attend_backward(grad, q, k, v, out, log_sum, True):
        assert found.isfinite().all()


def test_backward_through_a_part_of_the_keys() -> None:
    """With the output and log-sum-exp over all of them, as the ring hands them over."""
    q, k, v, grad = inputs(150, 150, 4, 2)
    out, log_sum = attend(q, k, v, False)
    whole = attend_backward(grad, q, k, v, out, log_sum, False)
    parts = [attend_backward(grad, q, k[:, :, r], v[:, :, r], out, log_sum, False) for r in (slice(60), slice(60, 150))]
    torch.testing.assert_close(parts[0][0] + parts[1][0], whole[0])
    for i in (1, 2):
        torch.testing.assert_close(torch.cat([parts[0][i], parts[1][i]], 2), whole[i])


def test_packed_documents_of_which_one_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the back end, rotation included, against eager attention; the long document alone goes this way."""
    went = []

    def seen(q: torch.Tensor, k: torch.Tensor) -> bool:
        went.append((q.shape[2], pays(q, k)))
        return went[-1][1]

    monkeypatch.setattr(kernels.blocked_attention, "pays", seen)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    borders = (0, 100, 700, 700, 1000)
    cfg = ModelConfig("qwen2", 8, 8, 8, 1, 4, 2, 32, 1024)
    lengths = [b - a for a, b in pairwise(borders)]
    cos, sin = Rope(cfg).tables(torch.cat([torch.arange(n) for n in lengths]), lengths)
    packing, heads = Packing.of(cos, sin, borders, {None}), Heads(4, 2, 32, None)
    torch.manual_seed(0)
    qkv, grad = torch.randn(1000, 256), torch.randn(1000, 128)
    found = []
    for run in (eager, sdpa):
        leaf = qkv.clone().requires_grad_()
        out = run(leaf * 1.0, packing, heads)
        out.backward(grad)
        found.append((out.detach(), leaf.grad))
    for want, got in zip(*found, strict=True):
        assert want is not None and got is not None
        assert ((got - want).norm() / want.norm()).item() < 2 * TOLERANCE
    assert went == [(100, False), (600, True), (300, False)] * 2


def test_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    long, short = torch.empty(1, 8, 512, 64), torch.empty(1, 8, 128, 64)
    assert pays(long, long) and not pays(short, short) and not pays(long, short[:, :, :100])
    assert not pays(long.double(), long.double()) and not pays(long.bfloat16(), long.bfloat16())
    assert not pays(long.to("meta"), long.to("meta")) and not pays(long[..., :16], long[..., :16])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert not pays(long, long), "each thread needs enough to do"
