"""Every attention back end against the eager one: packed documents, windows, grouped heads; and what it costs."""

import sys
import types
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from models.blocks.attention import Heads, Packing, eager, flash_attn, sdpa, sdpa_pieces
from models.blocks.pieces import QUERY_BLOCK, pieces_of
from models.blocks.rope import Rope
from models.config import ModelConfig

BackEnd = Callable[[torch.Tensor, Packing, Heads], torch.Tensor]
CPU = torch.device("cpu")
LAYOUTS = [(0, 24), (0, 8, 16, 24), (0, 3, 11, 12, 24), (0, 5, 5, 24), (0, 700)]


def setting(borders: tuple[int, ...], window: int | None, groups: int) -> tuple[torch.Tensor, Packing, Heads]:
    cfg = ModelConfig("qwen2", 8, 8, 8, 1, 4, groups, 8, 1024)
    lengths = [b - a for a, b in pairwise(borders)]
    cos, sin = Rope(cfg).tables(torch.cat([torch.arange(n) for n in lengths]), lengths)
    qkv = torch.randn(borders[-1], (4 + 2 * groups) * 8, generator=torch.Generator().manual_seed(0))
    return qkv, Packing.of(cos, sin, borders, {window}), Heads(4, groups, 8, window)


def sdpa_public(qkv: torch.Tensor, packing: Packing, heads: Heads) -> torch.Tensor:
    """The path other devices take, run on the CPU."""
    return sdpa_pieces(qkv, packing, heads, packing.pieces[heads.window])


@pytest.mark.parametrize("back_end", [sdpa, sdpa_public])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 1, 4, 300, 1000])
@pytest.mark.parametrize("borders", LAYOUTS)
def test_equals_eager(borders: tuple[int, ...], window: int | None, groups: int, back_end: BackEnd) -> None:
    """Forward and gradients, fp32, 2e-5."""
    qkv, packing, heads = setting(borders, window, groups)
    seed = torch.randn(borders[-1], 32)
    found = []
    for run in (eager, back_end):
        leaf = qkv.clone().requires_grad_()
        out = run(leaf * 1.0, packing, heads)  # the back end may overwrite its input
        out.backward(seed)
        found.append((out, leaf.grad))
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=2e-5)


def test_eager_equals_a_plain_softmax() -> None:
    """The reference itself, against torch's math on one document without rotation."""
    qkv, packing, heads = setting((0, 9), None, 2)
    still = Packing(torch.ones_like(packing.cos_TK), torch.zeros_like(packing.sin_TK), (0, 9), 9, packing.pieces)
    q, k, v = (x.view(9, -1, 8).transpose(0, 1) for x in qkv.split(heads.parts, 1))
    k, v = k.repeat_interleave(2, 0), v.repeat_interleave(2, 0)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = (
            F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0].transpose(0, 1).flatten(1)
        )
    torch.testing.assert_close(eager(qkv, still, heads), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("back_end", [eager, sdpa, sdpa_public])
def test_a_document_never_sees_another(back_end: BackEnd) -> None:
    qkv, packing, heads = setting((0, 10, 24), None, 2)
    before = back_end(qkv.clone(), packing, heads)
    changed = qkv.clone()
    changed[:10] += 5.0
    after = back_end(changed, packing, heads)
    assert torch.equal(after[10:], before[10:])
    assert not torch.allclose(after[:10], before[:10])


def cost(borders: tuple[int, ...], window: int | None = None) -> int:
    """Query-key pairs of all kernel calls, before causal skipping."""
    pieces = pieces_of(borders, window, CPU)
    return sum((p.q_stop - p.q_start) * (p.q_stop - p.k_start) // p.docs for p in pieces)


def test_cost_is_the_sum_of_squared_lengths() -> None:
    assert cost((0, 1024)) == 1024**2
    assert cost(tuple(range(0, 1025, 32))) == 32 * 32**2
    assert cost((0, 100, 400, 1024)) == 100**2 + 300**2 + 624**2


def test_cost_under_a_window_is_linear_in_the_length() -> None:
    assert cost((0, 8192), 16) <= 8192 * (QUERY_BLOCK + 16)
    assert cost((0, 16384), 16) <= 2.1 * cost((0, 8192), 16)
    largest = max(p.mask.numel() for p in pieces_of((0, 8192), 16, CPU) if p.mask is not None)
    assert largest <= QUERY_BLOCK * (QUERY_BLOCK + 16)


def test_neighbours_of_equal_length_share_a_call() -> None:
    pieces = pieces_of((0, 8, 16, 24, 30, 36, 44), None, CPU)
    assert [(p.q_start, p.q_stop, p.docs) for p in pieces] == [(0, 24, 3), (24, 36, 2), (36, 44, 1)]


def test_flash_attn_missing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(ValueError, match=r"needs the package flash-attn.*engine\.attention=sdpa"):
        flash_attn(*setting((0, 8), None, 2))


@pytest.mark.parametrize("window", [None, 4])
def test_flash_attn_is_asked_rightly(monkeypatch: pytest.MonkeyPatch, window: int | None) -> None:
    """A stand-in with the varlen signature and meaning, computed by torch: the arguments mean what they should."""

    def varlen(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_q: torch.Tensor, cu_k: torch.Tensor,
        max_q: int, max_k: int, causal: bool, window_size: tuple[int, int],
    ) -> torch.Tensor:  # fmt: skip
        assert cu_q.dtype is torch.int32 and torch.equal(cu_q, cu_k) and max_q == max_k == 14 and causal
        outs = []
        for a, b in pairwise(cu_q.tolist()):
            distance = torch.arange(b - a)[:, None] - torch.arange(b - a)
            seen = distance >= 0
            if window_size[0] >= 0:
                seen &= distance <= window_size[0]
            rows = [x[a:b].transpose(0, 1)[None] for x in (q, k, v)]
            out = F.scaled_dot_product_attention(rows[0], rows[1], rows[2], attn_mask=seen, enable_gqa=True)
            outs.append(out[0].transpose(0, 1))
        return torch.cat(outs)

    monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace(flash_attn_varlen_func=varlen))
    qkv, packing, heads = setting((0, 10, 24), window, 2)
    expected = eager(qkv.clone(), packing, heads)
    torch.testing.assert_close(flash_attn(qkv.clone(), packing, heads), expected, rtol=0, atol=2e-6)
