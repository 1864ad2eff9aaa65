"""Hugging Face tensors put together from whole rank tensors by the definition of Megatron's layout.

This repeats in a second way what `convert.megatron.names` and `convert.boxes` say, on purpose: what wrote a checkpoint
cannot tell that it is wrong. Whole tensors are read with torch's and safetensors' own readers, joined and split.
Source: Megatron-core's `attention.py` (`get_query_key_value_tensors`), `mlp.py`, `pipeline_parallel`.

Shapes: H query heads, G key/value heads, R = H / G, d head size, F feed-forward size, D hidden size.
"""

import argparse
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from convert.boxes import Meta, Tensors
from convert.megatron.layout import Layout
from convert.megatron.reading import find_folder
from convert.opened import Opened
from models.config import ModelConfig


def check_rebuilt(source: Tensors, output: Opened, metas: Mapping[str, Meta]) -> str:
    """Compare tensors of the first and the last layer of every chunk, of their first and last experts, and both ends.

    Returns:
        What was compared, in a line.

    Raises:
        ValueError: one differs.
    """
    assert output.layout is not None
    if output.format == "torch_dist":
        return "rebuilt another way: not for torch_dist, whose tensors are whole"
    ranks = Ranks(find_folder(output.path)[1], output.layout, output.format == "torch")
    count = 0
    for hf, tensor in rebuilt(ranks, output.cfg):
        rows = source.rows(hf, 0, metas[hf].shape[0]).to(metas[hf].dtype)
        wanted, found = rows.to(tensor.dtype).reshape(-1), tensor.reshape(-1)
        if wanted.shape != found.shape or not torch.equal(_bits(wanted), _bits(found)):
            raise ValueError(f"{hf}, put together by the definition of Megatron's layout, is not what the source has")
        count += 1
    return f"rebuilt another way: {count} tensors of the first and last layers of each stage equal"


def _bits(flat: torch.Tensor) -> torch.Tensor:
    return flat.contiguous().view(torch.uint8)


