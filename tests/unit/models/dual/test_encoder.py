"""Pairs of encoders: the same in any packing, with recompute and tensor parallel; what is drawn; what is refused."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import models
from models.init import InitSource
from models.parts import LayeredPartConfig, PartsConfig, freeze
from models.vision.config import ProjectorConfig
from parallel.materialise import materialise
from parallel.sharding import SINGLE, Cut, is_partial, shard_of
from scripts.params import load_model
from tests.dual_cases import LENGTHS, config, encoded, encoded_in_pool, pictures_of, pixels, texts
from tests.pool import Pool
from tests.tp_cases import model_of

NAMES = ["tiny_clip", "tiny_siglip"]


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Any]]:
    return {name: encoded(name) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_recompute_changes_no_bit(name: str, alone: dict[str, dict[str, Any]]) -> None:
    again = encoded(name, recompute="full")
    for key in ("image_NW", "text_NW"):
        assert torch.equal(alone[name][key], again[key])
    for key, grad in alone[name]["grads"].items():
        assert grad is not None and grad.any() and torch.equal(grad, again["grads"][key]), key


@pytest.mark.parametrize("name", NAMES)
def test_bf16_stays_near(name: str, alone: dict[str, dict[str, Any]]) -> None:
    """Under autocast vectors stay fp32 and of length 1, within 0.05 of the fp32 ones; as many weights learn."""
    with torch.autocast("cpu", torch.bfloat16):
        low = encoded(name, recompute="full")
    for key in ("image_NW", "text_NW"):
        assert low[key].dtype is torch.float32 and (low[key] - alone[name][key]).norm(dim=1).max() < 0.05
        torch.testing.assert_close(low[key].norm(dim=1), torch.ones(len(LENGTHS)), rtol=0, atol=1e-5)
    assert all(grad is not None and torch.isfinite(grad).all() for grad in low["grads"].values())


@pytest.mark.parametrize("name", NAMES)
def test_how_pairs_are_put_together_changes_nothing(name: str, alone: dict[str, dict[str, Any]]) -> None:
    """Vectors and every gradient of one micro-batch and of two, 1e-5."""
    found = encoded(name, parts=2)
    for key in ("image_NW", "text_NW"):
        torch.testing.assert_close(found[key], alone[name][key], rtol=0, atol=1e-5)
        torch.testing.assert_close(found[key].norm(dim=1), torch.ones(len(LENGTHS)), rtol=0, atol=1e-6)
    for key, grad in alone[name]["grads"].items():
        torch.testing.assert_close(found["grads"][key], grad, rtol=0, atol=1e-5 * max(1.0, grad.abs().max().item()))


def test_tensor_parallel_equals_one_process(pool: Callable[[int], Pool], alone: dict[str, dict[str, Any]]) -> None:
    """Vectors to 1e-5 on every rank; every gradient, after cutting, to 1e-5 of the largest."""
    found = pool(2).run(encoded_in_pool, NAMES)
    for name in NAMES:
        whole, model = alone[name], models.build(config(name))
        for rank in range(2):
            for key in ("image_NW", "text_NW", "scale", "bias"):
                torch.testing.assert_close(found[rank][name][key], whole[key], rtol=0, atol=1e-5)
            for key, param in model.named_parameters():
                own, most = shard_of(param).slice(whole["grads"][key], Cut(2, rank)), whole["grads"][key].abs().max()
                assert not is_partial(param), key
                torch.testing.assert_close(
                    found[rank][name]["grads"][key], own, rtol=0, atol=1e-5 * max(1.0, most.item())
                )


@pytest.mark.parametrize("name", NAMES)
def test_without_pictures_every_weight_has_a_gradient(name: str) -> None:
    model = model_of(config(name), SINGLE)
    found = model(**texts(), max_seqlen=12, channel_T=None)
    assert found.image_NW.shape == (0, 32 if name == "tiny_clip" else 48) and len(found.text_NW) == len(LENGTHS)
    (found.text_NW.sum() + found.image_NW.sum() + 0 * (found.scale + found.bias)).backward()
    for key, param in model.named_parameters():
        assert param.grad is not None, key
        assert param.grad.any() or key.startswith(("vision.", "connector.", "temperature.")), key


def test_a_text_of_clip_does_not_know_what_follows() -> None:
    """Its vector is that of its last token, which other texts behind it do not change (1e-5)."""
    model = model_of(config("tiny_clip"), SINGLE)
    whole = texts()
    first = {"tokens_T": whole["tokens_T"][:9], "positions_T": whole["positions_T"][:9], "cu_seqlens": [0, 9]}
    sees = pictures_of(pixels(1))
    one, many = model(**first, pictures=sees), model(**whole, pictures=pictures_of(pixels(5)))
    torch.testing.assert_close(one.text_NW[0], many.text_NW[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(one.image_NW[0], many.image_NW[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "scale", "bias"), [("tiny_clip", 1 / 0.07, 0.0), ("tiny_siglip", 10.0, -10.0)])
def test_fresh_temperatures(name: str, scale: float, bias: float) -> None:
    """As their papers begin; every other weight is drawn by its name alone, so one more layer changes none of them."""
    model = models.build(load_model(name, []))
    materialise(model, InitSource(model.cfg, 5), SINGLE.cut, torch.device("cpu"))
    found = model(**texts(), pictures=pictures_of(pixels(5)))
    assert math.isclose(found.scale.item(), scale, rel_tol=1e-6) and found.bias.item() == bias
    longer = InitSource(load_model(name, ["num_layers=3"]), 5)
    for key in ("vision.patch", "embed.weight", "positions.weight", "layers.1.qkv.weight", "head.weight"):
        assert torch.equal(longer.tensor(key), dict(model.named_parameters())[key]), key


def test_the_scale_of_clip_ends_at_100() -> None:
    """OpenAI's weights lie at the limit, in fp32: there they still learn, and above nothing pushes on."""
    model: Any = model_of(config("tiny_clip"), SINGLE)
    for log_scale, learns in ((math.log(100.0), True), (4.7, False)):
        model.temperature.scale.data.fill_(log_scale)
        model.zero_grad()
        scale, _ = model.temperature()
        scale.backward()
        assert abs(scale.item() - 100.0) < 1e-4 and bool(model.temperature.scale.grad.any()) is learns


