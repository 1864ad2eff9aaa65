"""Adapters on a decoder: which layers, what is trained, switching them off, writing texts with them."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from models import Decoder, ModelConfig, build
from models.adapters.attach import attach
from models.adapters.config import AdapterConfig, Ia3Config, LoraConfig
from models.adapters.source import AdapterSource
from models.adapters.targets import layers_of, sample
from models.families import FAMILIES
from models.generation import Generator, GeneratorConfig, Request, SamplingConfig
from models.init import InitSource
from parallel.materialise import materialise
from parallel.sharding import WHOLE
from parallel.switch import switched_off
from scripts.params import load_model
from tests.unit.models.test_generation import PLAIN, Letters, prompts, tokens

CPU = torch.device("cpu")


def adapted(cfg: ModelConfig, adapter: AdapterConfig) -> Decoder:
    """A decoder none of whose adapters is at its start."""
    model = build(cfg)
    attach(model, adapter)
    materialise(model, AdapterSource(InitSource(cfg, 1), cfg, adapter, 2), WHOLE, CPU)
    random = torch.Generator().manual_seed(3)
    for name, param in model.named_parameters():
        if param.requires_grad:
            assert "adapter" in name
            param.data = param.data + 0.2 * torch.randn(param.shape, generator=random)
    return model.requires_grad_(False)


def folded(model: Decoder, cfg: ModelConfig, adapter: LoraConfig | Ia3Config) -> Decoder:
    """A plain decoder whose weights have the adapters in them, by plain products."""
    plain, given = build(cfg), dict(model.named_parameters())
    materialise(plain, InitSource(cfg, 1), WHOLE, CPU)
    weights = dict(plain.named_parameters())
    for layer in layers_of(plain, adapter.targets):
        at = 0
        for number, i in enumerate(layer.chosen):
            start, stop = layer.rows(i)
            weight = weights[f"{layer.path}.weight"].data
            if isinstance(adapter, Ia3Config):
                factor = given[f"{layer.path}.adapter.factor"]
                weight[start:stop] *= factor if layer.row else factor[at : at + stop - start, None]
            else:
                a = given[f"{layer.path}.adapter.low_rank.a"].chunk(len(layer.chosen))[number]
                b = given[f"{layer.path}.adapter.low_rank.b"][at : at + stop - start]
                weight[start:stop] += adapter.alpha / adapter.rank * b @ a
            at += stop - start
    return plain.requires_grad_(False)


@pytest.mark.parametrize("adapter", [LoraConfig(rank=3, alpha=4), Ia3Config()], ids=["lora", "ia3"])
def test_texts_are_those_of_the_folded_weights(adapter: LoraConfig | Ia3Config) -> None:
    """Long enough for packed copies of weights, which must not hide an adapter."""
    model = adapted(PLAIN, adapter)
    made = []
    for each in (model, folded(model, PLAIN, adapter), build_plain()):
        settings = SamplingConfig(max_new_tokens=24, temperature=0.0)
        writer = Generator(each, Letters(), GeneratorConfig(), ())
        made.append(tokens(writer.generate([Request(prompt, settings, 0) for prompt in prompts()])))
    assert made[0] == made[1]
    assert made[0] != made[2]


def build_plain() -> Decoder:
    """The model without an adapter."""
    plain = build(PLAIN)
    materialise(plain, InitSource(PLAIN, 1), WHOLE, CPU)
    return plain.requires_grad_(False)


def test_switched_off_it_is_the_model_it_was() -> None:
    model, plain = adapted(PLAIN, LoraConfig(rank=3, dora=True)), build_plain()
    ids = torch.arange(4, 14)
    given = (ids, torch.arange(10), [0, 10])
    with torch.no_grad():
        before = model(*given, output="head")
        with switched_off([model]):
            off = model(*given, output="head")
        after, expected = model(*given, output="head"), plain(*given, output="head")
    assert torch.allclose(off, expected, atol=1e-5)
    assert torch.equal(before, after)
    assert not torch.allclose(before, off, atol=1e-2)


EXPERTS = {"experts.gate_up_proj", "experts.down_proj"}
NAMES = {
    "tiny_llama": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "tiny_mixtral": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "tiny_qwen2_moe": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "tiny_deepseek_v3": {
        "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    },
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_layers_have_the_names_users_know(name: str) -> None:
    """Neither shared experts nor routers nor the head; feed-forwards of dense layers only; experts by their own name.
    Transformers has parameters of these names."""
    from transformers import AutoConfig, AutoModelForCausalLM

    cfg = load_model(name, [])
    layers = layers_of(build(cfg), ("all-linear",))
    parts = [part for layer in layers for part in layer.parts]
    assert {part.name for part in parts} == NAMES[name] | (EXPERTS if cfg.moe is not None else set())
    assert {part.name for layer in layers for part in layer.adapted} == NAMES[name]
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**FAMILIES[cfg.family].to_hf_config(cfg)))
    shapes = {key.removesuffix(".weight"): tuple(param.shape) for key, param in theirs.named_parameters()}
    for layer in layers:
        for part in layer.parts:
            number = (layer.experts,) if layer.experts else ()
            assert shapes[part.module] == (*number, part.outputs, layer.inputs)
    dense = {part.module.split(".")[2] for part in parts if part.name == "up_proj"}
    assert len(dense) == (cfg.num_layers if cfg.moe is None else cfg.moe.first_dense)


def test_a_sample_has_every_kind_of_layer() -> None:
    cfg = load_model("tiny_deepseek_v3", [])
    assert cfg.moe is not None
    cfg = dataclasses.replace(cfg, num_layers=6, moe=dataclasses.replace(cfg.moe, first_dense=4))
    assert {part.name for layer in sample(cfg) for part in layer.parts} == NAMES["tiny_deepseek_v3"] | EXPERTS
