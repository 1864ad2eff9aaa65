"""Weights of a Hugging Face folder under Loom's names, one parameter at a time."""

import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from convert.hf_files import StoredTensor, read_folder
from models import FAMILIES, build
from models.config import ModelConfig
from models.init import InitSource
from models.rules import Rule, Tie, Unused
from parallel.sharding import shard_of

SHOWN = 5


def whole_shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The uncut shape of every parameter and persistent buffer, from the meta device."""
    model = build(cfg)
    shapes = {name: shard_of(p).whole_shape(p.shape) for name, p in model.named_parameters()}
    return shapes | {name: tuple(buffer.shape) for name, buffer in model.named_buffers()}


def weight_rules(cfg: ModelConfig) -> tuple[dict[str, Rule], set[str]]:
    """The rule of each of our parameters, and the Hugging Face names that only repeat one (ties)."""
    rules: dict[str, Rule] = {}
    repeated: set[str] = set()
    for rule in FAMILIES[cfg.family].rules(cfg):
        if isinstance(rule, Tie):
            repeated.add(rule.hf)
        elif not isinstance(rule, Unused):
            rules[rule.ours] = rule
    return rules, repeated


class HFSource:
    """Whole weights by Loom's names from a Hugging Face folder. Reads headers at once, values when asked.

    A scalar head whose weights the folder lacks (a language model becoming a reward model) is drawn from `seed`.
    """

    def __init__(self, folder: str | Path, cfg: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        self.folder, self.cfg, self.dtype = Path(folder), cfg, dtype
        self._stored = read_folder(folder)
        self._rules, self._repeated = weight_rules(cfg)
        self._fresh: InitSource | None = None
        if cfg.head == "scalar" and "score.weight" not in self._stored:
            self._fresh = InitSource(cfg, seed)

    def check(self) -> None:
        """Compare every name and shape with the model, from the headers alone.

        Raises:
            ValueError: tensors are missing, have another shape, or belong to another model; names the first five.
        """
        found = self._shape_problems()
        expected = {name for rule in self._rules.values() for name in rule.sources}
        allowed = expected | self._repeated | ({"lm_head.weight", "score.weight"} - expected)
        unused = [name for name in self._stored if name not in allowed and not _is_buffer(name)]
        unused = self._leave_out(unused)
        if unused:
            found.append(f"{len(unused)} tensors have no place in the model:{_first(unused)}")
        if found:
            raise ValueError(
                f"the weights in {self.folder} do not fit the model (family {self.cfg.family}, "
                f"{self.cfg.num_layers} layers, hidden size {self.cfg.hidden_size}):\n"
                + "\n".join(found)
                + "\nUse model=hf to take the sizes from the folder's own config.json; if they do already, "
                "its config.json and weights belong to different models: fetch the folder again."
            )
        if self._fresh is not None:
            warnings.warn(f"{self.folder} has no score.weight: the scalar head starts from fresh weights", stacklevel=2)

    def _leave_out(self, names: list[str]) -> list[str]:
        """`names` without those the family knows to have no place in the model, which are told in a warning."""
        for rule in FAMILIES[self.cfg.family].rules(self.cfg):
            known = [name for name in names if name.startswith(rule.prefix)] if isinstance(rule, Unused) else []
            if isinstance(rule, Unused) and known:
                told = f"{self.folder}: {len(known)} tensors {rule.prefix}* are left out ({rule.why})"
                warnings.warn(told, stacklevel=3)
                names = [name for name in names if name not in set(known)]
        return names

    def _shape_problems(self) -> list[str]:
        missing: list[str] = []
        unequal: list[str] = []
        shapes = whole_shapes(self.cfg)
        for name, rule in self._rules.items():
            if self._fresh is not None and name == "head.weight":
                continue
            for hf_name, shape in rule.hf_shapes(shapes[name]).items():
                stored = self._stored.get(hf_name)
                if stored is None:
                    missing.append(hf_name)
                elif stored.shape != shape:
                    unequal.append(f"{hf_name}: {list(stored.shape)} in the file, {list(shape)} by the config")
        found = [f"{len(missing)} tensors are missing:{_first(missing)}"] if missing else []
        return found + ([f"{len(unequal)} tensors have another shape:{_first(unequal)}"] if unequal else [])

    def tensor(self, name: str) -> torch.Tensor:
        """The whole tensor of our parameter `name`, on the CPU."""
        if self._fresh is not None and name == "head.weight":
            return self._fresh.tensor(name).to(self.dtype)
        rule = self._rules[name]
        return rule.to_ours({source: self._stored[source].read() for source in rule.sources}).to(self.dtype)

    def stored(self, name: str) -> tuple[StoredTensor, ...]:
        """Where the Hugging Face tensors behind our parameter `name` lie."""
        return tuple(self._stored[source] for source in self._rules[name].sources)


def _first(lines: Iterable[str]) -> str:
    listed = list(lines)
    more = [f"... and {len(listed) - SHOWN} more"] if len(listed) > SHOWN else []
    return "".join(f"\n  {line}" for line in listed[:SHOWN] + more)


def _is_buffer(name: str) -> bool:
    # Old Llama checkpoints store the rotary frequencies, which follow from the config.
    return name.endswith("rotary_emb.inv_freq")


def iter_from_hf(
    folder: str | Path, cfg: ModelConfig, names: Iterable[str] | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Our parameters (all, or `names`) with their whole fp32 tensors, one at a time, checked beforehand.

    Raises:
        ValueError: see `HFSource.check`.
    """
    source = HFSource(folder, cfg)
    source.check()
    for name in whole_shapes(cfg) if names is None else names:
        yield name, source.tensor(name)
