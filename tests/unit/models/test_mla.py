"""Latent attention: back ends against eager, rotation against complex numbers, layouts against one process."""

import dataclasses
import math
import sys
import types
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from models import build, problems
from models.blocks.attention import Packing
from models.blocks.mla import LatentHeads, Projected, eager, flash_attn, sdpa, sdpa_pieces
from models.blocks.rope import Rope, rotate_pairs_into, score_factor, turned_pairs
from models.config import MLAConfig, RopeConfig
from models.flops import matmul_params, step_flops
from parallel.config import ParallelConfig
from parallel.sharding import shard_of
from tests.mla_cases import LATENT, OPTIONS, run
from tests.pool import Pool

BackEnd = Callable[[Projected, Packing, LatentHeads], torch.Tensor]
LAYOUTS = [(0, 24), (0, 8, 16, 24), (0, 3, 11, 12, 24), (0, 5, 5, 24)]
SIZES = {
    "smaller_values": MLAConfig(kv_rank=8, nope_dim=6, rope_dim=4, value_dim=7),
    "equal": MLAConfig(kv_rank=8, nope_dim=5, rope_dim=4, value_dim=9),
    "larger_values": MLAConfig(kv_rank=8, nope_dim=4, rope_dim=2, value_dim=8),
}


def setting(borders: tuple[int, ...], sizes: MLAConfig) -> tuple[Projected, Packing, LatentHeads]:
    """Random q, kv and shared rope key of three heads."""
    cfg = dataclasses.replace(LATENT, mla=sizes, head_dim=sizes.nope_dim + sizes.rope_dim)
    lengths = [b - a for a, b in pairwise(borders)]
    cos, sin = Rope(cfg).tables(torch.cat([torch.arange(n) for n in lengths]), lengths)
    draw = torch.Generator().manual_seed(0)
    widths = (3 * cfg.head_dim, 3 * (sizes.nope_dim + sizes.value_dim), sizes.rope_dim)
    parts = Projected(*(torch.randn(borders[-1], width, generator=draw) for width in widths))
    return parts, Packing.of(cos, sin, borders, {None}), LatentHeads(3, sizes, 0.4)


@pytest.mark.parametrize("back_end", [sdpa, sdpa_pieces])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("borders", LAYOUTS)
def test_equals_eager(borders: tuple[int, ...], sizes: str, back_end: BackEnd) -> None:
    """Forward and all three gradients, fp32, 1e-5."""
    parts, packing, heads = setting(borders, SIZES[sizes])
    seed = torch.randn(borders[-1], 3 * SIZES[sizes].value_dim)
    found = []
    for each in (eager, back_end):
        leaves = [part.clone().requires_grad_() for part in parts]
        out = each(Projected(*(leaf * 1.0 for leaf in leaves)), packing, heads)  # the back end may overwrite its input
        out.backward(seed)
        found.append([out, *(leaf.grad for leaf in leaves)])
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_eager_equals_torch_on_one_document() -> None:
    """The reference itself: keys joined by hand, rotation by complex numbers, torch's own attention."""
    (q, kv, rope_key), packing, heads = setting((0, 9), SIZES["smaller_values"])
    turn = torch.complex(packing.cos_TK, packing.sin_TK)[:, None]

    def turned(x: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous())
        return torch.view_as_real(pairs * turn).flatten(-2)

    q, kv = q.view(9, 3, 10), kv.view(9, 3, 13)
    q = torch.cat([q[..., :6], turned(q[..., 6:])], -1)
    k = torch.cat([kv[..., :6], turned(rope_key.view(9, 1, 4)).expand(9, 3, 4)], -1)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, kv[..., 6:]))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.4)[0].transpose(0, 1).flatten(1)
    got = eager(setting((0, 9), SIZES["smaller_values"])[0], packing, heads)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("back_end", [eager, sdpa, sdpa_pieces])
def test_a_document_never_sees_another(back_end: BackEnd) -> None:
    parts, packing, heads = setting((0, 10, 24), SIZES["smaller_values"])
    before = back_end(Projected(*(part.clone() for part in parts)), packing, heads)
    for part in parts:
        part[:10] += 5.0
    after = back_end(parts, packing, heads)
    assert torch.equal(after[10:], before[10:])
    assert not torch.allclose(after[:10], before[:10])


