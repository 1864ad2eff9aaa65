"""A model put together from others: its decoder from one checkpoint, its tower from another, the rest fresh.

A part may lie in any checkpoint that holds it: a whole model that sees, a language model, a plain CLIP or SigLIP. Both
sides say by Loom's names what their Hugging Face tensors are, so a tensor of one is the tensor of the other that makes
the same parameter. Rows that the new model has more (words added to the vocabulary) are fresh.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

import torch

from convert import bert
from convert.adapters import Fresh
from convert.boxes import Columns, Meta, Tensors
from convert.from_hf import Folder, hf_shapes, weight_rules
from convert.hf_files import read_folder
from convert.opened import Opened
from convert.opening import open_weights
from models.config import ModelConfig
from models.llava import tower_of
from models.rules import Rule, Unused
from models.vision.config import QFormerConfig
from models.vision.rules import tower_rules

Part = Literal["vision", "connector", "decoder"]
TO_DECODER = "connector.body.proj"
"""What a Q-Former of the first stage does not have."""
GROWING = ("embed.weight", "head.weight", "text.words.weight", "text.head.bias")
MAY_DIFFER = ("vision", "vocab_size", "rope", "max_seq_len", "sliding_window", "full_attention_layers", "init_std")
"""What of a decoder's config may be another than that of the folder it comes from; more words only."""
HOW_PICTURES_ENTER = ("feature_layer", "final_norm", "keep_class")
"""And of a tower's."""


@dataclasses.dataclass(frozen=True)
class Found:
    """A tensor of the new model in another checkpoint."""

    tensors: Tensors
    hf: str
    rows: int | None
    """It has so many rows only; None: all."""


class Composed(Tensors):
    """Tensors by the new model's Hugging Face names."""

    def __init__(self, model: ModelConfig, seed: int, found: Mapping[str, Found]) -> None:
        self._fresh, self._found = Fresh(model, seed), found
        self._metas = {hf: self._meta(hf, meta) for hf, meta in self._fresh.metas.items()}
        self._last: tuple[str, torch.Tensor] | None = None

    def _meta(self, hf: str, fresh: Meta) -> Meta:
        found = self._found.get(hf)
        whole = found is not None and found.rows is None
        return Meta(found.tensors.metas[found.hf].dtype, fresh.shape) if found is not None and whole else fresh

    @property
    def metas(self) -> Mapping[str, Meta]:
        """Every tensor there is, in the order of the model."""
        return self._metas

    def rows(self, hf: str, start: int, stop: int, columns: Columns | None = None) -> torch.Tensor:
        """Rows [start, stop) of one tensor, all columns or some."""
        found = self._found.get(hf)
        if found is None:
            return self._drawn(hf, start, stop, columns)
        if found.rows is None or stop <= found.rows:
            return found.tensors.rows(found.hf, start, stop, columns)
        new = self._drawn(hf, max(start, found.rows), stop, columns)
        return (
            new if start >= found.rows else torch.cat([found.tensors.rows(found.hf, start, found.rows, columns), new])
        )

    def _drawn(self, hf: str, start: int, stop: int, columns: Columns | None) -> torch.Tensor:
        """Rows of a fresh tensor, which is drawn whole: the last one is kept for the next rows of it."""
        if self._last is None or self._last[0] != hf:
            shape = self._fresh.metas[hf].shape
            count = torch.Size(shape[:-1] if len(shape) > 1 else shape).numel()
            self._last = hf, self._fresh.rows(hf, 0, count)
        found = self._last[1][start:stop]
        return found if columns is None else found[:, slice(*columns)]


def composed(model: ModelConfig, folders: Mapping[Part, str], seed: int) -> Opened:
    """The model with its parts from these folders and everything else drawn by `seed`. No value is read yet.

    Raises:
        ValueError: a folder does not hold the part, or another one than the model's.
    """
    found: dict[str, Found] = {}
    for part, folder in folders.items():
        found |= found_in(model, part, folder)
    where = Path(next(iter(folders.values())))
    return Opened(where, "loom", model, Composed(model, seed, found), None)


def found_in(model: ModelConfig, part: Part, folder: str) -> dict[str, Found]:
    """The tensors of a part of a model, by the model's Hugging Face names, in a folder.

    Raises:
        ValueError: it does not hold the part, or another one than the model's.
    """
    wanted = {name: rule for name, rule in weight_rules(model)[0].items() if _part_of(name) == part}
    if part != "vision" and bert.config_of(folder) is not None and model.family == "bert":
        tensors, rules = bert.open_bert(model, folder)
    else:
        tensors, rules = _tower_in(model, folder) if part == "vision" else _model_in(model, part, folder)
    shapes, found, fresh = hf_shapes(model), {}, fresh_names(model, part, folder)
    for name, rule in wanted.items():
        theirs = rules.get(name)
        if theirs is None and name in fresh:
            continue
        if theirs is None:
            raise ValueError(f"{folder} does not hold the {part} of the model: there is no {name}")
        for hf, other in zip(rule.sources, theirs.sources, strict=True):
            if other not in tensors.metas:
                raise ValueError(f"{folder} does not hold the {part} of the model: there is no {other}")
            has, needs = tensors.metas[other].shape, shapes[hf]
            grows = name in GROWING and has[1:] == needs[1:] and has[0] < needs[0]
            if has != needs and not grows:
                raise ValueError(
                    f"{folder} holds another {part}: {other} is {list(has)}, and the model's {list(needs)}"
                )
            found[hf] = Found(tensors, other, has[0] if grows else None)
    return found


