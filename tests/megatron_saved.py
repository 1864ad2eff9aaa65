"""Megatron checkpoints as Megatron itself saves them: the plain reference's tensors and a plain torch.save."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from convert.boxes import Pieces, Writable, put
from convert.from_hf import hf_shapes
from convert.megatron.args import to_args
from convert.megatron.layout import Layout
from models import ModelConfig
from scripts.params import load_model
from tests.megatron_reference import Cut, reference
from tests.megatron_shards import Memory

Rank = tuple[int, int, int]
"""tp, pp, ep"""

CASES = {
    "llama": ("llama", [], Layout()),
    "llama_tp_pp_local": ("llama", [], Layout(tp=2, pp=2, implementation="local")),
    "llama_biases": ("llama", ["qkv_bias=true", "attention_out_bias=true", "mlp_bias=true"], Layout(tp=4)),
    "llama_uneven_pp": ("llama", ["num_layers=4"], Layout(pp=3, layers=(1, 2, 1))),
    "qwen2_tied": ("qwen2", [], Layout(tp=2)),
    "qwen2_tied_pp": ("qwen2", ["vocab_size=500"], Layout(tp=2, pp=2)),
    "qwen2_tied_vpp": ("qwen2", [], Layout(tp=1, pp=2, vpp=2, implementation="local")),
    "qwen3": ("qwen3", [], Layout(tp=4, pp=2, vocab_multiple=1)),
    "mixtral": ("mixtral", [], Layout(tp=2, pp=2, ep=2)),
    "mixtral_sequential": ("mixtral", [], Layout(ep=4, implementation="local", experts="sequential")),
    "qwen2_moe": ("qwen2_moe", [], Layout(tp=2, pp=3, ep=2, experts="sequential")),
    "qwen3_moe_vpp": ("qwen3_moe", ["num_layers=4"], Layout(pp=2, vpp=2, ep=4)),
    "deepseek_v2": ("deepseek_v2", [], Layout(tp=2, pp=2, layers=(2, 1))),
    "deepseek_v3": ("deepseek_v3", [], Layout(tp=2, ep=2)),
    "deepseek_v3_local": ("deepseek_v3", [], Layout(tp=4, ep=2, pp=3, implementation="local", experts="sequential")),
}
"""Every family; even and uneven pipelines, chunks, experts, tied ends, both ways of naming."""


def case(name: str) -> tuple[ModelConfig, Layout]:
    """The tiny model and the layout of a case."""
    family, changes, layout = CASES[name]
    return load_model(f"tiny_{family}", changes), layout


def weights(cfg: ModelConfig, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Random Hugging Face tensors of a model; a router's correction bias stays fp32."""
    draw = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=draw).to(torch.float32 if name.endswith("correction_bias") else dtype)
        for name, shape in hf_shapes(cfg).items()
    }


def states_of(hf: Mapping[str, torch.Tensor], cfg: ModelConfig, layout: Layout) -> dict[Rank, list[dict[str, Any]]]:
    """The tensors of every rank's chunks by the plain reference."""
    layers = list(layout.chunk_layers(cfg.num_layers))
    te, grouped = layout.implementation == "transformer_engine", layout.experts == "grouped"
    return reference(
        hf, cfg, Cut(layout.tp, layout.pp, layout.vpp, layout.ep, layers, te, grouped, layout.vocab_multiple)
    )


def folder_name(layout: Layout, rank: Rank) -> str:
    """Megatron's name of a rank's folder."""
    tp, pp, ep = rank
    return f"mp_rank_{tp:02d}" + (f"_{pp:03d}" if layout.pp > 1 else "") + (f"_{ep:03d}" if layout.ep > 1 else "")


def save(
    root: Path,
    cfg: ModelConfig,
    layout: Layout,
    change: Callable[[Rank, dict[str, Any]], object] = lambda rank, content: None,
    **args: Any,
) -> dict[str, torch.Tensor]:
    """Save a checkpoint of step 7 as Megatron does, each rank's content changed by `change`. Returns what is in it."""
    hf = weights(cfg)
    for rank, states in states_of(hf, cfg, layout).items():
        content: dict[str, Any] = {
            "args": argparse.Namespace(**(to_args(cfg, layout, torch.bfloat16, 7) | args)),
            "checkpoint_version": 3.0,
            "iteration": 7,
        }
        content |= {"model" if layout.vpp == 1 else f"model{k}": state for k, state in enumerate(states)}
        change(rank, content)
        file = root / "iter_0000007" / folder_name(layout, rank) / "model_optim_rng.pt"
        file.parent.mkdir(parents=True)
        torch.save(content, file)
    (root / "latest_checkpointed_iteration.txt").write_text("7\n")
    return hf


def fill(pieces: Pieces[Writable], hf: Mapping[str, torch.Tensor], block: int = 7) -> None:
    """Put every tensor into a begun checkpoint, some rows at a time."""
    memory = Memory(hf)
    for name, meta in memory.metas.items():
        rows = math.prod(meta.shape[:-1] if len(meta.shape) > 1 else meta.shape)
        for start in range(0, rows, block):
            put(pieces, name, start, memory.rows(name, start, min(start + block, rows)))
