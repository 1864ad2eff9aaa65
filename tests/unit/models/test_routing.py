"""The router book: what is reported, what moves after a step, what survives a checkpoint."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from models import build
from models.init import InitSource
from models.routing import LayerReport, RouterBook, RouterReport
from parallel.materialise import materialise
from parallel.sharding import SINGLE, WHOLE
from tests.moe_cases import DEEPSEEK, LENGTHS, MIXTRAL, config, micro_batches, step

DENSE = dataclasses.replace(config(MIXTRAL), moe=None)


def test_a_model_without_experts_asks_nobody() -> None:
    book = RouterBook([build(DENSE)], 2)
    book.begin(1.0)

    def never(_: torch.Tensor) -> torch.Tensor:
        raise AssertionError("a collective for nothing")

    assert book.finish(never).metrics(["a", "b"]) == {}


def test_one_sum_for_all_layers() -> None:
    model = build(config(MIXTRAL))
    materialise(model, InitSource(model.cfg, 0), WHOLE, torch.device("cpu"))
    book, calls = RouterBook([model], 2), []
    book.begin(1.0)
    book.finish(lambda x: calls.append(x) or x)
    assert len(calls) == 1 and calls[0].dtype is torch.float64


def report(load: list[list[float]], tokens: list[float], entropy: list[float], drops: bool = False) -> LayerReport:
    dropped = torch.tensor([1.0, 0.0]) if drops else torch.zeros(2)
    parts = (torch.tensor(load), torch.tensor(tokens), torch.tensor(entropy), dropped)
    return LayerReport(*(part.double() for part in parts), balance=1.5, z=2.0, drops=drops)


def test_metrics_by_hand() -> None:
    layers = {0: report([[4, 0], [2, 2]], [2, 2], [1.0, 0.5]), 3: report([[2, 2], [2, 2]], [2, 2], [0.0, 0.5])}
    metrics = RouterReport(layers).metrics(["even", "late"])
    assert metrics == {
        "moe/max_load": (1.5 + 1.0) / 2, "moe/entropy": (1.5 / 4 + 0.5 / 4) / 2, "moe/balance": 1.5, "moe/z": 2.0,
        "moe/layer_0/max_load": 1.5, "moe/layer_0/entropy": 1.5 / 4,
        "moe/layer_3/max_load": 1.0, "moe/layer_3/entropy": 0.5 / 4,
        "channel/even/moe_max_load": (2.0 + 1.0) / 2, "channel/even/moe_entropy": 0.25,
        "channel/late/moe_max_load": 1.0, "channel/late/moe_entropy": 0.25,
    }  # fmt: skip


def test_drops_are_told_where_there_is_a_capacity_and_absent_channels_are_left_out() -> None:
    metrics = RouterReport({0: report([[3, 1], [0, 0]], [2, 0], [1.0, 0.0], drops=True)}).metrics(["a", "b"])
    assert metrics["moe/dropped"] == metrics["channel/a/moe_dropped"] == 0.25
    assert not any(key.startswith("channel/b") for key in metrics)


def test_stages_are_joined_in_the_order_of_layers() -> None:
    one, two = (
        RouterReport({2: report([[1, 1]] * 2, [1, 1], [0, 0])}),
        RouterReport({0: report([[1, 1]] * 2, [1, 1], [0, 0])}),
    )
    assert list(RouterReport.joined([one, two]).layers) == [0, 2]


def test_balance_is_that_of_the_same_batch() -> None:
    """From the loads and probabilities of all tokens, by hand; the first step's gradient sees even loads instead."""
    found = step(MIXTRAL)
    model = build(config(MIXTRAL))
    materialise(model, InitSource(model.cfg, 3), WHOLE, torch.device("cpu"))
    seen = []
    router = RouterBook([model], 1).routers[0]
    router.register_forward_hook(
        lambda _, args, out: seen.append(((args[0] @ router.weight.T).softmax(1), out.expert_Tk))
    )
    with torch.no_grad():
        for batch in micro_batches(SINGLE):
            model(**batch)
    probs, chosen = (torch.cat(parts) for parts in zip(*seen, strict=True))
    f = torch.bincount(chosen.flatten(), minlength=8) / chosen.numel() * 8
    assert found["report"].layers[0].balance == pytest.approx((f * probs.mean(0)).sum().item(), rel=1e-5)
    assert found["report"].layers[0].tokens_C.sum() == sum(LENGTHS)


def test_biases_move_against_the_load() -> None:
    """By the sign of even load minus load, `bias_rate` far; a second step goes on from there."""
    for steps in (1, 2):
        found = step(DEEPSEEK, steps=steps)
        if steps == 1:
            load_E = found["report"].layers[1].load_CE.sum(0)
            first = 0.01 * torch.sign(load_E.mean() - load_E).float()
            assert first.abs().max() > 0
            torch.testing.assert_close(found["biases"]["layers.1.mlp.router.bias"], first, rtol=0, atol=1e-8)
        else:
            moved = found["biases"]["layers.1.mlp.router.bias"] - first
            assert set(moved.abs().mul(100).round().tolist()) <= {0.0, 1.0} and moved.abs().max() > 0


@pytest.mark.parametrize("trained", [True, False])
def test_a_router_that_is_not_trained_keeps_its_bias(trained: bool) -> None:
    """A frozen decoder behind a connector that is trained: its backward runs, its loads are told."""
    model = build(config(DEEPSEEK))
    materialise(model, InitSource(model.cfg, 3), WHOLE, torch.device("cpu"))
    assert model.embed is not None
    if not trained:
        model.requires_grad_(False)
        model.embed.weight.requires_grad_(True)
    book = RouterBook([model], 2)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    book.begin(1.0)
    for batch in micro_batches(SINGLE):
        model(**batch)[0].backward()
    report = book.finish(lambda x: x)
    assert report.layers[1].load_CE.sum() > 0
    for name, buffer in model.named_buffers():
        if name.endswith("router.bias"):
            assert torch.equal(buffer, before[name]) != trained, name


def test_state_survives_json_and_other_stages() -> None:
    """What is restored weighs in the next step's gradient like what was there."""
    model = build(config(MIXTRAL))
    book = RouterBook([model], 1)
    found = step(MIXTRAL)
    text = json.dumps(found["state"])
    layers = json.loads(text)["load"]
    book.restore({"load": {"0": layers["0"]}}, {"load": {"1": layers["1"], "7": [1.0] * 8}})
    assert book.state() == json.loads(text)
    load_E = found["report"].layers[1].load_CE.sum(0)
    torch.testing.assert_close(torch.tensor(layers["1"]), (load_E / load_E.mean()).float(), rtol=1e-6, atol=0)


def test_the_last_batch_weighs_in_the_gradient() -> None:
    """After a step the balancing loss pulls; in the first it does not."""
    still = dataclasses.replace(MIXTRAL, balance_loss=0.0)
    name = "layers.0.mlp.router.weight"
    first = step(MIXTRAL)["grads"][name] - step(still)["grads"][name]
    second = step(MIXTRAL, steps=2)["grads"][name] - step(still, steps=2)["grads"][name]
    assert first.abs().max() < 1e-6 < 1e-4 < second.abs().max()
