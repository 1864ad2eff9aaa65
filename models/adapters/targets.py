"""The linear layers of a decoder under the names that users and `peft` know.

A fused weight of ours (q|k|v, gate|up) is several layers of theirs; which, the family's weight rules say.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from torch import nn

from models.adapters.config import ALL_LINEAR
from models.blocks.mla import DownLinear
from models.blocks.moe import Experts, SharedExpert
from models.config import ModelConfig
from models.decoder import Decoder, build
from models.families import family_of
from models.rules import Concat, Rename
from parallel.layers import ColumnLinear, RowLinear
from parallel.sharding import Shard, is_kept, shard_of

Linear = ColumnLinear | RowLinear | DownLinear


@dataclass(frozen=True)
class Part:
    """One linear layer as users know it: a run of rows of a weight of ours."""

    module: str
    """Its name in the Hugging Face model, as model.layers.0.self_attn.q_proj; of stacked experts that of their
    parameter, as model.layers.0.mlp.experts.gate_up_proj."""
    outputs: int
    units: tuple[int, ...] = ()
    """Heads that each of its runs is made of; none where they are not."""
    fused: tuple[int, ...] = ()
    """Outputs of the layers that the Hugging Face model has fused in it, as q|k|v of some vision towers."""

    @property
    def runs(self) -> tuple[int, ...]:
        """The outputs that are cut over tp for themselves."""
        return self.fused or (self.outputs,)

    @property
    def name(self) -> str:
        """What users call it: q_proj, or of stacked experts experts.gate_up_proj."""
        above, _, last = self.module.rpartition(".")
        return f"experts.{last}" if above.endswith(".experts") else last

    def chosen_by(self, targets: Sequence[str]) -> bool:
        """Whether `targets` name it. Experts are only chosen by their own name."""
        return self.name in targets or (ALL_LINEAR in targets and not self.name.startswith("experts."))


@dataclass(frozen=True)
class Layer:
    """A linear layer of ours with its parts, whole sizes."""

    path: str
    """Its name in the decoder, as layers.0.attn.qkv."""
    inputs: int
    row: bool
    """Cut along its inputs."""
    parts: tuple[Part, ...]
    chosen: tuple[int, ...]
    """Which parts have an adapter."""
    experts: int = 0
    """How many there are of it, stacked; 0 = it is no layer of experts. Then `path` is that of the weight itself."""

    @property
    def adapted(self) -> tuple[Part, ...]:
        """The parts that have one."""
        return tuple(self.parts[i] for i in self.chosen)

    @property
    def weight(self) -> str:
        """The name of its weight."""
        return self.path if self.experts else f"{self.path}.weight"

    @property
    def adapter(self) -> str:
        """What the names of its adapter's parameters begin with."""
        above, _, last = self.path.rpartition(".")
        return f"{above}.adapter.{last}" if self.experts else f"{self.path}.adapter.low_rank"

    @property
    def runs(self) -> tuple[int, ...]:
        """The runs of all parts that have one."""
        return tuple(run for part in self.adapted for run in part.runs)

    @property
    def units(self) -> tuple[int, ...]:
        """The heads of `runs`."""
        return tuple(unit for part in self.adapted for unit in part.units)

    def outputs_here(self, shard: Shard, ranks: int) -> list[int]:
        """How many outputs of each part one of `ranks` tp ranks has; `shard` is that of the weight."""
        if shard.dim != 0:
            return [part.outputs for part in self.parts]
        local = iter(shard.local_parts(ranks))
        return [sum(islice(local, len(part.runs))) for part in self.parts]

    def rows(self, part: int) -> tuple[int, int]:
        """Rows [start, stop) of a part in the whole weight."""
        start = sum(each.outputs for each in self.parts[:part])
        return start, start + self.parts[part].outputs


def linears(model: Decoder) -> Iterator[tuple[str, Linear]]:
    """The linear layers of a decoder (or a chunk of one) by path. Experts, shared ones too, and routers are none."""
    inside = [f"{path}." for path, module in model.named_modules() if isinstance(module, SharedExpert)]
    for path, module in model.named_modules():
        if isinstance(module, (ColumnLinear, RowLinear, DownLinear)) and not path.startswith(tuple(inside)):
            yield path, module


def layers_of(model: Decoder, targets: Sequence[str]) -> list[Layer]:
    """Every linear layer of a decoder (or a chunk of one) and its stacked experts, with the parts that `targets`
    choose; perhaps none. What is kept for a checkpoint's sake and never runs has none."""
    rules = {rule.ours: rule for rule in family_of(model.cfg).rules(model.cfg) if isinstance(rule, Rename | Concat)}
    found = []
    for path, module in linears(model):
        shard, rule = shard_of(module.weight), rules[f"{path}.weight"]
        outputs, inputs = shard.whole_shape(module.weight.shape)
        sizes = rule.sizes if isinstance(rule, Concat) else (outputs,)
        fused = shard.parts if shard.dim == 0 and len(shard.parts) > len(sizes) == 1 else ()
        units = [shard.units] if len(sizes) == 1 else [shard.units[i : i + 1] for i in range(len(sizes))]
        parts = tuple(
            Part(hf.removesuffix(".weight"), size, unit, fused)
            for hf, size, unit in zip(rule.sources, sizes, units, strict=True)
        )
        runs = not is_kept(module.weight)
        chosen = tuple(i for i, part in enumerate(parts) if runs and part.chosen_by(targets))
        found.append(Layer(path, inputs, isinstance(module, RowLinear), parts, chosen))
    return found + [layer for path, module in stacks(model) for layer in expert_layers(path, module, targets)]


def stacks(model: Decoder) -> Iterator[tuple[str, Experts]]:
    """The stacked experts of a decoder (or a chunk of one) by path."""
    return ((path, module) for path, module in model.named_modules() if isinstance(module, Experts))


def expert_layers(path: str, experts: Experts, targets: Sequence[str]) -> list[Layer]:
    """The two layers of stacked experts, gate_up and down. Gate and up have one adapter, as `peft` has it for what
    transformers keeps as one parameter."""
    found = []
    for kind in ("gate_up", "down"):
        weight = getattr(experts, kind)
        _, outputs, inputs = shard_of(weight).whole_shape(weight.shape)
        part = Part(f"model.{path}.{kind}_proj", outputs)
        chosen = (0,) if part.chosen_by(targets) else ()
        found.append(Layer(f"{path}.{kind}", inputs, kind == "down", (part,), chosen, experts.number))
    return found


def sample(cfg: ModelConfig) -> list[Layer]:
    """The linear layers of one layer of each kind that a model has, stacked experts with them."""
    dense = cfg.moe.first_dense if cfg.moe is not None else cfg.num_layers
    few = replace(cfg, num_layers=min(cfg.num_layers, dense + 1))
    if cfg.moe is not None and dense > 1:
        few = replace(few, num_layers=2, moe=replace(cfg.moe, first_dense=1))
    elif cfg.moe is None:
        few = replace(few, num_layers=1)
    return layers_of(build(few), (ALL_LINEAR,))


def take_over(module: nn.Module, base: Linear, adapter: nn.Module) -> None:
    """Begin a layer that takes the place of `base`: the same parameters under the same names, and an adapter."""
    nn.Module.__init__(module)
    for name, value in (("weight", base.weight), ("bias", base.bias), ("adapter", adapter)):
        setattr(module, name, value)
