"""The router against transformers' routers and against loops over tokens; auxiliary losses against plain autograd."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from transformers import DeepseekV2Config, DeepseekV3Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from models.blocks.router import Ledger, Router, Tokens, within_capacity
from models.config import MoEConfig
from parallel.sharding import SINGLE

D, BORDERS = 16, (0, 7, 8, 30)
MOE = MoEConfig(num_experts=8, top_k=3, expert_size=8, balance_loss=0.3, z_loss=0.2)
CPU = torch.device("cpu")


def tokens(channel_T: torch.Tensor | None = None) -> Tokens:
    return Tokens(BORDERS, BORDERS[-1], CPU, channel_T, SINGLE)


def make_router(moe: MoEConfig, bias: bool = False) -> Router:
    draw = torch.Generator().manual_seed(1)
    router = Router(D, moe, SINGLE)
    with torch.no_grad():
        router.weight.copy_(torch.randn(router.weight.shape, generator=draw))
        if bias and router.bias is not None:
            router.bias.copy_(torch.randn(moe.num_experts, generator=draw))
    return router


def inputs() -> torch.Tensor:
    return torch.randn(BORDERS[-1], D, generator=torch.Generator().manual_seed(2))


def scattered(experts: torch.Tensor, weights: torch.Tensor, size: int) -> torch.Tensor:
    """[T, E] with each chosen expert's weight, whatever the order of the choices."""
    return torch.zeros(len(experts), size).scatter(1, experts, weights)


def ledger(moe: MoEConfig, weight: float = 1.0, channels: int = 2, load: Any = None) -> Ledger:
    load_E = torch.ones(moe.num_experts) if load is None else torch.tensor(load)
    zeros = (torch.zeros(channels, moe.num_experts + 3), torch.zeros(moe.num_experts + 2))
    return Ledger(weight, load_E, *(part.double() for part in zeros))


def same_routes(ours: Router, theirs: Any) -> None:
    """The same experts with the same weights (1e-6), after theirs got our weights and biases."""
    theirs.weight.data.copy_(ours.weight)
    if ours.bias is not None:
        theirs.e_score_correction_bias.copy_(ours.bias)
    choice = ours(inputs(), None, tokens())
    _, weights, experts = theirs(inputs())
    torch.testing.assert_close(
        scattered(choice.expert_Tk, choice.weight_Tk, 8), scattered(experts, weights, 8), rtol=0, atol=1e-6
    )


SIZES: dict[str, Any] = {"hidden_size": D, "num_attention_heads": 4, "n_routed_experts": 8, "num_experts_per_tok": 3}


@pytest.mark.parametrize("method", ["greedy", "group_limited_greedy"])
def test_deepseek_v2_routes_alike(method: str) -> None:
    limited = method != "greedy"
    groups: dict[str, Any] = {"n_group": 4, "topk_group": 2} if limited else {}
    theirs = DeepseekV2TopkRouter(DeepseekV2Config(**SIZES, routed_scaling_factor=1.7, topk_method=method, **groups))
    own: dict[str, Any] = {"groups": 4, "groups_kept": 2} if limited else {}
    same_routes(make_router(dataclasses.replace(MOE, normalize=False, scale=1.7, **own)), theirs)


@pytest.mark.parametrize("normalize", [True, False])
def test_deepseek_v3_routes_alike(normalize: bool) -> None:
    """Biases as large as the scores: they choose, and do not weigh."""
    theirs = DeepseekV3TopkRouter(
        DeepseekV3Config(**SIZES, routed_scaling_factor=2.5, n_group=4, topk_group=2, norm_topk_prob=normalize)
    )
    moe = dataclasses.replace(
        MOE, score="sigmoid", normalize=normalize, scale=2.5, groups=4, groups_kept=2, group_score="top2_sum",
        correction_bias=True,
    )  # fmt: skip
    ours = make_router(moe, bias=True)
    assert ours.bias is not None and ours.bias.abs().max() > 1
    same_routes(ours, theirs)