def test_flash_attn_is_asked_rightly(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with the varlen meaning that, as the real one, refuses heads of unequal size."""

    def varlen(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_q: torch.Tensor, cu_k: torch.Tensor,
        max_q: int, max_k: int, causal: bool, softmax_scale: float,
    ) -> torch.Tensor:  # fmt: skip
        assert q.shape == k.shape == v.shape and torch.equal(cu_q, cu_k) and max_q == max_k == 14 and causal
        outs = []
        for a, b in pairwise(cu_q.tolist()):
            rows_q, rows_k, rows_v = (x[a:b].transpose(0, 1)[None] for x in (q, k, v))
            out = F.scaled_dot_product_attention(rows_q, rows_k, rows_v, is_causal=True, scale=softmax_scale)
            outs.append(out[0].transpose(0, 1))
        return torch.cat(outs)

    monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace(flash_attn_varlen_func=varlen))
    for sizes in SIZES.values():
        parts, packing, heads = setting((0, 10, 24), sizes)
        expected = eager(parts, packing, heads)
        torch.testing.assert_close(flash_attn(parts, packing, heads), expected, rtol=0, atol=2e-6)


def test_rotation_of_pairs_is_a_complex_product_and_undone_by_its_mirror() -> None:
    draw = torch.Generator().manual_seed(1)
    x, angle = torch.randn(5, 2, 8, generator=draw), torch.randn(5, 4, generator=draw)
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]
    expected = torch.view_as_real(torch.view_as_complex(x.view(5, 2, 4, 2)) * turn).flatten(-2)
    torch.testing.assert_close(turned_pairs(x, angle.cos(), angle.sin()), expected)
    same = x.clone()
    rotate_pairs_into(same, same, angle.cos(), angle.sin())
    torch.testing.assert_close(same, expected)
    rotate_pairs_into(same, same, angle.cos(), -angle.sin())
    torch.testing.assert_close(same, x)


def test_score_factor_is_mscale_squared() -> None:
    """V2's own numbers: 0.1 x 0.707 x ln 40 + 1 = 1.26080...; without mscale_all_dim, or without yarn, nothing."""
    yarn = RopeConfig(scaling="yarn", factor=40.0, mscale=0.707, mscale_all_dim=0.707)
    assert score_factor(yarn) == pytest.approx((0.0707 * math.log(40) + 1) ** 2)
    assert score_factor(dataclasses.replace(yarn, mscale_all_dim=None)) == 1.0
    assert score_factor(RopeConfig()) == 1.0


@pytest.mark.parametrize("option", [name for name, cfg in OPTIONS.items() if cfg.moe is None])
def test_flops_count_every_weight_of_the_layers(option: str) -> None:
    cfg = OPTIONS[option]
    weights = {
        name: p.numel() for name, p in build(cfg).named_parameters() if name.startswith("layers.") and p.ndim == 2
    }
    assert matmul_params(cfg) == sum(weights.values())
    # Two documents of one token: each head scores one pair (10 numbers) and takes one value (8), three times over.
    attended = 2 * cfg.num_layers * 4 * 2 * (10 + 8) * 3
    assert step_flops(cfg, [1, 1], 0) == 6 * 2 * sum(weights.values()) + attended


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"head_dim": 16}, "head_dim"),
        ({"num_kv_heads": 2}, "num_kv_heads"),
        ({"qk_norm": True}, "qk_norm"),
        ({"sliding_window": 8}, "sliding_window"),
        ({"mla": MLAConfig(12, 7, 3, 8)}, "mla.rope_dim"),
        ({"mla": MLAConfig(0, 6, 4, 8)}, "mla.kv_rank"),
        ({"mla": None}, "mla"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"qkv_bias": True}, "attention_out_bias"),
    ],
)
def test_sizes_that_cannot_work_are_told(changes: dict[str, Any], key: str) -> None:
    assert problems(LATENT) == []
    assert [problem[0] for problem in problems(dataclasses.replace(LATENT, **changes))] == [key]


def compare(option: str, layout: ParallelConfig, pool: Pool, recompute: str = "none") -> None:
    """What the ranks have, joined, against one process; 1e-6 of each tensor's largest value (or of 1)."""
    whole, ranks = run(option, None), pool.run(run, option, layout, recompute)
    params = dict(build(OPTIONS[option]).named_parameters())
    assert set(ranks[0]) == set(whole) == set(params) | {"here", "loss", "losses", "logits"}
    for name, expected in whole.items():
        shard = shard_of(params[name]) if name in params else None
        if name == "here":
            continue
        if name in ("losses", "logits"):
            pairs = [(found[name], expected[found["here"]]) for found in ranks]
        elif shard is None or shard.dim is None:
            pairs = [(found[name], expected) for found in ranks]
        else:
            cut = [found[name] for found in ranks[: layout.tp]]
            assert layout.tp == 1 or cut[0].shape != expected.shape, f"{name} was not cut"
            pairs = [(shard.merge(dict(zip(shard.cuts(layout.tp, 1), cut, strict=True))), expected)]
        tolerance = 1e-6 * max(1.0, expected.abs().max().item())
        for got, want in pairs:
            torch.testing.assert_close(got, want, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("option", OPTIONS)
def test_cut_over_tp_equals_whole(
    pool: Callable[[int], Pool], option: str, sequence_parallel: bool, ranks: int
) -> None:
    """Loss, logits and every gradient; 23 tokens, so that sequence parallel ends in padding."""
    compare(option, ParallelConfig(tp=ranks, sequence_parallel=sequence_parallel), pool(ranks))


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recompute_changes_nothing_when_cut(pool: Callable[[int], Pool], recompute: str) -> None:
    compare("latent_queries", ParallelConfig(tp=2, sequence_parallel=True), pool(2), recompute)


@pytest.mark.parametrize("context", ["ulysses", "ring"])
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("option", ["latent_queries", "experts"])
def test_context_parallel_equals_whole(pool: Callable[[int], Pool], option: str, context: Any, tp: int) -> None:
    """With tp=2 under sequence parallel."""
    compare(option, ParallelConfig(tp=tp, cp=2, context=context, sequence_parallel=tp > 1), pool(2 * tp))