def fresh_names(model: ModelConfig, part: Part, folder: str) -> frozenset[str]:
    """The parameters of a part that a folder need not hold: between a Q-Former of the first stage and a decoder the
    layer that joins them; of a Q-Former that starts from a BERT all that this does not have."""
    config = bert.config_of(folder)
    if model.family == "bert" and config is not None:
        rules = {rule.ours for rule in bert.bert_rules(model)} - {"text.head.bias"}
        return frozenset(name for name in weight_rules(model)[0] if name not in rules or name.startswith("text.head."))
    if part == "connector" and not model.compares and open_weights(folder).cfg.compares:
        return frozenset(name for name in weight_rules(model)[0] if name.startswith(f"{TO_DECODER}."))
    return frozenset()


def new_tensors(model: ModelConfig, part: Part, folder: str) -> list[str]:
    """The parameters of a part that start fresh because a folder does not have them."""
    held = found_in(model, part, folder)
    return [name for name, rule in weight_rules(model)[0].items()
            if _part_of(name) == part and not held.keys() & set(rule.sources)]  # fmt: skip


def new_words(model: ModelConfig, folder: str) -> int:
    """Rows of the vocabulary that a model has more than the decoder in a folder."""
    config = bert.config_of(folder)
    return model.vocab_size - (open_weights(folder).cfg.vocab_size if config is None else config["vocab_size"])


def _part_of(name: str) -> str:
    first = name.partition(".")[0]
    return first if first in ("vision", "connector") else "decoder"


def _model_in(model: ModelConfig, part: Part, folder: str) -> tuple[Tensors, Mapping[str, Rule]]:
    """A whole checkpoint that holds a part."""
    opened = open_weights(folder)
    if part == "decoder":
        _same(folder, part, model, opened.cfg, MAY_DIFFER)
    elif opened.cfg.vision is None:
        raise ValueError(f"{folder} holds a model that sees nothing, and so no {part}")
    else:
        assert model.vision is not None
        theirs, ours = opened.cfg.vision.connector, model.vision.connector
        if isinstance(ours, QFormerConfig) and isinstance(theirs, QFormerConfig):
            theirs = dataclasses.replace(theirs, width=ours.width)  # of the first stage only
        if theirs != ours:
            raise ValueError(f"{folder} holds another connector: {theirs} against the model's {ours}")
        theirs, ours = opened.cfg.vision.cross, model.vision.cross
        if theirs != ours:
            raise ValueError(f"{folder} has other layers that read features: {theirs} against the model's {ours}")
    return opened.tensors, weight_rules(opened.cfg)[0]


def _tower_in(model: ModelConfig, folder: str) -> tuple[Tensors, Mapping[str, Rule]]:
    """The tower of a model that sees, or one that lies in a folder by itself or beside a text encoder."""
    assert model.vision is not None
    try:
        config = json.loads((Path(folder) / "config.json").read_text())
    except (OSError, ValueError):
        config = {}
    own = config.get("vision_config", config)
    if config.get("model_type") not in ("clip", "clip_vision_model", "siglip", "siglip_vision_model"):
        opened = open_weights(folder)
        if opened.cfg.vision is None:
            raise ValueError(f"{folder} holds a model that sees nothing, and so no vision tower")
        _same(folder, "vision", model.vision.tower, opened.cfg.vision.tower, HOW_PICTURES_ENTER)
        return opened.tensors, weight_rules(opened.cfg)[0]
    kind = config["model_type"].partition("_")[0]
    theirs = tower_of({"vision_config": {**own, "model_type": f"{kind}_vision_model"}})
    _same(folder, "vision", model.vision.tower, theirs, HOW_PICTURES_ENTER)
    stored = read_folder(folder)
    first = "embeddings.patch_embedding.weight"
    prefix = next((name.removesuffix(first) for name in stored if name.endswith(first)), None)
    if prefix is None:
        raise ValueError(f"{folder} does not hold the vision of the model: there is no {first}")
    rules = {rule.ours: rule for rule in tower_rules(model.vision.tower, prefix) if not isinstance(rule, Unused)}
    return Folder(stored), rules


def _same(folder: str, part: str, ours: object, theirs: object, but: Iterable[str]) -> None:
    differ = [
        f"{name} is {getattr(ours, name)} against {getattr(theirs, name)} in the folder"
        for name in vars(ours)
        if name not in but and getattr(ours, name) != getattr(theirs, name)
    ]
    if differ:
        raise ValueError(f"{folder} holds another {part}: {', '.join(differ)}")
