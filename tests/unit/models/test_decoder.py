"""The decoder as a whole: outputs, recompute, what it keeps for the backward, autocast, ties."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from models import Decoder, ModelConfig, Runtime, build
from models.init import InitSource
from parallel.materialise import materialise
from parallel.sharding import SINGLE, WHOLE

SIZES = (96, 64, 176, 2, 4, 2, 16, 256)
LLAMA = ModelConfig("llama", *SIZES, init_std=0.2)
FAMILIES = {
    "llama": LLAMA,
    "qwen2": ModelConfig(
        "qwen2", *SIZES, qkv_bias=True, tied_embeddings=True, sliding_window=6, full_attention_layers=1, init_std=0.2
    ),
    "qwen3": ModelConfig("qwen3", *SIZES, qk_norm=True, init_std=0.2),
}
BORDERS = [0, 7, 30, 53, 64]
PLAIN = Runtime()


def make(cfg: ModelConfig, runtime: Runtime = PLAIN) -> Decoder:
    model = build(cfg, SINGLE, runtime)
    materialise(model, InitSource(cfg, 0), WHOLE, torch.device("cpu"))
    return model


def batch(vocab: int = 96) -> tuple[torch.Tensor, torch.Tensor, list[int], int, torch.Tensor]:
    draw = torch.Generator().manual_seed(5)
    tokens, targets = (torch.randint(0, vocab, (64,), generator=draw) for _ in range(2))
    targets[::5] = -100
    positions = torch.cat([torch.arange(b - a) for a, b in pairwise(BORDERS)])
    return tokens, positions, BORDERS, 23, targets


def gradients(model: Decoder, weight: float = 0.02) -> dict[str, torch.Tensor]:
    loss, losses = model(*batch(), weight)
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    assert all(grad is not None for grad in grads.values())
    return {"loss": loss.detach(), "losses": losses} | {n: g for n, g in grads.items() if g is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_equals_cross_entropy_of_the_logits(family: str) -> None:
    """fp32, 1e-5; gradients through autograd on whole logits to 1e-5 of the largest."""
    model = make(FAMILIES[family])
    got = gradients(model)
    model.zero_grad()
    *inputs, targets = batch()
    logits = model(*inputs, output="head")
    expected = F.cross_entropy(logits, targets, reduction="none")
    (0.02 * expected.sum()).backward()
    torch.testing.assert_close(got["losses"], expected.detach(), rtol=0, atol=1e-5)
    torch.testing.assert_close(got["loss"], 0.02 * expected.detach().sum(), rtol=1e-5, atol=0)
    for name, p in model.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(got[name], p.grad, rtol=0, atol=1e-5 * p.grad.abs().max().item(), msg=name)


def test_hidden_is_what_the_head_sees() -> None:
    model = make(LLAMA)
    *inputs, _ = batch()
    with torch.no_grad():
        hidden, logits = model(*inputs), model(*inputs, output="head")
    torch.testing.assert_close(hidden @ model.get_parameter("head.weight").T, logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recompute_changes_no_bit(family: str, recompute: Any) -> None:
    plain = gradients(make(FAMILIES[family]))
    again = gradients(make(FAMILIES[family], Runtime(recompute=recompute)))
    assert all(torch.equal(plain[name], again[name]) for name in plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_equal_documents_alone(family: str) -> None:
    """fp32 logits, 1e-5."""
    model = make(FAMILIES[family])
    tokens, positions, borders, longest, _ = batch()
    with torch.no_grad():
        packed = model(tokens, positions, borders, longest, output="head")
        for a, b in pairwise(borders):
            alone = model(tokens[a:b], torch.arange(b - a), [0, b - a], b - a, output="head")
            torch.testing.assert_close(packed[a:b], alone, rtol=0, atol=1e-5)


def test_borders_may_be_a_tensor() -> None:
    model = make(LLAMA)
    tokens, positions, borders, longest, _ = batch()
    with torch.no_grad():
        expected = model(tokens, positions, borders, longest)
        assert torch.equal(model(tokens, positions, torch.tensor(borders, dtype=torch.int32)), expected)


class Alive(TorchDispatchMode):
    """Remembers every storage made, weakly, to count afterwards those that still live."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return out

    def bytes(self) -> int:
        return sum(size for ref, size in self.made.values() if not ref.expired())


