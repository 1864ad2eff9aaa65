"""Megatron's arguments of a model and its layout: there and back for every family, and what they cannot say."""

import argparse
import dataclasses
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from convert.megatron.args import OWN, differences, from_args, to_args
from convert.megatron.layout import Layout
from convert.same_model import differing, flat
from models import FAMILIES, ModelConfig, RopeConfig
from models import problems as model_problems
from scripts.params import load_model

CONF = Path(__file__).resolve().parents[3] / "conf" / "model"
NAMES = sorted(
    path.stem for path in CONF.glob("*.yaml") if path.stem != "hf" and load_model(path.stem, []).vision is None
)
TINY = [name for name in NAMES if name.startswith("tiny_")]
LLAMA3 = RopeConfig(500000.0, "llama3", 8.0, 8192)
ROPES = {
    "plain": RopeConfig(123456.5),
    "linear": RopeConfig(scaling="linear", factor=4.0, original_max_seq_len=512),
    "dynamic": RopeConfig(scaling="dynamic", factor=2.0, original_max_seq_len=512),
    "llama3": LLAMA3,
    "llama3_other_bounds": dataclasses.replace(LLAMA3, original_max_seq_len=64, low_freq_factor=2.0),
    "yarn": RopeConfig(scaling="yarn", factor=8.0, original_max_seq_len=64, beta_fast=20.0),
    "yarn_attention_factor": RopeConfig(scaling="yarn", factor=8.0, original_max_seq_len=64, attention_factor=1.5),
    "yarn_mscales": RopeConfig(scaling="yarn", factor=8.0, original_max_seq_len=64, mscale=0.5, mscale_all_dim=1.5),
    "yarn_score_alone": RopeConfig(scaling="yarn", factor=8.0, original_max_seq_len=64, mscale_all_dim=0.7),
    "yarn_not_rounded": RopeConfig(scaling="yarn", factor=8.0, original_max_seq_len=64, truncate=False),
}
SAID = {"plain", "llama3", "yarn", "yarn_attention_factor", "yarn_mscales"}
"""Scalings that Megatron has names for in every family."""


def alone(args: dict[str, Any]) -> dict[str, Any]:
    """The arguments as another program would have left them."""
    return {key: value for key, value in args.items() if key != OWN}


def layouts(cfg: ModelConfig) -> list[Layout]:
    """Of several kinds, all legal for the number of layers."""
    n, ep = cfg.num_layers, 2 if cfg.moe else 1
    uneven = [(n - 1, 1), (1, n - 1)]
    return [
        Layout(),
        Layout(tp=2, ep=ep, vocab_multiple=1),
        Layout(pp=n),
        Layout(pp=2, layers=uneven[0] if n > 2 else ()),
        Layout(pp=2, ep=ep, layers=uneven[1] if n > 2 else ()),
        Layout(pp=3, layers=(0, n - 1, 1)),
        Layout(pp=2, vpp=2, layers=(0, n - 1, 1, 0)),
    ]


