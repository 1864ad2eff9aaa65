"""Adapters on models that see: a tower's layer that its checkpoint has fused takes one adapter, as `peft` puts it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import models
from convert.adapters import AdapterWeights, merged
from convert.from_hf import open_hf
from convert.source import Source
from models.adapters.attach import attach
from models.adapters.config import BitfitConfig, Ia3Config, LoraConfig
from models.adapters.names import Key, parameters
from models.adapters.source import AdapterSource
from models.adapters.targets import layers_of
from models.decoder import Decoder
from models.init import InitSource
from parallel.materialise import materialise
from parallel.sharding import SINGLE, Axis, Place, is_kept, shard_of
from scripts.params import load_model
from tests.numerics.test_seeing import CASES, document, logits_of, random
from trainer.pictures import picture_config

CPU = torch.device("cpu")


def drawn(cfg: Any, adapter: Any) -> dict[Key, torch.Tensor]:
    """An adapter none of whose tensors is at its start."""
    source = AdapterSource(InitSource(cfg, 1), cfg, adapter, 2)
    torch.manual_seed(4)
    found: dict[Key, torch.Tensor] = {}
    for param in parameters(layers_of(models.build(cfg), adapter.targets), adapter):
        whole = source.tensor(param.name)
        found |= param.taken_apart(whole + 0.1 * torch.randn_like(whole))
    return found


def adapted(folder: Path, adapter: Any, tensors: dict[Key, torch.Tensor], place: Place = SINGLE) -> Decoder:
    """Our model with the adapter, or what a tp rank has of it."""
    found = open_hf(folder)
    ours = models.build(found.cfg, place)
    attach(ours, adapter)
    base = Source(found, found.cfg, 0)
    materialise(ours, AdapterSource(base, found.cfg, adapter, 0, start=tensors), place.cut, CPU)
    return ours


@pytest.mark.parametrize(
    ("case", "targets"),
    [
        ("qwen2_vl", ("qkv", "v_proj", "fc1")),
        ("qwen2_vl", ("q_proj", "v_proj")),
        ("qwen2_5_vl", ("all-linear",)),
        ("blip2", ("all-linear",)),
        ("internvl, last but one", ("all-linear",)),
    ],
)
def test_logits_are_those_of_peft(case: str, targets: tuple[str, ...], tmp_path: Path) -> None:
    """And of the weights that it is folded into; tp ranks hold their rows of it."""
    from peft import LoraConfig as Theirs
    from peft import get_peft_model

    theirs = random(CASES[case]())
    theirs.save_pretrained(tmp_path)
    found = open_hf(tmp_path)
    adapter = LoraConfig(rank=3, alpha=6, targets=targets)
    tensors = drawn(found.cfg, adapter)
    ours = adapted(tmp_path, adapter, tensors)
    pictures = picture_config(ours.cfg)
    assert pictures is not None
    doc = document(pictures, [(40, 90), (56, 24)], 3)

    canonical: Any = getattr(models.family_of(ours.cfg), "canonical", lambda name: name)
    modules = {canonical(f"{n}.weight").removesuffix(".weight"): n for n, _ in theirs.named_modules() if n}
    chosen = {key.module: modules[key.module] for key in tensors}
    wrapped: Any = get_peft_model(theirs, Theirs(r=3, lora_alpha=6, target_modules=list(chosen.values())))
    for key, tensor in tensors.items():
        layer = wrapped.base_model.model.get_submodule(chosen[key.module])
        getattr(layer, f"lora_{key.kind.upper()}")["default"].weight.data.copy_(tensor)
    wanted = wrapped(**doc.theirs).logits[0]
    logits = logits_of(ours, [doc])
    torch.testing.assert_close(logits, wanted, rtol=0, atol=2e-5 * wanted.abs().max().item())
    for each in (logits, wanted):
        each.logsumexp(-1).square().sum().backward()
    asked = [param for param in ours.parameters() if param.requires_grad]
    assert asked and all(param.grad is not None for param in asked), "what is never run has no adapter"

    folded = merged(found, found.cfg, AdapterWeights(adapter, tensors))
    plain = models.build(found.cfg)
    materialise(plain, Source(folded, found.cfg, 0), SINGLE.cut, CPU)
    whole = dict(plain.named_parameters())
    for rank in (0, 1):
        place = Place(tp=Axis(2, rank))
        part = dict(adapted(tmp_path, adapter, tensors, place).named_parameters())
        for layer in layers_of(models.build(found.cfg), targets):
            weight = part[layer.weight]
            if len(layer.parts) > 1 or not layer.chosen:
                continue
            a, b = (part[f"{layer.adapter}.{kind}"] for kind in "ab")
            own = shard_of(weight).slice(whole[layer.weight], place.cut)
            torch.testing.assert_close(weight + 2.0 * b @ a, own, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "adapter", [LoraConfig(rank=2, dropout=0.1), Ia3Config(targets=("v_proj", "fc2")), BitfitConfig()]
)
def test_what_a_tower_never_runs_stays_with_the_base(adapter: Any) -> None:
    """It is neither trained nor saved, though it is where all of the tower is trained."""
    cfg = load_model("digits", [])
    assert cfg.vision is not None
    tower = dataclasses.replace(cfg.vision.tower, feature_layer=-2, final_norm=False)
    cfg = dataclasses.replace(cfg, vision=dataclasses.replace(cfg.vision, tower=tower), mlp_bias=True)
    model = models.build(cfg)
    assert any(is_kept(param) for param in model.parameters())
    attach(model, adapter)
    assert not any(is_kept(param) for param in model.parameters())
    trained = [name for name, param in model.named_parameters() if param.requires_grad]
    last = f"vision.layers.{tower.num_layers - 1}."
    assert any("vision.layers.0." in name for name in trained)
    assert not any(name.startswith(last) for name in trained)
