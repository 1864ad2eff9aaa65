"""Megatron's tensors in a `torch_dist` checkpoint: each whole, under one name for all ranks, equal layers stacked.

Names and shapes are those of `GPTModel.sharded_state_dict()`: `decoder.layers.self_attention.linear_qkv.weight` is
[layers, rows, hidden] where all layers are alike, `decoder.layers.3.self_attention.linear_qkv.weight` where some have
experts and some have not; experts are stacked in one more dim, [layers, experts, 2 x ffn, hidden].
Source: Megatron-core 0.16.1, `transformer_block.py`, `mlp.py`, `moe/experts.py`, `gpt_layer_specs.py`.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from convert.boxes import Box, placed
from convert.megatron.layout import Layout
from convert.megatron.names import Whole, wholes
from models.config import ModelConfig

LOCAL_NORMS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
"""What Megatron's own layers call their norms in this format, as if Transformer Engine had fused them; in layers of
experts too, where Transformer Engine fuses none. With latent attention they keep their names."""


@dataclass(frozen=True)
class Global:
    """One tensor of a checkpoint: `lead` dims of stacked layers and experts, then the dims of one of them."""

    names: tuple[str, ...]
    """What it is called; the first is written, any is read."""
    lead: tuple[int, ...]
    wholes: tuple[Whole, ...]
    """What is stacked, the last of the `lead` dims running fastest."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return (*self.lead, *self.wholes[0].shape)

    @property
    def is_vocabulary(self) -> bool:
        """Whether its rows are the vocabulary, padded to a number that may differ between two runs."""
        return self.wholes[0].ours in ("embed.weight", "head.weight")

    def chunks(self, tp: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Offsets and sizes of the parts Megatron would save at this tensor-parallel size; an expert stays whole."""
        for index in product(*(range(n) for n in self.lead)):
            whole = self.wholes[self._number(index)]
            shape, shard = whole.shape, whole.shard
            ones = (1,) * len(index)
            if shard.dim is None or tp == 1 or whole.expert is not None:
                yield (*index, *(0 for _ in shape)), (*ones, *shape)
                continue
            for rank in range(tp):
                for start, stop in shard.ranges(tp, rank):
                    offset, size = [0] * len(shape), list(shape)
                    offset[shard.dim], size[shard.dim] = start, stop - start
                    yield (*index, *offset), (*ones, *size)

    def boxes(self, offsets: Sequence[int], sizes: Sequence[int]) -> list[Box]:
        """The Hugging Face rows in a part of the tensor that is a rectangle in every dim."""
        lead, shape = len(self.lead), self.wholes[0].shape
        columns = None
        if len(shape) > 1 and (offsets[-1], sizes[-1]) != (0, shape[-1]):
            columns = (offsets[-1], offsets[-1] + sizes[-1])
        start, rows = (offsets[lead], sizes[lead])
        found: list[Box] = []
        stacked = product(*(range(a, a + n) for a, n in zip(offsets[:lead], sizes[:lead], strict=True)))
        for at, index in enumerate(stacked):
            segments = self.wholes[self._number(index)].segments
            found += placed(segments, [(start, start + rows, at * rows)], columns)
        return found

    def rows_shape(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """The shape of a part seen as rows of Hugging Face tensors: [rows, columns], or [rows] of vectors."""
        return (math.prod(sizes),) if len(self.wholes[0].shape) == 1 else (math.prod(sizes[:-1]), sizes[-1])

    def _number(self, index: Sequence[int]) -> int:
        number = 0
        for i, n in zip(index, self.lead, strict=True):
            number = number * n + i
        return number


def stacks_layers(args: Mapping[str, Any]) -> bool:
    """Whether a model with these arguments stacks its layers: the rule of Megatron's `TransformerBlock`."""
    frequency = args.get("moe_layer_freq", 1)
    return isinstance(frequency, int) and frequency <= 1


def globals_of(cfg: ModelConfig, layout: Layout, stacked: bool) -> list[Global]:
    """Every tensor of a model's checkpoint, in the model's order."""
    other = "local" if layout.implementation == "transformer_engine" else "transformer_engine"
    layouts = [replace(layout, implementation=which, experts="sequential") for which in (layout.implementation, other)]
    found: dict[tuple[str, ...], list[Whole]] = {}
    for each in zip(*(wholes(cfg, which) for which in layouts), strict=True):
        if not each[0].copy:  # a tied head is the embedding here at any number of stages
            names = (_name(cfg, which, whole, stacked) for which, whole in zip(layouts, each, strict=True))
            found.setdefault(tuple(dict.fromkeys(names)), []).append(each[0])
    return [Global(names, _lead(cfg, parts, stacked), tuple(parts)) for names, parts in found.items()]


def _name(cfg: ModelConfig, layout: Layout, whole: Whole, stacked: bool) -> str:
    name = whole.name.replace("{layer}.", "" if stacked else f"{whole.layer}.")
    name = name.replace("local_experts.{expert}.", "experts.")
    if layout.implementation == "local" and cfg.mla is None:
        for own, fused in LOCAL_NORMS.items():
            name = name.replace(f".{own}", f".{fused}")
    return name


def _lead(cfg: ModelConfig, parts: Sequence[Whole], stacked: bool) -> tuple[int, ...]:
    layers = (cfg.num_layers,) if stacked and parts[0].layer is not None else ()
    experts = (cfg.moe.num_experts,) if cfg.moe and parts[0].expert is not None else ()
    assert math.prod((*layers, *experts)) == len(parts), f"{parts[0].name}: {len(parts)} of {layers} x {experts}"
    return (*layers, *experts)


def empty_objects(tensors: Sequence[Global], layout: Layout) -> Iterator[str]:
    """The keys of the states beside the weights that Megatron asks for: each linear layer's, and of Transformer Engine
    each norm's and each attention's too. Without fp8 they are empty, but a checkpoint must have them."""
    engine = layout.implementation == "transformer_engine"
    modules: dict[str, tuple[int, ...]] = {}
    for tensor in tensors:
        module, _, own = tensor.names[0].rpartition(".")
        if own == "weight" and (".linear_" in module or (engine and module.endswith("layernorm"))):
            modules[module] = tensor.lead
            attention, found, _ = module.partition(".linear_proj")
            if engine and found:
                modules[f"{attention}.core_attention"] = tensor.lead
    for module, lead in modules.items():
        shape = lead or (1,)
        for index in product(*(range(n) for n in shape)):
            yield f"{module}._extra_state/shard_{'.'.join(map(str, index))}_{'.'.join(map(str, shape))}"
