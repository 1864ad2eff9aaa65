"""Hugging Face tensors put together from whole tensors of Megatron by the definition of its layout.

This repeats in a second way what `convert.megatron.names` and `convert.boxes` say, on purpose: what wrote a checkpoint
cannot tell that it is wrong. Tensors are read with torch's and safetensors' own readers, joined and split.
Source: Megatron-core's `attention.py` (`get_query_key_value_tensors`), `mlp.py`, `moe/experts.py`.

Shapes: H query heads, G key/value heads, R = H / G, d head size, F feed-forward size, D hidden size.
"""

from collections.abc import Iterator, Mapping
from typing import Protocol

import torch

from convert.boxes import Meta, Tensors
from convert.megatron.reading import find_folder
from convert.opened import Opened
from convert.rebuilding_files import Global, Ranks
from models.config import ModelConfig

Found = Iterator[tuple[str, torch.Tensor]]


class Parts(Protocol):
    """A Megatron checkpoint by the names of its tensors."""

    layers: list[int]
    """Those to look at."""

    def of(self, name: str, layer: int | None = None) -> list[torch.Tensor]:
        """What each tensor-parallel rank has under a name (below the layer); one tensor where they are whole."""
        ...

    def expert(self, name: str, layer: int, expert: int) -> list[torch.Tensor]:
        """The same of an expert's linear layer."""
        ...

    def has_head(self) -> bool:
        """Whether there is an output_layer.weight."""
        ...

    def wants_head(self, tied: bool) -> bool:
        """Whether Megatron wants one."""
        ...


def check_rebuilt(source: Tensors, output: Opened, metas: Mapping[str, Meta]) -> str:
    """Compare tensors of the first and the last layer of every chunk, of their first and last experts, and the ends.

    Returns:
        What was compared, in a line.

    Raises:
        ValueError: one differs.
    """
    folder, cfg = find_folder(output.path)[1], output.cfg
    assert output.layout is not None
    parts: Parts
    if output.format == "torch_dist":
        parts = Global(folder, cfg)
    else:
        parts = Ranks(folder, cfg, output.layout, output.format == "torch")
    count = 0
    for hf, tensor in rebuilt(parts, cfg):
        wanted = source.rows(hf, 0, metas[hf].shape[0]).to(metas[hf].dtype).to(tensor.dtype)
        if tuple(tensor.shape) != metas[hf].shape or not torch.equal(_bits(wanted), _bits(tensor)):
            raise ValueError(f"{hf}, put together by the definition of Megatron's layout, is not what the source has")
        count += 1
    return f"rebuilt another way: {count} tensors of {len(parts.layers)} layers (ends of every stage) equal"


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).contiguous().view(torch.uint8)


def rebuilt(parts: Parts, cfg: ModelConfig) -> Found:
    """Hugging Face names with tensors joined from all ranks."""
    yield from _ends(parts, cfg)
    for layer in parts.layers:
        hf = f"model.layers.{layer}."
        yield from _attention(parts, cfg, layer, f"{hf}self_attn.")
        yield from _feed_forward(parts, cfg, layer, hf)


def _ends(parts: Parts, cfg: ModelConfig) -> Found:
    embedding = torch.cat(parts.of("embedding.word_embeddings.weight"))
    if embedding[cfg.vocab_size :].any():
        raise ValueError("the rows that pad the vocabulary are not zero")
    yield "model.embed_tokens.weight", embedding[: cfg.vocab_size]
    (norm, *_) = parts.of("decoder.final_layernorm.weight")
    yield "model.norm.weight", norm
    if parts.wants_head(cfg.tied_embeddings) != parts.has_head():
        raise ValueError("output_layer.weight is missing where Megatron wants one, or there where it wants none")
    if parts.has_head():
        head = "model.embed_tokens.weight" if cfg.tied_embeddings else "lm_head.weight"
        yield head, torch.cat(parts.of("output_layer.weight"))[: cfg.vocab_size]


def _attention(parts: Parts, cfg: ModelConfig, layer: int, hf: str) -> Found:
    yield f"{hf}o_proj.weight", torch.cat(parts.of("self_attention.linear_proj.weight", layer), 1)
    if cfg.mla is not None:
        ups = {"linear_kv_up_proj": "kv_b_proj"}
        ups |= {"linear_q_up_proj": "q_b_proj"} if cfg.mla.q_rank else {"linear_q_proj": "q_proj"}
        for theirs, name in ups.items():
            yield f"{hf}{name}.weight", torch.cat(parts.of(f"self_attention.{theirs}.weight", layer))
        return
    groups, heads, size = cfg.num_kv_heads, cfg.num_heads // cfg.num_kv_heads, cfg.head_dim
    for kind in ("weight", "bias") if cfg.qkv_bias else ("weight",):
        fused = torch.cat(parts.of(f"self_attention.linear_qkv.{kind}", layer))
        by_group = fused.view(groups, heads + 2, size, -1)  # [G, R + 2, d, D]; of a bias [..., 1]
        for name, held in (("q", by_group[:, :heads]), ("k", by_group[:, heads]), ("v", by_group[:, heads + 1])):
            yield f"{hf}{name}_proj.{kind}", held.reshape(-1, *fused.shape[1:])


def _feed_forward(parts: Parts, cfg: ModelConfig, layer: int, hf: str) -> Found:
    names = ("gate_proj", "up_proj", "down_proj")
    if cfg.moe is None or layer < cfg.moe.first_dense:
        up, down = (parts.of(f"mlp.linear_fc{i}.weight", layer) for i in (1, 2))
        yield from _gated(up, down, f"{hf}mlp.", names)
        return
    mixtral = cfg.family == "mixtral"
    block = f"{hf}block_sparse_moe." if mixtral else f"{hf}mlp."
    (router, *_) = parts.of("mlp.router.weight", layer)
    yield f"{block}gate.weight", router
    for expert in sorted({0, cfg.moe.num_experts - 1}):
        up, down = (parts.expert(f"linear_fc{i}", layer, expert) for i in (1, 2))
        yield from _gated(up, down, f"{block}experts.{expert}.", ("w1", "w3", "w2") if mixtral else names)
    if cfg.moe.shared_size:
        up, down = (parts.of(f"mlp.shared_experts.linear_fc{i}.weight", layer) for i in (1, 2))
        shared = "shared_expert" if cfg.family == "qwen2_moe" else "shared_experts"
        yield from _gated(up, down, f"{block}{shared}.", names)


def _gated(up: list[torch.Tensor], down: list[torch.Tensor], hf: str, names: tuple[str, str, str]) -> Found:
    """Every rank's first half is gate rows, its second up rows; down is cut by columns."""
    halves = [part.chunk(2) for part in up]
    yield f"{hf}{names[0]}.weight", torch.cat([gate for gate, _ in halves])
    yield f"{hf}{names[1]}.weight", torch.cat([above for _, above in halves])
    yield f"{hf}{names[2]}.weight", torch.cat(down, 1)
