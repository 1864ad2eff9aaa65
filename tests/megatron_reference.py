"""Megatron's layout once more, plainly: whole fused matrices by reshaping, then cut. Knows nothing of `convert`.

H query heads, G key/value heads, R = H/G, d head size, F feed-forward size, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

from models import ModelConfig

Kind = Literal["whole", "rows", "columns", "gate_up"]


@dataclass(frozen=True)
class Cut:
    """What a layout is, in plain numbers."""

    tp: int
    pp: int
    vpp: int
    ep: int
    layers: list[int]
    """Of each chunk, in the model's order."""
    te: bool
    grouped: bool
    vocab_multiple: int


@dataclass
class Layer:
    """The tensors of one layer: (name, kind, tensor), gate and up apart; experts by their number."""

    tensors: list[tuple[str, Kind, tuple[torch.Tensor, ...]]] = field(default_factory=list)
    experts: list[list[tuple[str, Kind, tuple[torch.Tensor, ...]]]] = field(default_factory=list)

    def add(self, name: str, kind: Kind, *tensors: torch.Tensor) -> None:
        self.tensors.append((name, kind, tensors))


def reference(
    hf: Mapping[str, torch.Tensor], cfg: ModelConfig, cut: Cut
) -> dict[tuple[int, int, int], list[dict[str, torch.Tensor]]]:
    """The tensors of each chunk of each (tp, pp, ep) rank."""
    chunks = cut.pp * cut.vpp
    states: dict[tuple[int, int, int], list[dict[str, torch.Tensor]]] = {
        (t, p, e): [{} for _ in range(cut.vpp)] for t in range(cut.tp) for p in range(cut.pp) for e in range(cut.ep)
    }
    first_layer = [sum(cut.layers[:c]) for c in range(chunks)]
    for (t, p, e), own in states.items():
        for k in range(cut.vpp):
            chunk = k * cut.pp + p
            state = own[k]
            if chunk == 0:
                state["embedding.word_embeddings.weight"] = vocab_rows(hf["model.embed_tokens.weight"], cut, t)
            for number in range(cut.layers[chunk]):
                layer = layer_of(hf, cfg, first_layer[chunk] + number, cut)
                for name, kind, tensors in layer.tensors:
                    state[f"decoder.layers.{number}.{name}"] = part(kind, tensors, cut.tp, t)
                each = len(layer.experts) // cut.ep
                for i, expert in enumerate(layer.experts[e * each : (e + 1) * each]):
                    for linear, kind, tensors in expert:
                        name = (
                            f"linear_{linear}.weight{i}" if cut.grouped else f"local_experts.{i}.linear_{linear}.weight"
                        )
                        state[f"decoder.layers.{number}.mlp.experts.{name}"] = part(kind, tensors, cut.tp, t)
            if chunk == chunks - 1:
                state["decoder.final_layernorm.weight"] = hf["model.norm.weight"]
                if not cfg.tied_embeddings:
                    state["output_layer.weight"] = vocab_rows(hf["lm_head.weight"], cut, t)
                elif chunks > 1:
                    state["output_layer.weight"] = vocab_rows(hf["model.embed_tokens.weight"], cut, t)
    return states


def part(kind: Kind, tensors: tuple[torch.Tensor, ...], tp: int, t: int) -> torch.Tensor:
    """What tensor-parallel rank t holds."""
    if kind == "gate_up":
        return torch.cat([part("rows", (tensor,), tp, t) for tensor in tensors])
    (tensor,) = tensors
    if kind == "whole":
        return tensor
    if kind == "rows":
        assert tensor.shape[0] % tp == 0
        return tensor.chunk(tp)[t]
    assert tensor.shape[1] % tp == 0
    return tensor.chunk(tp, dim=1)[t]


