"""Weights of a folder under our names, and every way a folder can fail to fit the config."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from convert.boxes import Meta
from convert.from_hf import open_hf, weight_rules, whole_shapes
from convert.hf_files import SINGLE, StoredTensor, read_folder
from convert.source import Source
from convert.to_hf import export
from models import ModelConfig
from models.config import MLAConfig, MoEConfig
from models.init import InitSource

CFG = ModelConfig("llama", 40, 16, 24, 2, 4, 2, 4, 64, init_std=0.1)
VARIANTS = {
    "llama": CFG,
    "llama_biases": dataclasses.replace(CFG, qkv_bias=True, attention_out_bias=True, mlp_bias=True),
    "qwen2": dataclasses.replace(CFG, family="qwen2", qkv_bias=True, tied_embeddings=True),
    "qwen3": dataclasses.replace(CFG, family="qwen3", qk_norm=True, head_dim=8),
    "scalar": dataclasses.replace(CFG, head="scalar"),
    "mixtral": dataclasses.replace(CFG, family="mixtral", moe=MoEConfig(4, 2, 24)),
    "qwen2_moe": dataclasses.replace(
        CFG,
        family="qwen2_moe",
        qkv_bias=True,
        moe=MoEConfig(4, 2, 8, shared_size=20, shared_gate=True, first_dense=1, normalize=False),
    ),
    "qwen3_moe": dataclasses.replace(CFG, family="qwen3_moe", qk_norm=True, moe=MoEConfig(4, 2, 8)),
    "deepseek_v3": dataclasses.replace(
        CFG,
        family="deepseek_v3",
        num_kv_heads=4,
        head_dim=6,
        mla=MLAConfig(8, 4, 2, 4, 8),
        moe=MoEConfig(4, 2, 8, shared_size=8, score="sigmoid", group_score="top2_sum", correction_bias=True),
    ),
}


def write(folder: Path, cfg: ModelConfig, dtype: torch.dtype = torch.float32) -> Path:
    source = InitSource(cfg, 0)
    return export(folder, cfg, ((name, source.tensor(name)) for name in whole_shapes(cfg)), dtype=dtype)


def edit(folder: Path, **change: torch.Tensor | None) -> None:
    """Replace (or, with None, remove) tensors of a folder; '.' in names is spelled '__'."""
    tensors = load_file(folder / SINGLE)
    for key, tensor in change.items():
        name = key.replace("__", ".")
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file(tensors, folder / SINGLE)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_has_one_rule_and_no_rule_is_left(variant: str) -> None:
    cfg = VARIANTS[variant]
    rules, _ = weight_rules(cfg)
    assert list(rules) == list(dict.fromkeys(rules)) and set(rules) == set(whole_shapes(cfg))
    theirs = [name for rule in rules.values() for name in rule.sources]
    assert len(theirs) == len(set(theirs))


@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip_is_exact(tmp_path: Path, variant: str) -> None:
    cfg = VARIANTS[variant]
    source = InitSource(cfg, 0)
    found = dict(Source(open_hf(write(tmp_path / "hf", cfg)), cfg).weights())
    assert set(found) == set(whole_shapes(cfg))
    assert all(torch.equal(tensor, source.tensor(name)) for name, tensor in found.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_loads_into_fp32(tmp_path: Path, dtype: torch.dtype) -> None:
    source = InitSource(CFG, 0)
    for name, tensor in Source(open_hf(write(tmp_path / "hf", CFG, dtype)), CFG).weights():
        assert tensor.dtype is torch.float32
        assert torch.equal(tensor, source.tensor(name).to(dtype).float())


def told(folder: Path, cfg: ModelConfig | None = None) -> str:
    with pytest.raises(ValueError) as caught:
        opened = open_hf(folder)
        Source(opened, cfg or opened.cfg).check()
    return str(caught.value)


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "hf", CFG)
    edit(folder, model__layers__1__self_attn__k_proj__weight=None, lm_head__weight=None)
    message = told(folder)
    assert "2 tensors are missing:" in message
    assert "model.layers.1.self_attn.k_proj.weight" in message and "lm_head.weight" in message


def test_other_shapes_are_named_with_both(tmp_path: Path) -> None:
    message = told(write(tmp_path / "hf", CFG), dataclasses.replace(CFG, intermediate_size=32))
    assert "6 tensors have another shape:" in message
    assert "model.layers.0.mlp.gate_proj.weight: [24, 16] in the file, [32, 16] by the config" in message
    assert "... and 1 more" in message and "model=hf" in message
    assert message.count("in the file") == 5


def test_tensors_of_another_model_are_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "hf", VARIANTS["llama_biases"])
    message = told(folder, CFG)
    write(tmp_path / "plain", CFG)
    (folder / "config.json").write_bytes((tmp_path / "plain" / "config.json").read_bytes())
    assert told(folder) == message, "opening and checking against a model say the same"
    assert "14 tensors have no place in the model:" in message
    assert "model.layers.0.self_attn.q_proj.bias" in message and "... and 9 more" in message


def test_all_kinds_are_told_together(tmp_path: Path) -> None:
    folder = write(tmp_path / "hf", CFG)
    edit(folder, model__norm__weight=None, model__extra=torch.zeros(1), lm_head__weight=torch.zeros(3, 16))
    message = told(folder)
    assert all(
        part in message for part in ("1 tensors are missing", "1 tensors have another", "1 tensors have no place")
    )


def test_tied_checkpoint_may_repeat_the_head_and_old_ones_hold_frequencies(tmp_path: Path) -> None:
    folder = write(tmp_path / "hf", VARIANTS["qwen2"])
    edit(folder, lm_head__weight=torch.zeros(40, 16), model__layers__0__self_attn__rotary_emb__inv_freq=torch.zeros(2))
    source = Source(open_hf(folder), VARIANTS["qwen2"])
    source.check()
    assert set(source.opened.tensors.metas) == set(read_folder(folder)) - {
        "lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"
    }  # fmt: skip
    assert source.tensor("embed.weight").any(), "the repeated head's zeros were taken for the embedding"


def test_check_reads_no_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "hf", CFG)

    def refuse(*_: object) -> torch.Tensor:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(StoredTensor, "_read", refuse)
    monkeypatch.setattr(np, "memmap", refuse)
    source = Source(open_hf(folder), CFG)
    source.check()
    with pytest.raises(AssertionError, match="was read"):
        source.tensor("norm.weight")


def test_scalar_head_on_a_language_model_starts_fresh(tmp_path: Path) -> None:
    folder = write(tmp_path / "hf", CFG)
    cfg = dataclasses.replace(CFG, head="scalar")
    source = Source(open_hf(folder), cfg, seed=7)
    source.check()
    assert source.fresh_head
    assert torch.equal(source.tensor("head.weight"), InitSource(cfg, 7).tensor("head.weight"))
    assert torch.equal(source.tensor("norm.weight"), torch.ones(16))


def test_a_reward_model_whose_config_does_not_say_so(tmp_path: Path) -> None:
    folder = write(tmp_path / "hf", VARIANTS["scalar"])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLM"]}))
    opened = open_hf(folder)
    assert opened.cfg.head == "scalar" and opened.tensors.metas["score.weight"].shape == (1, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strips_of_a_tensor_are_its_rows_and_columns(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = write(tmp_path / "hf", CFG, dtype)
    name, tensors = "model.layers.1.mlp.down_proj.weight", open_hf(folder).tensors
    whole = load_file(folder / SINGLE)[name]
    assert tensors.metas[name] == Meta(dtype, (16, 24))
    for start, stop, columns in [(0, 16, None), (3, 7, None), (3, 7, (0, 24)), (3, 7, (5, 6)), (0, 16, (12, 24))]:
        found = tensors.rows(name, start, stop, columns)
        assert found.dtype is dtype and torch.equal(found, whole[start:stop, slice(*(columns or (0, 24)))])
        found.fill_(1)  # its own memory, or this fails


def test_a_file_cut_short_after_it_was_opened_is_told(tmp_path: Path) -> None:
    folder = write(tmp_path / "hf", CFG)
    tensors = open_hf(folder).tensors
    last = max(read_folder(folder).items(), key=lambda item: item[1].stop)[0]
    os.truncate(folder / SINGLE, (folder / SINGLE).stat().st_size - 4)
    for columns in (None, (0, 2)):
        with pytest.raises(ValueError, match="ended early while reading"):
            tensors.rows(last, 0, tensors.metas[last].shape[0], columns)
