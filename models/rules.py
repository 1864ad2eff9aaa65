"""Where a weight lies in a Hugging Face checkpoint. Each rule is said once and knows both directions."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from models.config import ModelConfig


@dataclass(frozen=True)
class Segment:
    """Rows [start, stop) of one Hugging Face tensor. A row is everything behind the last-but-one dim; of a vector, one
    element. A tensor of ours, or of Megatron, is its segments one after another."""

    hf: str
    start: int
    stop: int


@dataclass(frozen=True)
class Rename:
    """One of our tensors is one of theirs under another name."""

    ours: str
    hf: str

    @property
    def sources(self) -> tuple[str, ...]:
        """The Hugging Face tensors this rule reads, in order."""
        return (self.hf,)

    def hf_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """The shape of each Hugging Face tensor, from that of our whole tensor."""
        return {self.hf: shape}

    def segments(self, shape: tuple[int, ...]) -> tuple[Segment, ...]:
        """Our whole tensor of shape `shape` as rows of theirs, all dims but the last counted as rows."""
        return (Segment(self.hf, 0, math.prod(shape[:-1] if len(shape) > 1 else shape)),)

    def to_ours(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Our whole tensor from theirs."""
        return tensors[self.hf]

    def to_hf(self, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """Their tensors from our whole one."""
        return {self.hf: tensor}


@dataclass(frozen=True)
class Scalar(Rename):
    """One of our vectors of one number is a tensor of theirs without dims."""

    def hf_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """The shape of the Hugging Face tensor."""
        return {self.hf: ()}

    def to_ours(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Our vector from their number."""
        return tensors[self.hf].reshape(1)

    def to_hf(self, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """Their number from our vector."""
        return {self.hf: tensor.reshape(())}


@dataclass(frozen=True)
class Concat:
    """One of our fused tensors is several of theirs, one after another along dim 0 (q|k|v, gate|up)."""

    ours: str
    hf: tuple[str, ...]
    sizes: tuple[int, ...]

    @property
    def sources(self) -> tuple[str, ...]:
        """The Hugging Face tensors this rule reads, in order."""
        return self.hf

    def hf_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """The shape of each Hugging Face tensor, from that of our whole tensor."""
        return {name: (size, *shape[1:]) for name, size in zip(self.hf, self.sizes, strict=True)}

    def segments(self, shape: tuple[int, ...]) -> tuple[Segment, ...]:
        """Our whole tensor of shape `shape` as rows of theirs, all dims but the last counted as rows."""
        return tuple(Segment(name, 0, size) for name, size in zip(self.hf, self.sizes, strict=True))

    def to_ours(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Our whole tensor from theirs."""
        return torch.cat([tensors[name] for name in self.hf])

    def to_hf(self, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """Their tensors from our whole one (views)."""
        return dict(zip(self.hf, tensor.split(self.sizes), strict=True))


@dataclass(frozen=True)
class Stack:
    """One of our tensors holds the same tensor of every expert, [E, ...]; `hf` names those of each expert.

    Where an expert has several (gate, up), they lie one after another along its first dim, `sizes` rows each.
    """

    ours: str
    hf: tuple[tuple[str, ...], ...]
    sizes: tuple[int, ...]

    @property
    def sources(self) -> tuple[str, ...]:
        """The Hugging Face tensors this rule reads, in order."""
        return tuple(name for names in self.hf for name in names)

    def hf_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """The shape of each Hugging Face tensor, from that of our whole tensor."""
        return {name: (size, *shape[2:]) for names in self.hf for name, size in zip(names, self.sizes, strict=True)}

    def segments(self, shape: tuple[int, ...]) -> tuple[Segment, ...]:
        """Our whole tensor of shape `shape` as rows of theirs, all dims but the last counted as rows."""
        return tuple(Segment(name, 0, size) for names in self.hf for name, size in zip(names, self.sizes, strict=True))

    def to_ours(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Our whole tensor from theirs."""
        first = tensors[self.hf[0][0]]
        whole = first.new_empty(len(self.hf), sum(self.sizes), *first.shape[1:])
        for into, names in zip(whole, self.hf, strict=True):
            for part, name in zip(into.split(self.sizes), names, strict=True):
                part.copy_(tensors[name])
        return whole

    def to_hf(self, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """Their tensors from our whole one (views)."""
        return {
            name: part
            for expert, names in zip(tensor, self.hf, strict=True)
            for name, part in zip(names, expert.split(self.sizes), strict=True)
        }


Rule = Rename | Concat | Stack


@dataclass(frozen=True)
class Tie:
    """`hf` repeats `ours` where a checkpoint holds it at all: not read, not written."""

    ours: str
    hf: str


@dataclass(frozen=True)
class Unused:
    """Tensors of a checkpoint whose names start with `prefix` have no place in the model: not read, not written."""

    prefix: str
    why: str


@dataclass(frozen=True)
class ExpertNames:
    """What a layer of experts and its parts are called; by default as in Qwen3-MoE and DeepSeek."""

    block: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    shared: str = "shared_experts"


def llama_rules(cfg: ModelConfig, experts: ExpertNames = ExpertNames()) -> Iterator[Rule | Tie]:
    """The names of Llama, which all families share; biases, q/k norms and experts where the config has them."""
    yield Rename("embed.weight", "model.embed_tokens.weight")
    for i in range(cfg.num_layers):
        ours, hf = f"layers.{i}.", f"model.layers.{i}."
        yield from _layer_rules(cfg, ours, hf)
        if cfg.is_moe(i):
            yield from _expert_rules(cfg, experts, f"{ours}mlp.", f"{hf}{experts.block}.")
        else:
            yield from _dense_rules(f"{ours}mlp.", f"{hf}mlp.", cfg.intermediate_size, cfg.mlp_bias)
    yield Rename("norm.weight", "model.norm.weight")
    if cfg.head == "scalar":
        yield Rename("head.weight", "score.weight")
    elif cfg.tied_embeddings:
        yield Tie("embed.weight", "lm_head.weight")
    else:
        yield Rename("head.weight", "lm_head.weight")


def _layer_rules(cfg: ModelConfig, ours: str, hf: str) -> Iterator[Rule]:
    yield Rename(f"{ours}attn_norm.weight", f"{hf}input_layernorm.weight")
    yield from (_latent_rules if cfg.mla else _attention_rules)(cfg, f"{ours}attn.", f"{hf}self_attn.")
    yield Rename(f"{ours}mlp_norm.weight", f"{hf}post_attention_layernorm.weight")


def _dense_rules(ours: str, hf: str, ffn: int, bias: bool) -> Iterator[Rule]:
    for kind in ("weight", "bias") if bias else ("weight",):
        yield Concat(f"{ours}gate_up.{kind}", (f"{hf}gate_proj.{kind}", f"{hf}up_proj.{kind}"), (ffn, ffn))
        yield Rename(f"{ours}down.{kind}", f"{hf}down_proj.{kind}")


def _expert_rules(cfg: ModelConfig, names: ExpertNames, ours: str, hf: str) -> Iterator[Rule]:
    moe = cfg.moe
    assert moe is not None
    each = [f"{hf}experts.{i}." for i in range(moe.num_experts)]
    yield Rename(f"{ours}router.weight", f"{hf}gate.weight")
    if moe.correction_bias:
        yield Rename(f"{ours}router.bias", f"{hf}gate.e_score_correction_bias")
    gate_up = tuple((f"{expert}{names.gate}.weight", f"{expert}{names.up}.weight") for expert in each)
    yield Stack(f"{ours}experts.gate_up", gate_up, (moe.expert_size, moe.expert_size))
    yield Stack(f"{ours}experts.down", tuple((f"{expert}{names.down}.weight",) for expert in each), (cfg.hidden_size,))
    if moe.shared_size:
        yield from _dense_rules(f"{ours}shared.", f"{hf}{names.shared}.", moe.shared_size, False)
    if moe.shared_gate:
        yield Rename(f"{ours}shared.gate", f"{hf}{names.shared}_gate.weight")


def _attention_rules(cfg: ModelConfig, ours: str, hf: str) -> Iterator[Rule]:
    qkv = tuple(f"{hf}{x}_proj" for x in "qkv")
    for kind in ("weight", "bias") if cfg.qkv_bias else ("weight",):
        yield Concat(f"{ours}qkv.{kind}", tuple(f"{name}.{kind}" for name in qkv), cfg.qkv_parts)
    for kind in ("weight", "bias") if cfg.attention_out_bias else ("weight",):
        yield Rename(f"{ours}out.{kind}", f"{hf}o_proj.{kind}")
    if cfg.qk_norm:
        yield Rename(f"{ours}q_norm.weight", f"{hf}q_norm.weight")
        yield Rename(f"{ours}k_norm.weight", f"{hf}k_norm.weight")


def _latent_rules(cfg: ModelConfig, ours: str, hf: str) -> Iterator[Rule]:
    """Multi-head latent attention as DeepSeek names it. Biases only where hidden states go in and come out."""
    assert cfg.mla is not None
    names = {"kv_down": "kv_a_proj_with_mqa", "kv_norm": "kv_a_layernorm", "kv_up": "kv_b_proj", "out": "o_proj"}
    if cfg.mla.q_rank is None:
        names |= {"q_up": "q_proj"}
    else:
        names |= {"q_down": "q_a_proj", "q_norm": "q_a_layernorm", "q_up": "q_b_proj"}
    biased = {"q_down": cfg.qkv_bias, "kv_down": cfg.qkv_bias, "out": cfg.attention_out_bias}
    for name, theirs in names.items():
        for kind in ("weight", "bias") if biased.get(name, False) else ("weight",):
            yield Rename(f"{ours}{name}.{kind}", f"{hf}{theirs}.{kind}")