def vocab_rows(tensor: torch.Tensor, cut: Cut, t: int) -> torch.Tensor:
    """Padded with zero rows at the end, then cut."""
    unit = cut.vocab_multiple * cut.tp
    padded = torch.zeros((len(tensor) + unit - 1) // unit * unit, tensor.shape[1], dtype=tensor.dtype)
    padded[: len(tensor)] = tensor
    return padded.chunk(cut.tp)[t]


def layer_of(hf: Mapping[str, torch.Tensor], cfg: ModelConfig, number: int, cut: Cut) -> Layer:
    """One layer's tensors in Megatron's names and orders, before they are cut."""
    prefix = f"model.layers.{number}."
    theirs = {name.removeprefix(prefix): tensor for name, tensor in hf.items() if name.startswith(prefix)}
    layer = Layer()
    moe = any("experts.0." in name for name in theirs)
    if cfg.mla is None and not moe and ("self_attn.o_proj.bias" in theirs or "mlp.up_proj.bias" in theirs):
        # Megatron has biases in all linear layers or in none but q, k and v.
        for name, tensor in list(theirs.items()):
            if name.endswith("_proj.weight"):
                theirs.setdefault(name.removesuffix("weight") + "bias", tensor.new_zeros(len(tensor)))
    if cfg.mla is None:
        layer.add("self_attention.linear_qkv.layer_norm_weight" if cut.te else "input_layernorm.weight", "whole",
                  theirs["input_layernorm.weight"])  # fmt: skip
        grouped_attention(layer, theirs, cfg)
    else:
        layer.add("input_layernorm.weight", "whole", theirs["input_layernorm.weight"])
        latent_attention(layer, theirs, cut)
    layer.add("self_attention.linear_proj.weight", "columns", theirs["self_attn.o_proj.weight"])
    if "self_attn.o_proj.bias" in theirs:
        layer.add("self_attention.linear_proj.bias", "whole", theirs["self_attn.o_proj.bias"])
    norm = "mlp.linear_fc1.layer_norm_weight" if cut.te and not moe else "pre_mlp_layernorm.weight"
    layer.add(norm, "whole", theirs["post_attention_layernorm.weight"])
    if moe:
        experts(layer, theirs, cfg)
        return layer
    for kind in ("weight", "bias"):
        if f"mlp.up_proj.{kind}" in theirs:
            layer.add(f"mlp.linear_fc1.{kind}", "gate_up", *(theirs[f"mlp.{x}_proj.{kind}"] for x in ("gate", "up")))
            layer.add(
                f"mlp.linear_fc2.{kind}", "columns" if kind == "weight" else "whole", theirs[f"mlp.down_proj.{kind}"]
            )
    return layer


def grouped_attention(layer: Layer, theirs: Mapping[str, torch.Tensor], cfg: ModelConfig) -> None:
    """q, k and v as one [G, R + 2, d, D], so that each group lies together."""
    groups, size = cfg.num_kv_heads, cfg.head_dim
    for kind in ("weight", "bias"):
        if f"self_attn.q_proj.{kind}" in theirs:
            q, k, v = (theirs[f"self_attn.{x}_proj.{kind}"] for x in "qkv")
            tail = q.shape[1:]
            whole = torch.cat([x.reshape(groups, -1, size, *tail) for x in (q, k, v)], dim=1)
            assert whole.shape[1] == cfg.num_heads // groups + 2
            layer.add(f"self_attention.linear_qkv.{kind}", "rows", whole.reshape(-1, *tail))
    for x in "qk":
        if f"self_attn.{x}_norm.weight" in theirs:
            layer.add(f"self_attention.{x}_layernorm.weight", "whole", theirs[f"self_attn.{x}_norm.weight"])


def latent_attention(layer: Layer, theirs: Mapping[str, torch.Tensor], cut: Cut) -> None:
    """Transformer Engine holds the down projections whole on every rank, and fuses the latents' norms."""
    down: Kind = "whole" if cut.te else "rows"
    for x, hf in (("q", "q_a"), ("kv", "kv_a")):
        if f"self_attn.{hf}_layernorm.weight" in theirs:
            name = f"linear_{x}_up_proj.layer_norm_weight" if cut.te else f"{x}_layernorm.weight"
            layer.add(f"self_attention.{name}", "whole", theirs[f"self_attn.{hf}_layernorm.weight"])
    if "self_attn.q_proj.weight" in theirs:
        layer.add("self_attention.linear_q_proj.weight", "rows", theirs["self_attn.q_proj.weight"])
    else:
        layer.add("self_attention.linear_q_down_proj.weight", down, theirs["self_attn.q_a_proj.weight"])
        layer.add("self_attention.linear_q_up_proj.weight", "rows", theirs["self_attn.q_b_proj.weight"])
    layer.add("self_attention.linear_kv_down_proj.weight", down, theirs["self_attn.kv_a_proj_with_mqa.weight"])
    layer.add("self_attention.linear_kv_up_proj.weight", "rows", theirs["self_attn.kv_b_proj.weight"])


def experts(layer: Layer, theirs: Mapping[str, torch.Tensor], cfg: ModelConfig) -> None:
    """The router, the shared expert and each expert."""
    mixtral = cfg.family == "mixtral"
    block = "block_sparse_moe" if mixtral else "mlp"
    gate, up, down = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    layer.add("mlp.router.weight", "whole", theirs[f"{block}.gate.weight"])
    if f"{block}.gate.e_score_correction_bias" in theirs:
        layer.add("mlp.router.expert_bias", "whole", theirs[f"{block}.gate.e_score_correction_bias"])
    number = 0
    while f"{block}.experts.{number}.{gate}.weight" in theirs:
        one = f"{block}.experts.{number}."
        both = tuple(theirs[f"{one}{x}.weight"] for x in (gate, up))
        layer.experts.append([("fc1", "gate_up", both), ("fc2", "columns", (theirs[f"{one}{down}.weight"],))])
        number += 1
    for shared in ("mlp.shared_expert", "mlp.shared_experts"):
        if f"{shared}.up_proj.weight" in theirs:
            layer.add("mlp.shared_experts.linear_fc1.weight", "gate_up",
                      theirs[f"{shared}.gate_proj.weight"], theirs[f"{shared}.up_proj.weight"])  # fmt: skip
            layer.add("mlp.shared_experts.linear_fc2.weight", "columns", theirs[f"{shared}.down_proj.weight"])
    if "mlp.shared_expert_gate.weight" in theirs:
        layer.add("mlp.shared_experts.gate_weight", "whole", theirs["mlp.shared_expert_gate.weight"])