def aux_by_hand(router: Router, x: torch.Tensor, load_E: torch.Tensor) -> torch.Tensor:
    """Sum over tokens of both losses, document by document and expert by expert."""
    moe = router.moe
    logits = x @ router.weight.T
    scores = logits.softmax(1) if moe.score == "softmax" else logits.sigmoid()
    probs = scores / scores.sum(1, keepdim=True)
    chosen = scores.topk(moe.top_k, 1)[1]
    total = moe.z_loss * logits.exp().sum(1).log().square().sum()
    for a, b in pairwise(BORDERS):
        for e in range(moe.num_experts):
            share = (chosen[a:b] == e).sum() / (moe.top_k * (b - a)) * moe.num_experts
            f = share if moe.balance_over == "sequence" else load_E[e]
            total = total + moe.balance_loss * (b - a) * f * probs[a:b, e].mean()
    return total


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("over", ["global", "sequence"])
def test_auxiliary_gradients_equal_plain_autograd(over: Any, score: Any) -> None:
    """Relative 1e-5; the main loss's gradient is zero here, so what arrives is the losses' own."""
    moe = dataclasses.replace(MOE, score=score, balance_over=over)
    router, load = make_router(moe), [0.5, 1.5, 0.2, 1.8, 1, 1, 1.25, 0.75]
    x = inputs().requires_grad_()
    expected = torch.autograd.grad(aux_by_hand(router, x, torch.tensor(load)), [x, router.weight])
    router.ledger = ledger(moe, weight=0.25, load=load)
    choice = router(x, None, tokens())
    got = torch.autograd.grad(choice.weight_Tk, [x, router.weight], torch.zeros_like(choice.weight_Tk))
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, 0.25 * theirs, rtol=1e-5, atol=1e-6 * theirs.abs().max().item())


def test_ledger_counts_by_channel_once_and_only_in_the_backward() -> None:
    moe = dataclasses.replace(MOE, capacity=0.5, balance_over="sequence")
    router, channel_T = make_router(moe), torch.arange(BORDERS[-1]) % 2
    book = router.ledger = ledger(moe)
    with torch.no_grad():
        router(inputs(), None, tokens(channel_T))
    choice = router(inputs(), None, tokens(channel_T))
    assert book.by_channel.abs().sum() == 0, "a forward alone counts nothing"
    choice.weight_Tk.sum().backward()
    assert choice.kept_Tk is not None
    probs = (inputs() @ router.weight.T).softmax(1).double()
    for channel in range(2):
        mine = channel_T == channel
        expected = [(choice.expert_Tk[mine] == e).sum().item() for e in range(8)]
        assert book.by_channel[channel, :8].tolist() == expected
        assert book.by_channel[channel, 8] == mine.sum()
        entropy = -(probs[mine] * probs[mine].log()).sum()
        torch.testing.assert_close(book.by_channel[channel, 9], entropy, rtol=1e-6, atol=0)
        assert book.by_channel[channel, 10] == (~choice.kept_Tk[mine]).sum() > 0
    torch.testing.assert_close(book.overall[:8], probs.sum(0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("capacity", [0.1, 0.7, 1.0, 3.0])
def test_capacity_serves_the_first_tokens_of_each_document(capacity: float) -> None:
    moe = dataclasses.replace(MOE, capacity=capacity)
    expert_Tk = make_router(MOE)(inputs(), None, tokens()).expert_Tk
    kept_Tk = within_capacity(expert_Tk, tokens(), moe)
    for a, b in pairwise(BORDERS):
        room = [math.ceil(capacity * 3 * (b - a) / 8)] * 8
        for t in range(a, b):
            for j, expert in enumerate(expert_Tk[t].tolist()):
                assert kept_Tk[t, j] == (room[expert] > 0)
                room[expert] -= 1
    assert (capacity == 3.0) == bool(kept_Tk.all())


def test_scores_are_fp32_under_autocast() -> None:
    """1e-6 between bf16 autocast and fp32, for inputs that bf16 holds exactly."""
    router, x = make_router(MOE), inputs().bfloat16()
    plain = router(x.float(), None, tokens())
    with torch.autocast("cpu", torch.bfloat16):
        cast = router(x, None, tokens())
    torch.testing.assert_close(cast.weight_Tk, plain.weight_Tk, rtol=0, atol=1e-6)
    assert torch.equal(cast.expert_Tk, plain.expert_Tk)
