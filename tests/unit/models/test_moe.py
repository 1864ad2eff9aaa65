"""The block against a loop over tokens in fp64; recompute, put-off weight gradients, bf16."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from models import ModelConfig, Runtime, build
from models.blocks.moe import MoE
from models.blocks.router import Tokens
from models.config import MoEConfig
from models.init import InitSource
from models.routing import RouterBook
from parallel.later import Later
from parallel.materialise import materialise
from parallel.sharding import SINGLE, WHOLE
from tests.moe_cases import KINDS, QWEN2, config, micro_batches, step

CPU = torch.device("cpu")


def make_block(cfg: ModelConfig) -> MoE:
    block = MoE(cfg, SINGLE, False)
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for tensor in [*block.parameters(), *block.buffers()]:
            tensor.copy_(0.3 * torch.randn(tensor.shape, generator=draw))
    return block


def by_token(block: MoE, x: torch.Tensor, choice: Any) -> torch.Tensor:
    """Each token through each of its experts, one vector at a time, fp64."""
    params = {name: p.double() for name, p in block.named_parameters()}

    def ffn(v: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        gate, up = (gate_up @ v).chunk(2)
        return down @ (gate * gate.sigmoid() * up)

    rows = []
    for t, v in enumerate(x.double()):
        out = v.new_zeros(v.shape)
        for j, e in enumerate(choice.expert_Tk[t]):
            if choice.kept_Tk is None or choice.kept_Tk[t, j]:
                weight = choice.weight_Tk[t, j].double()
                out = out + weight * ffn(v, params["experts.gate_up"][e], params["experts.down"][e])
        if "shared.down.weight" in params:
            shared = ffn(v, params["shared.gate_up.weight"], params["shared.down.weight"])
            out = out + (shared * (params["shared.gate"] @ v).sigmoid() if "shared.gate" in params else shared)
        rows.append(out)
    return torch.stack(rows)


@pytest.mark.parametrize("kind", KINDS)
def test_block_equals_a_loop_over_tokens(kind: str) -> None:
    """Output and every gradient within 1e-5 of the largest value: fp32 against fp64."""
    cfg, count = config(KINDS[kind]), 40
    block = make_block(cfg)
    x = torch.randn(count, cfg.hidden_size, generator=torch.Generator().manual_seed(6)).requires_grad_()
    residual = torch.randn(count, cfg.hidden_size, generator=torch.Generator().manual_seed(7)).requires_grad_()
    tokens = Tokens((0, 25, count), count, CPU, None, SINGLE)
    out = block(x, residual, None, tokens)
    expected = residual + by_token(block, x, block.router(x, None, tokens))
    torch.testing.assert_close(out, expected.float(), rtol=0, atol=1e-5 * expected.abs().max().item())
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(8))
    wanted = dict(block.named_parameters()) | {"x": x, "residual": residual}
    got = torch.autograd.grad(out, list(wanted.values()), weights)
    theirs = torch.autograd.grad(expected, list(wanted.values()), weights.double())
    for name, mine, grad in zip(wanted, got, theirs, strict=True):
        torch.testing.assert_close(mine, grad, rtol=0, atol=1e-5 * grad.abs().max().item(), msg=name)


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_recompute_changes_neither_gradients_nor_counts(kind: str, recompute: Any) -> None:
    """Gradients within 1e-6 of the largest value; the counts are those without recompute, not twice as many."""
    plain, again = step(KINDS[kind]), step(KINDS[kind], recompute=recompute)
    for name, grad in plain["grads"].items():
        torch.testing.assert_close(again["grads"][name], grad, rtol=0, atol=1e-6 * grad.abs().max().item(), msg=name)
    for layer, report in plain["report"].layers.items():
        assert torch.equal(again["report"].layers[layer].load_CE, report.load_CE)
        assert torch.equal(again["report"].layers[layer].tokens_C, report.tokens_C)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_weight_gradients_put_off_are_the_same(recompute: Any) -> None:
    """Bit for bit; before they are taken no expert has one."""
    cfg = config(QWEN2)
    batch = micro_batches(SINGLE)[0]
    grads = []
    for defer in (False, True):
        model = build(cfg, SINGLE, Runtime(recompute=recompute))
        materialise(model, InitSource(cfg, 3), WHOLE, CPU)
        later = Later(model.parameters())
        with later.deferring(defer):
            model(**batch, loss_weight=0.1)[0].backward()
        stacked = [p for name, p in model.named_parameters() if ".experts." in name]
        assert all((p.grad is None) == defer for p in stacked)
        later.take()()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        assert torch.equal(grads[1][name], grad), name


def test_frozen_experts_get_no_gradient_and_pass_it_on() -> None:
    cfg = config(KINDS["mixtral"])
    block = make_block(cfg)
    block.experts.requires_grad_(False)
    x = torch.randn(9, cfg.hidden_size, requires_grad=True)
    block(x, x, None, Tokens((0, 9), 9, CPU, None, SINGLE)).sum().backward()
    assert block.experts.gate_up.grad is None and block.experts.down.grad is None
    assert x.grad is not None and block.router.weight.grad is not None


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_autocast_is_near_fp32(kind: str) -> None:
    """5 percent of the largest value in norm; gradients stay fp32."""
    cfg = config(KINDS[kind])
    block = make_block(cfg)
    tokens = Tokens((0, 40), 40, CPU, None, SINGLE)
    x = torch.randn(40, cfg.hidden_size, generator=torch.Generator().manual_seed(6)).bfloat16().float()
    found = []
    for on in (False, True):
        block.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            out = block(x.bfloat16() if on else x, x, None, tokens)
        out.float().square().sum().backward()
        found.append([out.float(), *(p.grad for p in block.parameters())])
    for plain, cast in zip(*found, strict=True):
        assert cast is not None and plain is not None and cast.dtype is torch.float32
        assert (cast - plain).norm() < 0.05 * plain.norm()


def test_evaluation_counts_nothing() -> None:
    cfg = config(dataclasses.replace(KINDS["mixtral"], capacity=1.0))
    model = build(cfg)
    materialise(model, InitSource(cfg, 3), WHOLE, CPU)
    book = RouterBook([model], 2)
    book.begin(1.0)
    with torch.no_grad():
        model(**micro_batches(SINGLE)[0])
    report = book.finish(lambda x: x)
    assert all(layer.load_CE.sum() == 0 for layer in report.layers.values())


def test_experts_are_drawn_like_dense_layers() -> None:
    """The stacks have the standard deviations of the feed-forward they replace, within 5 percent."""
    cfg = dataclasses.replace(config(MoEConfig(4, 2, 64)), hidden_size=64)
    source = InitSource(cfg, 3)
    assert source.tensor("layers.0.mlp.experts.gate_up").std().item() == pytest.approx(0.2, rel=0.05)
    assert source.tensor("layers.0.mlp.experts.down").std().item() == pytest.approx(0.2 / 2, rel=0.05)