def test_last_layers_of_the_text_side() -> None:
    """The norm, the head and the temperature are trained with them."""
    model = models.build(config("tiny_clip"))
    freeze(model, PartsConfig(vision=LayeredPartConfig(train=False), decoder=LayeredPartConfig(last_layers=1)))
    trained = {name.split(".")[0] for name, param in model.named_parameters() if param.requires_grad}
    assert trained == {"connector", "layers", "norm", "head", "temperature"}
    assert not any(param.requires_grad for param in model.layers["0"].parameters())


@pytest.mark.parametrize(
    ("name", "change", "key", "way"),
    [
        ("tiny_clip", {"qkv_bias": True}, "qkv_bias", "leave model.qkv_bias out"),
        ("tiny_clip", {"num_kv_heads": 2}, "num_kv_heads", "model.num_kv_heads=4"),
        ("tiny_clip", {"head_dim": 8}, "head_dim", "model.head_dim=16"),
        ("tiny_clip", {"vision.format": "llava"}, "vision.format", "model.vision.format=clip"),
        ("tiny_clip", {"vision.tower.keep_class": False}, "vision.tower.keep_class", "keep_class=true"),
        ("tiny_clip", {"family": "llama", "vision.format": "clip"}, "vision.format", "model.family=clip"),
        ("tiny_llava", {"vision.connector.name": "pooled"}, "vision.connector.name", "name=mlp"),
        ("tiny_siglip", {"vision.connector.width": 32}, "vision.connector.width", "width=48"),
        ("tiny_siglip", {"vision.connector.pad_id": 512}, "vision.connector.pad_id", "pad_id=0"),
        ("tiny_siglip", {"vision.tower.final_norm": False}, "vision.tower.final_norm", "final_norm=true"),
    ],
)
def test_refusals(name: str, change: dict[str, Any], key: str, way: str) -> None:
    words = [f"{at}={str(value).lower() if isinstance(value, bool) else value}" for at, value in change.items()]
    with pytest.raises(ValueError, match=f"model.{key}") as told:
        load_model(name, words)
    assert way in str(told.value)


def test_a_text_encoder_needs_eyes_that_give_one_vector() -> None:
    cfg = config("tiny_clip")
    assert cfg.vision is not None
    assert [key for key, *_ in models.problems(dataclasses.replace(cfg, vision=None))] == ["vision"]
    many = dataclasses.replace(cfg, vision=dataclasses.replace(cfg.vision, connector=ProjectorConfig()))
    assert [key for key, *_ in models.problems(many)] == ["vision.connector.name"]