def kept_elements(recompute: Any, qk_norm: bool = False) -> float:
    """fp32 elements alive after the forward, in units of D per token and layer, at the benchmark's proportions."""
    tokens, totals = 128, []
    for layers in (2, 4):
        family = "qwen3" if qk_norm else "llama"
        cfg = ModelConfig(family, 64, 256, 704, layers, 8, 4, 32, 256, qk_norm=qk_norm)
        model = make(cfg, Runtime(recompute=recompute))
        draw = torch.randint(0, 64, (tokens,))
        with Alive() as alive:
            out = model(draw, torch.arange(64).repeat(2), [0, 64, 128], 64, draw, 1.0)
        totals.append(alive.bytes())
        del out
    return (totals[1] - totals[0]) / (2 * tokens * 256 * 4)


@pytest.mark.parametrize(
    ("recompute", "low", "high"),
    # 15.25 = inputs of two norms, their outputs, q|k|v 2, heads' output 1, gate|up 5.5, product 2.75; + 1/rms, log-sum.
    # selective drops the norms' outputs and the product; full keeps the layer's input.
    [("none", 15.25, 15.5), ("selective", 10.5, 10.75), ("full", 1.0, 1.05)],
)
def test_what_is_kept_for_the_backward(recompute: str, low: float, high: float) -> None:
    assert low <= kept_elements(recompute) <= high


def test_qk_norm_keeps_the_rows_twice_and_no_more() -> None:
    assert 17.25 <= kept_elements("none", qk_norm=True) <= 17.6


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_bf16_autocast_is_close_to_fp32(family: str, recompute: Any) -> None:
    """bf16 has 8 bits: losses within 3 %, gradients within 8 % of their norm, all in fp32."""
    model = make(FAMILIES[family], Runtime(recompute=recompute))
    exact = gradients(model)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss, losses = model(*batch(), 0.02)
    loss.backward()
    assert loss.dtype is torch.float32 and losses.dtype is torch.float32
    torch.testing.assert_close(loss.detach(), exact["loss"], rtol=0.03, atol=0)
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.dtype is torch.float32
        difference = (p.grad - exact[name]).norm() / exact[name].norm()
        assert 1e-6 < difference < 0.08, f"{name}: {difference}"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_model_cast_to_bf16_runs(attention: Any) -> None:
    model = make(LLAMA, Runtime(attention=attention))
    exact = gradients(model)
    half = model.bfloat16()
    half.zero_grad()
    loss, _ = half(*batch(), 0.02)
    loss.backward()
    torch.testing.assert_close(loss.detach(), exact["loss"], rtol=0.05, atol=0)
    assert all(p.grad is not None and p.grad.dtype is torch.bfloat16 for p in half.parameters())


def test_tied_head_is_the_embedding() -> None:
    model = make(FAMILIES["qwen2"])
    assert model.get_parameter("head.weight") is model.get_parameter("embed.weight")
    assert "head.weight" not in dict(model.named_parameters())
    assert "head.weight" in dict(make(LLAMA).named_parameters())


def test_scalar_head_gives_one_fp32_number_a_token() -> None:
    cfg = ModelConfig("llama", *SIZES, head="scalar", init_std=0.2)
    model = make(cfg)
    *inputs, _ = batch()
    values = model(*inputs, output="head")
    assert values.shape == (64,) and values.dtype is torch.float32
    expected = model(*inputs) @ model.get_parameter("head.weight")[0]
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-5)
    values.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_built_without_memory() -> None:
    model = build(LLAMA)
    assert all(p.device.type == "meta" for p in model.parameters())
    assert not list(model.buffers())
