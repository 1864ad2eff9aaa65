"""The small files of a Hugging Face folder: which are copied, when config.json is kept, how transformers reads it."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from convert.hf_folder_files import copy_files, write_config
from convert.same_model import differing
from models import FAMILIES, ModelConfig, RopeConfig, config_from_hf_folder
from scripts.params import load_model
from tests.unit.convert.test_megatron_args import TINY
from tests.unit.convert.test_to_hf import tokenizer_folder

# config.json of SmolLM2-135M as published
SMOLLM = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1",
    "use_cache": True,
    "vocab_size": 49152,
}


def folder_with(path: Path, config: dict[str, Any]) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    return path


def written(into: Path, cfg: ModelConfig, original: Path | None, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    into.mkdir()
    write_config(into, cfg, dtype, original)
    return json.loads((into / "config.json").read_text())


def test_the_config_of_an_unchanged_model_is_kept(tmp_path: Path) -> None:
    """Every key of it, in its order; the dtype is that of the weights now."""
    original = folder_with(tmp_path / "hf", SMOLLM)
    config = written(tmp_path / "out", config_from_hf_folder(original), original)
    assert config == SMOLLM | {"torch_dtype": "float32"} and list(config) == list(SMOLLM)
    # How a model is trained is not what it computes.
    cfg = dataclasses.replace(load_model("smollm2_135m", []), init_std=0.5)
    assert written(tmp_path / "again", cfg, original, torch.bfloat16) == SMOLLM


def test_the_dtype_is_written_under_the_key_that_is_there(tmp_path: Path) -> None:
    newer = {("dtype" if key == "torch_dtype" else key): value for key, value in SMOLLM.items()}
    original = folder_with(tmp_path / "hf", newer)
    config = written(tmp_path / "out", config_from_hf_folder(original), original, torch.float16)
    assert config["dtype"] == "float16" and "torch_dtype" not in config
    assert AutoConfig.from_pretrained(tmp_path / "out").dtype is torch.float16


def test_a_grown_vocabulary_keeps_the_config(tmp_path: Path) -> None:
    original = folder_with(tmp_path / "hf", SMOLLM)
    cfg = dataclasses.replace(config_from_hf_folder(original), vocab_size=49160)
    assert written(tmp_path / "out", cfg, original, torch.bfloat16) == SMOLLM | {"vocab_size": 49160}


@pytest.mark.parametrize(
    "change",
    [
        {"num_layers": 29},
        {"rope": RopeConfig(100000.0, "linear", 4.0, 8192)},
        {"rope": RopeConfig(10000.0)},
        {"max_seq_len": 16384},
        {"norm_eps": 1e-6},
        {"tied_embeddings": False},
    ],
)
def test_the_config_of_a_changed_model_is_made_anew(tmp_path: Path, change: dict[str, Any]) -> None:
    original = folder_with(tmp_path / "hf", SMOLLM)
    cfg = dataclasses.replace(config_from_hf_folder(original), **change)
    config = written(tmp_path / "out", cfg, original)
    assert config_from_hf_folder(tmp_path / "out") == cfg
    assert (config["bos_token_id"], config["eos_token_id"], config["torch_dtype"]) == (0, 0, "float32")
    assert "is_llama_config" not in config


def test_a_model_of_another_type_gets_its_own_config(tmp_path: Path) -> None:
    """The config beside a tokenizer may be of a family that is not here, or of quantised weights."""
    for name, change in (("foreign", {"model_type": "mistral"}), ("quantised", {"quantization_config": {"bits": 4}})):
        original = folder_with(tmp_path / name, SMOLLM | change)
        config = written(tmp_path / f"{name}_out", load_model("smollm2_135m", []), original)
        assert config["model_type"] == "llama" and config["eos_token_id"] == 0 and "quantization_config" not in config


def test_layers_that_are_not_exported_are_not_promised(tmp_path: Path) -> None:
    cfg = load_model("tiny_deepseek_v3", [])
    original = folder_with(
        tmp_path / "hf", FAMILIES[cfg.family].to_hf_config(cfg) | {"num_nextn_predict_layers": 1, "ep_size": 1}
    )
    config = written(tmp_path / "out", cfg, original)
    assert config["ep_size"] == 1 and config["num_nextn_predict_layers"] == 0


@pytest.mark.parametrize("name", TINY)
def test_every_family_is_kept_when_transformers_wrote_it(tmp_path: Path, name: str) -> None:
    """Its own spelling (`rope_parameters`, `dtype`) describes the same model to us."""
    cfg = load_model(name, [])
    keys = FAMILIES[cfg.family].to_hf_config(cfg)
    AutoConfig.for_model(**keys).save_pretrained(tmp_path / "hf")
    theirs = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert not set(differing(cfg, config_from_hf_folder(tmp_path / "hf")))
    config = written(tmp_path / "out", cfg, tmp_path / "hf")
    assert {**config, "dtype": None, "torch_dtype": None} == {**theirs, "dtype": None, "torch_dtype": None}
    assert AutoConfig.from_pretrained(tmp_path / "out").dtype is torch.float32


def test_the_files_of_a_folder_travel(tmp_path: Path) -> None:
    source, into = tokenizer_folder(tmp_path / "hf"), tmp_path / "out"
    (source / "config.json").write_text(json.dumps(SMOLLM))
    (source / "model.safetensors").write_bytes(b"weights")
    (source / "notes.txt").write_text("not ours")
    into.mkdir()
    names = copy_files(source, into)
    assert sorted(names) == sorted(path.name for path in into.iterdir())
    assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"} <= set(names)
    assert not {"model.safetensors", "notes.txt"} & set(names)
    assert AutoTokenizer.from_pretrained(into)("w3 w1")["input_ids"] == [3, 1]
    assert GenerationConfig.from_pretrained(into).temperature == 0.5
    write_config(into, config_from_hf_folder(into), torch.bfloat16, source)
    assert GenerationConfig.from_pretrained(into).temperature == 0.5


def test_python_files_travel_with_what_they_import(tmp_path: Path) -> None:
    """Those named in either config, those they import from beside them; not others, not code of another repository."""
    auto_map = {"AutoModelForCausalLM": "modeling_own.OwnModel", "AutoConfig": "someone/else--configuration_own.Own"}
    auto_map |= {"AutoModel": str(tmp_path / "outside.Own")}
    (tmp_path / "outside.py").write_text("x = 1\n")
    source = folder_with(tmp_path / "hf", SMOLLM | {"auto_map": auto_map})
    tokenizer = {"auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}}
    (source / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (source / "modeling_own.py").write_text("import torch\nfrom .parts_own import Part\nfrom .gone import x\n")
    (source / "parts_own.py").write_text("    from .modeling_own import OwnModel\n")
    for name in ("tokenization_own.py", "configuration_own.py", "setup.py"):
        (source / name).write_text("x = 1\n")
    (tmp_path / "out").mkdir()
    names = copy_files(source, tmp_path / "out")
    python = [name for name in names if name.endswith(".py")]
    assert sorted(python) == ["modeling_own.py", "parts_own.py", "tokenization_own.py"]


def test_without_an_original_there_is_a_config_all_the_same(tmp_path: Path) -> None:
    cfg = load_model("tiny_qwen3", [])
    written(tmp_path / "out", cfg, None)
    assert config_from_hf_folder(tmp_path / "out") == cfg
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {"_from_model_config": True}


def test_a_broken_original_is_named(tmp_path: Path) -> None:
    original = folder_with(tmp_path / "hf", SMOLLM)
    (original / "config.json").write_text('{"model_type": ')
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=r"hf/config\.json is not readable as JSON"):
        write_config(tmp_path / "out", load_model("smollm2_135m", []), torch.float32, original)


def test_a_tokenizer_that_does_not_load_is_named(tmp_path: Path) -> None:
    original = folder_with(tmp_path / "broken", {key: SMOLLM[key] for key in SMOLLM if not key.endswith("token_id")})
    (original / "tokenizer.json").write_text('{"version": "1.0"}')
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=r"the tokenizer in .*broken cannot be loaded .*eos_token_id"):
        write_config(tmp_path / "out", load_model("tiny_llama", []), torch.float32, original)
