"""A Hugging Face folder, opened: its weights by rows, checked against its own config.json from the headers alone."""

import dataclasses
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from convert.boxes import Columns, Meta
from convert.hf_files import StoredTensor, read_folder
from convert.opened import Opened
from models import build, config_from_hf_folder, family_of
from models.config import ModelConfig
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
    for rule in family_of(cfg).rules(cfg):
        if isinstance(rule, Tie):
            repeated.add(rule.hf)
        elif not isinstance(rule, Unused):
            rules[rule.ours] = rule
    return rules, repeated


def hf_shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every Hugging Face tensor of a model, in the model's order; ties are not repeated."""
    shapes, rules = whole_shapes(cfg), weight_rules(cfg)[0]
    return {hf: shape for ours, rule in rules.items() for hf, shape in rule.hf_shapes(shapes[ours]).items()}


class Folder:
    """The tensors of a Hugging Face folder that a model has a place for. Is `Tensors`."""

    def __init__(self, stored: Mapping[str, StoredTensor]) -> None:
        self._stored = stored
        self.metas = {hf: Meta(tensor.dtype, tensor.shape) for hf, tensor in stored.items()}

    def rows(self, hf: str, start: int, stop: int, columns: Columns | None = None) -> torch.Tensor:
        """Rows [start, stop) of one tensor in its own dtype and memory, all columns or some.

        Raises:
            ValueError: the file ended early.
        """
        stored = self._stored[hf]
        if columns is None or columns == (0, *stored.row_shape):
            return stored.rows(start, stop)
        return stored.strip(start, stop, columns)


def open_hf(folder: str | Path) -> Opened:
    """A Hugging Face folder, its names and shapes checked against its config.json.

    Raises:
        ValueError: no readable config.json or weights, a family that is not here, or weights of another model.
    """
    folder = Path(folder)
    cfg, stored = config_from_hf_folder(folder), read_folder(folder)
    canonical = getattr(family_of(cfg), "canonical", str)
    stored = {canonical(name): tensor for name, tensor in stored.items()}
    scores = "score.weight" in stored and "lm_head.weight" not in stored
    if cfg.head == "lm" and scores and not cfg.tied_embeddings:
        cfg = dataclasses.replace(cfg, head="scalar")  # a reward model whose config.json does not say so
    names = fitting(folder, cfg, {hf: tensor.shape for hf, tensor in stored.items()})
    return Opened(folder, "hugging_face", cfg, Folder({hf: stored[hf] for hf in names}), folder)


def fitting(where: Path, cfg: ModelConfig, found: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The names a model takes of the tensors found somewhere, in the model's order; every one of them has its shape.

    Some may be missing and start from fresh weights (`lacking`). Tensors known to have no place are told in a warning.

    Raises:
        ValueError: tensors are missing, have another shape, or belong to another model; names the first five.
    """
    expected = hf_shapes(cfg)
    fresh = lacking(cfg, found)
    missing = [name for name in expected if name not in found and name not in fresh]
    unequal = [
        f"{name}: {list(found[name])} in the file, {list(shape)} by the config"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    allowed = {*expected, *weight_rules(cfg)[1], "lm_head.weight", "score.weight"}
    unused = _leave_out(where, cfg, [name for name in found if name not in allowed and not _is_buffer(name)])
    problems = [f"{len(missing)} tensors are missing:{_first(missing)}"] if missing else []
    problems += [f"{len(unequal)} tensors have another shape:{_first(unequal)}"] if unequal else []
    problems += [f"{len(unused)} tensors have no place in the model:{_first(unused)}"] if unused else []
    if problems:
        raise ValueError(
            f"the weights in {where} do not fit the model (family {cfg.family}, "
            f"{cfg.num_layers} layers, hidden size {cfg.hidden_size}):\n"
            + "\n".join(problems)
            + "\nUse model=hf to take the sizes from the folder's own config; if they do already, "
            "its config and weights belong to different models: fetch the folder again."
        )
    return [name for name in expected if name not in fresh]


def lacking(cfg: ModelConfig, found: Iterable[str]) -> set[str]:
    """The Hugging Face names that are not among those found, and need not be: a scalar head (of a language model
    becoming a reward model), and what only training needs in the family's own checkpoints."""
    may_lack = getattr(family_of(cfg), "may_lack", None)
    wanted = {"score.weight"} if cfg.head == "scalar" else set()
    if may_lack is not None:
        wanted |= {hf for hf in hf_shapes(cfg) if may_lack(hf)}
    return wanted - set(found)


def _leave_out(where: Path, cfg: ModelConfig, names: list[str]) -> list[str]:
    """`names` without those the family knows to have no place in the model, which are told in a warning."""
    for rule in family_of(cfg).rules(cfg):
        known = [name for name in names if name.startswith(rule.prefix)] if isinstance(rule, Unused) else []
        if isinstance(rule, Unused) and known:
            told = f"{where}: {len(known)} tensors {rule.prefix}* are left out ({rule.why})"
            warnings.warn(told, stacklevel=4)
            names = [name for name in names if name not in set(known)]
    return names


def _first(lines: Iterable[str]) -> str:
    listed = list(lines)
    more = [f"... and {len(listed) - SHOWN} more"] if len(listed) > SHOWN else []
    return "".join(f"\n  {line}" for line in listed[:SHOWN] + more)


def _is_buffer(name: str) -> bool:
    # Old Llama checkpoints store the rotary frequencies, which follow from the config.
    return name.endswith("rotary_emb.inv_freq")