class Ranks:
    """The tensors of every rank's file by Megatron's names, whole."""

    def __init__(self, folder: Path, layout: Layout, pickled: bool) -> None:
        self.folder, self.layout, self._pickled = folder, layout, pickled

    def tensor(self, name: str, tp: int, chunk: int = 0, ep: int = 0) -> torch.Tensor:
        """One rank's tensor. `chunk` counts over the whole model."""
        return self._read(name, tp, chunk % self.layout.pp, ep, chunk // self.layout.pp)

    def of_tp(self, name: str, chunk: int, ep: int = 0) -> list[torch.Tensor]:
        """The tensors of all tensor-parallel ranks."""
        return [self.tensor(name, tp, chunk, ep) for tp in range(self.layout.tp)]

    def has(self, name: str, chunk: int) -> bool:
        """Whether the ranks of a chunk have a tensor of that name."""
        prefix, names = self._names(0, chunk % self.layout.pp, 0, chunk // self.layout.pp)
        return prefix + name in names

    def _file(self, tp: int, pp: int, ep: int) -> Path:
        folder = f"mp_rank_{tp:02d}" + f"_{pp:03d}" * (self.layout.pp > 1) + f"_{ep:03d}" * (self.layout.ep > 1)
        return self.folder / folder / ("model_optim_rng.pt" if self._pickled else "model_optim_rng.safetensors")

    def _read(self, name: str, tp: int, pp: int, ep: int, chunk: int) -> torch.Tensor:
        file = self._file(tp, pp, ep)
        if self._pickled:
            return _load(file)[f"model{chunk}" if self.layout.vpp > 1 else "model"][name].clone()
        with safe_open(file, framework="pt") as opened:
            return opened.get_tensor((f"model{chunk}/" if self.layout.vpp > 1 else "") + name)

    @cache  # noqa: B019 -- lives as long as the check
    def _names(self, tp: int, pp: int, ep: int, chunk: int) -> tuple[str, frozenset[str]]:
        file = self._file(tp, pp, ep)
        if self._pickled:
            return "", frozenset(_load(file)[f"model{chunk}" if self.layout.vpp > 1 else "model"])
        with safe_open(file, framework="pt") as opened:
            return f"model{chunk}/" if self.layout.vpp > 1 else "", frozenset(opened.keys())


def _load(file: Path) -> dict[str, Any]:
    """A rank's file, its values mapped. Opened for each tensor, so that mapped memory does not add up."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(file, map_location="cpu", mmap=True, weights_only=True)


def rebuilt(ranks: Ranks, cfg: ModelConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """Hugging Face names with tensors joined from all ranks: the ends, the first and last layer of every chunk."""
    layout = ranks.layout
    counts = layout.layers or (cfg.num_layers // layout.chunks,) * layout.chunks
    yield from _ends(ranks, cfg)
    first = 0
    for chunk, count in enumerate(counts):
        for here in sorted({0, count - 1} if count else set()):
            hf = f"model.layers.{first + here}."
            yield from _attention(ranks, cfg, chunk, f"decoder.layers.{here}.self_attention.", f"{hf}self_attn.")
            yield from _feed_forward(ranks, cfg, chunk, first + here, f"decoder.layers.{here}.mlp.", hf)
        first += count


def _ends(ranks: Ranks, cfg: ModelConfig) -> Iterator[tuple[str, torch.Tensor]]:
    last = ranks.layout.chunks - 1
    embedding = torch.cat(ranks.of_tp("embedding.word_embeddings.weight", 0))
    if embedding[cfg.vocab_size :].any():
        raise ValueError("the rows that pad the vocabulary are not zero")
    yield "model.embed_tokens.weight", embedding[: cfg.vocab_size]
    yield "model.norm.weight", ranks.tensor("decoder.final_layernorm.weight", 0, last)
    if ranks.has("output_layer.weight", last):
        head = "model.embed_tokens.weight" if cfg.tied_embeddings else "lm_head.weight"
        yield head, torch.cat(ranks.of_tp("output_layer.weight", last))[: cfg.vocab_size]
    elif last or not cfg.tied_embeddings:
        raise ValueError("the last stage has no output_layer.weight, which Megatron wants there")


def _attention(ranks: Ranks, cfg: ModelConfig, chunk: int, mega: str, hf: str) -> Iterator[tuple[str, torch.Tensor]]:
    yield f"{hf}o_proj.weight", torch.cat(ranks.of_tp(f"{mega}linear_proj.weight", chunk), 1)
    if cfg.mla is not None:
        ups = {"linear_kv_up_proj": "kv_b_proj"}
        ups |= {"linear_q_up_proj": "q_b_proj"} if cfg.mla.q_rank else {"linear_q_proj": "q_proj"}
        for theirs, name in ups.items():
            yield f"{hf}{name}.weight", torch.cat(ranks.of_tp(f"{mega}{theirs}.weight", chunk))
        return
    groups, heads, size = cfg.num_kv_heads, cfg.num_heads // cfg.num_kv_heads, cfg.head_dim
    for kind in ("weight", "bias") if cfg.qkv_bias else ("weight",):
        fused = torch.cat(ranks.of_tp(f"{mega}linear_qkv.{kind}", chunk))
        by_group = fused.view(groups, heads + 2, size, -1)  # [G, R + 2, d, D], or [..., 1] of a bias
        for name, held in (("q", by_group[:, :heads]), ("k", by_group[:, heads]), ("v", by_group[:, heads + 1])):
            yield f"{hf}{name}_proj.{kind}", held.reshape(-1, *fused.shape[1:])


def _feed_forward(
    ranks: Ranks, cfg: ModelConfig, chunk: int, layer: int, mega: str, hf: str
) -> Iterator[tuple[str, torch.Tensor]]:
    if cfg.moe is None or layer < cfg.moe.first_dense:
        yield from _gated(ranks, chunk, f"{mega}linear_fc1.weight", f"{mega}linear_fc2.weight", f"{hf}mlp.")
        return
    layout, mixtral = ranks.layout, cfg.family == "mixtral"
    block = f"{hf}block_sparse_moe." if mixtral else f"{hf}mlp."
    names = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    yield f"{block}gate.weight", ranks.tensor(f"{mega}router.weight", 0, chunk)
    each = cfg.moe.num_experts // layout.ep
    for expert in sorted({0, cfg.moe.num_experts - 1}):
        ep, here = divmod(expert, each)
        if layout.experts == "grouped":
            up, down = (f"{mega}experts.linear_fc{i}.weight{here}" for i in (1, 2))
        else:
            up, down = (f"{mega}experts.local_experts.{here}.linear_fc{i}.weight" for i in (1, 2))
        yield from _gated(ranks, chunk, up, down, f"{block}experts.{expert}.", names, ep)
    if cfg.moe.shared_size:
        shared = f"{mega}shared_experts."
        name = "shared_expert" if cfg.family == "qwen2_moe" else "shared_experts"
        yield from _gated(ranks, chunk, f"{shared}linear_fc1.weight", f"{shared}linear_fc2.weight", f"{block}{name}.")


def _gated(
    ranks: Ranks,
    chunk: int,
    up: str,
    down: str,
    hf: str,
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    ep: int = 0,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every rank's first half is gate rows, its second up rows; down is cut by columns."""
    halves = [local.chunk(2) for local in ranks.of_tp(up, chunk, ep)]
    yield f"{hf}{names[0]}.weight", torch.cat([gate for gate, _ in halves])
    yield f"{hf}{names[1]}.weight", torch.cat([above for _, above in halves])
    yield f"{hf}{names[2]}.weight", torch.cat(ranks.of_tp(down, chunk, ep), 1)
