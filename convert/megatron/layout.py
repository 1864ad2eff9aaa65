"""How a Megatron checkpoint is dealt out over folders: ranks, pipeline chunks, layers of each.

Source: Megatron-LM's `megatron/training/checkpointing.py` (folder names) and `transformer_block.py` (a stage's layers).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from models.config import ModelConfig

VOCAB_MULTIPLE = 128
"""Megatron's default of --make-vocab-size-divisible-by."""


@dataclass(frozen=True)
class Rank:
    """One folder of a checkpoint."""

    tp: int
    pp: int
    ep: int


@dataclass(frozen=True)
class Layout:
    """A Megatron layout: how the checkpoint is cut and which of Megatron's names it uses."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    """Chunks of layers on each pipeline rank."""
    ep: int = 1
    layers: tuple[int, ...] = ()
    """Layers of each chunk in the model's order (pp x vpp numbers); empty: as many in each."""
    implementation: Literal["transformer_engine", "local"] = "transformer_engine"
    """Megatron's --transformer-impl, which decides how norms are called."""
    experts: Literal["grouped", "sequential"] = "grouped"
    """How experts are called: as --moe-grouped-gemm with Transformer Engine does, or one module each."""
    vocab_multiple: int = VOCAB_MULTIPLE
    """The vocabulary is padded to a multiple of this times tp."""

    @property
    def chunks(self) -> int:
        """Chunks of layers in all."""
        return self.pp * self.vpp

    def chunk_layers(self, num_layers: int) -> tuple[int, ...]:
        """Layers of each chunk, in the model's order."""
        return self.layers or (num_layers // self.chunks,) * self.chunks

    def chunk_of(self, num_layers: int) -> list[tuple[int, int]]:
        """For each layer of the model its chunk, and its number there."""
        return [(c, n) for c, count in enumerate(self.chunk_layers(num_layers)) for n in range(count)]

    def rank_of(self, chunk: int) -> tuple[int, int]:
        """The pipeline rank of a chunk, and which of that rank's chunks it is."""
        return chunk % self.pp, chunk // self.pp

    def padded_vocab(self, vocab_size: int) -> int:
        """Rows of the embedding, padding included."""
        unit = self.vocab_multiple * self.tp
        return -(-vocab_size // unit) * unit

    def ranks(self) -> Iterator[Rank]:
        """Every folder."""
        for pp in range(self.pp):
            for ep in range(self.ep):
                for tp in range(self.tp):
                    yield Rank(tp, pp, ep)

    def folder(self, rank: Rank) -> str:
        """The folder's name. The pipeline's and the experts' numbers are there only where that size is above 1."""
        name = f"mp_rank_{rank.tp:02d}"
        if self.pp > 1:
            name += f"_{rank.pp:03d}"
        if self.ep > 1:
            name += f"_{rank.ep:03d}"
        return name


def problems(layout: Layout, cfg: ModelConfig) -> list[str]:
    """Why a model cannot be cut this way: one sentence for each reason, with the way out."""
    found = [f"--{key} {getattr(layout, key)}: must be at least 1" for key in ("tp", "pp", "vpp", "ep")
             if getattr(layout, key) < 1]  # fmt: skip
    if layout.vocab_multiple < 1:
        found.append(f"--make-vocab-size-divisible-by {layout.vocab_multiple}: must be at least 1")
    if found:
        return found
    if cfg.head != "lm":
        found.append("the model is a reward model with a scalar head, for which Megatron has no name")
    if cfg.vision is not None:
        found.append(
            "the model sees, and only decoders have a layout of Megatron's here; export_hf.py and reshard.py keep it "
            "whole"
        )
    return found + _tp_problems(layout, cfg) + _ep_problems(layout, cfg) + _pp_problems(layout, cfg)


def _near(value: int, *sizes: int) -> str:
    legal = [n for n in range(1, max(sizes) + 1) if all(size % n == 0 for size in sizes)]
    return ", ".join(str(n) for n in sorted(sorted(legal, key=lambda n: abs(n - value))[:3]))


def _tp_problems(layout: Layout, cfg: ModelConfig) -> list[str]:
    tp = layout.tp
    sizes = {"query heads": cfg.num_heads}
    if cfg.moe is None or cfg.moe.first_dense:
        sizes |= {"feed-forward size": cfg.intermediate_size}
    if cfg.moe:
        sizes |= {"expert size": cfg.moe.expert_size} | (
            {"shared expert size": cfg.moe.shared_size} if cfg.moe.shared_size else {}
        )
    if cfg.mla and layout.implementation == "local":
        sizes |= {"size of the key/value latent": cfg.mla.kv_rank + cfg.mla.rope_dim}
        sizes |= {"size of the query latent": cfg.mla.q_rank} if cfg.mla.q_rank else {}
    legal = [n for n in range(1, cfg.num_heads + 1) if all(size % n == 0 for size in sizes.values())
             and (cfg.mla or _can_share(cfg, n))]  # fmt: skip
    near = ", ".join(str(n) for n in sorted(sorted(legal, key=lambda n: abs(n - tp))[:3]))
    found = [f"--tp {tp}: does not divide the {name} {size}; try --tp {near}" for name, size in sizes.items()
             if size % tp]  # fmt: skip
    if not found and tp not in legal:
        groups, rows = cfg.num_kv_heads, sum(cfg.qkv_parts)
        reason = f"does not divide the {rows} rows of queries, keys and values together"
        if groups % tp and tp % groups:
            reason = f"neither divides the {groups} key/value heads nor is a multiple of them"
        found.append(f"--tp {tp}: {reason}; try --tp {near}")
    return found


def _can_share(cfg: ModelConfig, tp: int) -> bool:
    """Whether Megatron's equal cut of the fused query, key and value rows goes on so many ranks."""
    groups = cfg.num_kv_heads
    return not (cfg.num_heads % tp or (groups % tp and tp % groups) or sum(cfg.qkv_parts) % tp)


def _ep_problems(layout: Layout, cfg: ModelConfig) -> list[str]:
    if layout.ep == 1:
        return []
    if cfg.moe is None:
        return [f"--ep {layout.ep}: the model has no experts; leave --ep out"]
    experts = cfg.moe.num_experts
    if experts % layout.ep:
        return [f"--ep {layout.ep}: does not divide the {experts} experts; try --ep {_near(layout.ep, experts)}"]
    return []


def _pp_problems(layout: Layout, cfg: ModelConfig) -> list[str]:
    if layout.vpp > 1 and layout.pp == 1:
        return [f"--vpp {layout.vpp}: cuts pipeline stages into chunks, and there is one stage; add --pp 2 or more"]
    layers, chunks = cfg.num_layers, layout.chunks
    if layout.layers:
        given = ",".join(str(n) for n in layout.layers)
        if len(layout.layers) != chunks:
            return [f"--pp-layout {given}: names {len(layout.layers)} chunks of layers, --pp x --vpp is {chunks}"]
        if sum(layout.layers) != layers:
            return [f"--pp-layout {given}: adds up to {sum(layout.layers)} layers, the model has {layers}"]
        if min(layout.layers) < 0:
            return [f"--pp-layout {given}: a chunk cannot have fewer than 0 layers"]
        return []
    if layers % chunks:
        even = [layers // chunks + (i < layers % chunks) for i in range(chunks)]
        key = f"--pp {layout.pp}" + (f" --vpp {layout.vpp}" if layout.vpp > 1 else "")
        return [f"{key}: {layers} layers do not divide into {chunks} equal chunks; try --pp {_near(layout.pp, layers)}"
                f", or say how many each gets: --pp-layout {','.join(map(str, even))}"]  # fmt: skip
    return []