@pytest.mark.parametrize("name", NAMES)
def test_every_model_comes_back(name: str) -> None:
    """Exactly, what training alone uses too, without a word beside Megatron's own arguments."""
    cfg = load_model(name, [])
    for layout in layouts(cfg):
        args = to_args(cfg, layout, torch.bfloat16)
        assert from_args(args) == (cfg, layout)
        assert OWN not in args and differences(cfg) == []


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("name", ["tiny_llama", "tiny_qwen2", "tiny_qwen3", "tiny_deepseek_v2", "tiny_deepseek_v3"])
def test_rotary_scalings_come_back(name: str, rope: str) -> None:
    """Exactly with what stands beside Megatron's arguments; and those alone mean the same wherever nothing is told."""
    cfg = dataclasses.replace(load_model(name, []), rope=ROPES[rope])
    args = to_args(cfg, Layout(), torch.float32)
    assert from_args(args)[0] == cfg
    assert set(args.get(OWN, {})) <= {path for path in flat(cfg) if path.startswith("rope.")}
    said = from_args(alone(args))[0]
    lost = [key for key in differing(cfg, said) if key.startswith("rope.")]
    assert bool(lost) == bool(differences(cfg)) and all(any(key in line for line in differences(cfg)) for key in lost)
    if rope in SAID and not (cfg.mla and rope == "llama3"):
        assert not lost


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("rope", ["plain", "linear", "dynamic", "llama3", "yarn"])
def test_config_json_comes_back_and_transformers_reads_it(name: str, rope: str) -> None:
    given = dataclasses.replace(load_model(name, []), rope=ROPES[rope])
    before = FAMILIES[given.family].to_hf_config(given)
    cfg = FAMILIES[given.family].from_hf_config(before)
    after = FAMILIES[cfg.family].to_hf_config(from_args(to_args(cfg, Layout(tp=2), torch.float32))[0])
    assert after == before
    read = [AutoConfig.for_model(**keys).to_dict() for keys in (before, after)]
    assert read[0] == read[1]
    scaling = read[1]["rope_parameters"]
    assert scaling["rope_type"] == {"plain": "default"}.get(rope, rope) and scaling["rope_theta"] == given.rope.theta


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "biases everywhere": ("tiny_llama", {"qkv_bias": True, "attention_out_bias": True, "mlp_bias": True}),
    "multi-query": ("tiny_llama", {"num_kv_heads": 1}),
    "full heads": ("tiny_llama", {"num_kv_heads": 4, "tied_embeddings": True}),
    "window from the first layer": ("tiny_qwen2", {"full_attention_layers": 0}),
    "window nowhere in the end": ("tiny_qwen2", {"sliding_window": None, "full_attention_layers": 0}),
    "window of experts": ("tiny_qwen3_moe", {"sliding_window": 31}),
    "weights not normed": ("tiny_qwen3_moe", {"moe.normalize": False}),
    "a capacity": ("tiny_mixtral", {"moe.capacity": 1.25, "moe.z_loss": 0.001, "moe.balance_loss": 0.0}),
    "a scale": ("tiny_deepseek_v2", {"moe.scale": 16.0}),
    "groups": ("tiny_deepseek_v2", {"moe.groups": 4, "moe.groups_kept": 3}),
    "a moving bias": ("tiny_deepseek_v3", {"moe.bias_rate": 0.002, "moe.balance_over": "sequence"}),
}
BESIDE: dict[str, tuple[str, dict[str, Any], str]] = {
    "biases of the attention": (
        "tiny_llama",
        {"qkv_bias": True, "attention_out_bias": True},
        "they are written as zeros",
    ),
    "biases of Qwen3": ("tiny_qwen3", {"qkv_bias": True, "attention_out_bias": True}, "they are written as zeros"),
    "biases beside experts": (
        "tiny_qwen3_moe",
        {"qkv_bias": True, "attention_out_bias": True},
        "they are written as zeros",
    ),
    "biases of the feed-forward": ("tiny_llama", {"mlp_bias": True}, "attention_out_bias is False"),
    "sigmoid not normed": ("tiny_deepseek_v3", {"moe.normalize": False}, "moe.normalize is False"),
    "other groups": (
        "tiny_deepseek_v2",
        {"moe.groups": 4, "moe.groups_kept": 2, "moe.top_k": 4},
        "the sum of its best",
    ),
    "other groups of V3": ("tiny_deepseek_v3", {"moe.groups_kept": 4}, "the sum of its best"),
    "Llama 3.2": ("tiny_llama", {"rope": dataclasses.replace(LLAMA3, factor=32.0)}, "--rope-scaling-factor 32"),
}


def changed(name: str, values: dict[str, Any]) -> ModelConfig:
    cfg = load_model(name, [])
    for path, value in values.items():
        section, _, key = path.rpartition(".")
        new = dataclasses.replace(getattr(cfg, section), **{key: value}) if section else value
        cfg = dataclasses.replace(cfg, **{section or key: new})
    assert model_problems(cfg) == []
    return cfg


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_are_said_in_megatrons_words(variant: str) -> None:
    cfg = changed(*VARIANTS[variant])
    args = to_args(cfg, Layout(), torch.float32)
    assert OWN not in args and from_args(args)[0] == cfg and differences(cfg) == []


@pytest.mark.parametrize("variant", BESIDE)
def test_what_megatron_computes_otherwise_is_told_and_comes_back(variant: str) -> None:
    name, values, told = BESIDE[variant]
    cfg = changed(name, values)
    assert from_args(to_args(cfg, Layout(), torch.float32))[0] == cfg
    assert told in " ".join(differences(cfg))


def test_torch_loads_them_without_trusting_the_file() -> None:
    args = to_args(load_model("tiny_deepseek_v3", []), Layout(pp=3), torch.bfloat16, iteration=12)
    file = io.BytesIO()
    torch.save({"args": argparse.Namespace(**args)}, file)
    file.seek(0)
    with torch.serialization.safe_globals([argparse.Namespace]):
        read = torch.load(file, weights_only=True)["args"]
    assert vars(read) == args and read.params_dtype is torch.bfloat16 and read.bf16 and read.iteration == 12


def test_a_word_of_a_newer_version_is_refused() -> None:
    args = to_args(load_model("tiny_llama", []), Layout(), torch.float32)
    with pytest.raises(ValueError, match=r"rope\.spiral"):
        from_args(args | {OWN: {"rope.spiral": 3}})
