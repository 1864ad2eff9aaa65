"""Tiny `torch_dist` checkpoints, whole and spoiled."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import Metadata

from convert.copying import copy
from convert.from_hf import hf_shapes
from convert.megatron.args import to_args
from convert.megatron.dist import begin_dist
from convert.megatron.layout import Layout
from models import ModelConfig
from scripts.params import load_model
from tests.megatron_shards import Memory

DENSE = dataclasses.replace(load_model("tiny_qwen2", []), num_layers=3, vocab_size=70, tied_embeddings=False)
SPARSE = dataclasses.replace(load_model("tiny_mixtral", []), num_layers=2, vocab_size=70)
MIXED = dataclasses.replace(load_model("tiny_deepseek_v3", []), num_layers=3, vocab_size=70)
Edit = Callable[[Metadata], None]


def weights(cfg: ModelConfig, dtype: torch.dtype = torch.bfloat16) -> Memory:
    draw = torch.Generator().manual_seed(3)
    return Memory({
        name: torch.randn(shape, generator=draw).to(torch.float32 if name.endswith("correction_bias") else dtype)
        for name, shape in hf_shapes(cfg).items()
    })  # fmt: skip


def write(cfg: ModelConfig, layout: Layout, root: Path) -> Memory:
    source = weights(cfg)
    copy(source, begin_dist(root, cfg, layout, source.metas, to_args(cfg, layout, torch.bfloat16)), most=4096)
    return source


def assert_same(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def edited(root: Path, edit: Edit) -> None:
    """Change the metadata of a checkpoint."""
    file = root / "release" / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    edit(metadata)
    file.write_bytes(pickle.dumps(metadata))
