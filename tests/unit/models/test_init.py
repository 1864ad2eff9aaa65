"""Weights depend on the seed and the parameter's name only."""

import dataclasses
import math

import torch

from models import ModelConfig, build
from models.init import InitSource
from parallel.sharding import Axis, Cut, Place, init_of, shard_of

CFG = ModelConfig("qwen3", 256, 64, 96, 3, 4, 2, 16, 64, qk_norm=True, init_std=0.05)


def test_every_parameter_follows_the_table() -> None:
    source = InitSource(CFG, 0)
    for name, param in build(CFG).named_parameters():
        tensor = source.tensor(name)
        assert tensor.shape == param.shape and tensor.dtype is torch.float32 and tensor.device.type == "cpu"
        if "norm" in name:
            assert init_of(param) == "ones" and torch.equal(tensor, torch.ones_like(tensor))
            continue
        std = 0.05 / math.sqrt(6) if name.endswith(("out.weight", "down.weight")) else 0.05
        # The standard error of a standard deviation over n draws is std / sqrt(2 n); 5 of them.
        assert abs(tensor.std().item() - std) < 5 * std / math.sqrt(2 * tensor.numel()), name
        assert abs(tensor.mean().item()) < 5 * std / math.sqrt(tensor.numel()), name


def test_biases_are_zero() -> None:
    cfg = dataclasses.replace(CFG, family="llama", qk_norm=False, qkv_bias=True, attention_out_bias=True, mlp_bias=True)
    source = InitSource(cfg, 0)
    biases = [name for name, _ in build(cfg).named_parameters() if name.endswith("bias")]
    assert len(biases) == 4 * cfg.num_layers
    assert all(source.tensor(name).abs().max() == 0 for name in biases)


def test_a_draw_depends_on_name_and_seed_alone() -> None:
    name = "layers.1.attn.qkv.weight"
    first = InitSource(CFG, 0).tensor(name)
    other_model = InitSource(dataclasses.replace(CFG, num_layers=2, vocab_size=8, intermediate_size=32), 0)
    assert torch.equal(other_model.tensor(name), first)
    assert torch.equal(InitSource(CFG, 0).tensor(name), first)
    assert not torch.equal(InitSource(CFG, 1).tensor(name), first)
    assert not torch.equal(InitSource(CFG, 0).tensor("layers.2.attn.qkv.weight"), first)


def test_cut_models_are_made_of_the_same_whole_tensors() -> None:
    source = InitSource(CFG, 0)
    for rank in range(2):
        for name, param in build(CFG, Place(tp=Axis(2, rank))).named_parameters():
            assert shard_of(param).slice(source.tensor(name), Cut(2, rank)).shape == param.shape, name


def test_known_value() -> None:
    """Pins the draw: a change of it would silently change every run from scratch."""
    digest = InitSource(CFG, 0).tensor("embed.weight").double().abs().sum().item()
    assert abs(digest - KNOWN) < 1e-6 * KNOWN


KNOWN = 652.929137781
