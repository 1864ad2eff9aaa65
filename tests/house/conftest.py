"""A small world for configs to live in: data, a tokenizer and a model folder, where named runs look for them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from safetensors.torch import save_file

from convert.from_hf import hf_shapes
from models import family_of
from scripts.params import load_model

CONF = Path(__file__).resolve().parents[2] / "conf"
SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "intermediate_size": 1536,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "rope_scaling": None,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "initializer_range": 0.041666666666666664,
}
"""config.json of SmolLM2-135M-Instruct, as far as it says sizes."""
ARITHMETIC = SMOLLM2 | {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "intermediate_size": 352,
    "vocab_size": 264,
    "max_position_embeddings": 128,
    "rope_theta": 10000.0,
    "initializer_range": 0.02,
}
"""Of a run of conf/model/arithmetic.yaml, exported."""
MIXTRAL = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "vocab_size": 512,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "sliding_window": None,
    "hidden_act": "silu",
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "router_aux_loss_coef": 0.02,
    "tie_word_embeddings": False,
}
"""config.json of a toy with experts."""
CHANNELS = ("code", "maths", "dialogue", "reference")
RUNS = {"arithmetic_sft": "LlamaForCausalLM", "arithmetic_reward": "LlamaForSequenceClassification"}
"""Runs that others start from; exports stand in for them."""
SEEING_RUNS = {
    "digits": "digits",
    "digits_cold": "digits",
    "llava_connector": "digits",
    "qwen_vl_align": "digits_resampler",
    "qwen_vl_multitask": "digits_resampler",
    "internvl_warmup": "digits_tiles",
    "digits_clip": "digits_clip",
    "blip2_stage1": "digits_blip2_itm",
}
"""And those that see, with their models."""
WORLD_FILES = (
    *(f"arithmetic/{name}" for name in ("cold_start", "prompts", "pairs", "held_out", "held_out_pairs")),
    *(f"digits/{name}" for name in ("train", "held_out", "blind", "blind_held_out", "captions", "captions_held_out")),
    *(f"digits/{name}" for name in ("pairs", "held_out_pairs")),
    *(f"preferences/{name}" for name in ("spelling", "sorting", "fractions", "sums", "held_out")),
)
"""What scripts/prepare_arithmetic.py, prepare_preferences.py and prepare_digits.py make."""


def make_digits(folder: Path, model: str = "digits") -> None:
    """An export of a run of a model of digits, whose names and shapes are looked at; its numbers are zeros."""
    cfg = load_model(model, [])
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(family_of(cfg).to_hf_config(cfg)))
    (folder / "tokenizer.json").write_text("{}")
    zeros = {name: torch.zeros(shape, dtype=torch.float16) for name, shape in hf_shapes(cfg).items()}
    save_file(zeros, folder / "model.safetensors")


def make_world(folder: Path) -> Path:
    """Fill a folder with stand-ins for all that the named runs and the refusals refer to."""
    model = folder / "assets" / "smollm2-135m-instruct"
    model.mkdir(parents=True)
    (model / "config.json").write_text(json.dumps(SMOLLM2))
    (model / "model.safetensors").write_bytes(b"")
    (model / "tokenizer.json").write_text("{}")
    row = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
    (folder / "assets" / "data").mkdir()
    for name in CHANNELS:
        (folder / "assets" / "data" / f"{name}.jsonl").write_text(row + "\n")
    for inside in ("arithmetic/tokenizer", "digits/tokenizer", "preferences"):
        (folder / "assets" / inside).mkdir(parents=True)
    for world in ("arithmetic", "digits"):
        (folder / "assets" / world / "tokenizer" / "tokenizer.json").write_text("{}")
    for run, architecture in RUNS.items():
        (folder / "runs" / run).mkdir(parents=True)
        (folder / "runs" / run / "config.json").write_text(json.dumps(ARITHMETIC | {"architectures": [architecture]}))
        (folder / "runs" / run / "model.safetensors").write_bytes(b"")
        (folder / "runs" / run / "tokenizer.json").write_text("{}")
    for run, sees in SEEING_RUNS.items():
        make_digits(folder / "runs" / run, sees)
    for file in WORLD_FILES:
        (folder / "assets" / f"{file}.jsonl").write_text(row + "\n")
    (folder / "chats.jsonl").write_text(row + "\n")
    (folder / "no_weights").mkdir()
    (folder / "no_weights" / "config.json").write_text(json.dumps(SMOLLM2))
    (folder / "empty").mkdir()
    (folder / "experts").mkdir()
    (folder / "experts" / "config.json").write_text(json.dumps(MIXTRAL))
    (folder / "experts" / "model.safetensors").write_bytes(b"")
    return folder


@pytest.fixture(scope="session")
def world_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def world(world_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The small world as the current folder."""
    monkeypatch.chdir(world_folder)
    return world_folder


@pytest.fixture
def composed() -> Callable[..., DictConfig]:
    """Compose the project's own conf/ with overrides."""

    def compose_with(*overrides: str) -> DictConfig:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return compose("config", overrides=list(overrides))

    return compose_with
