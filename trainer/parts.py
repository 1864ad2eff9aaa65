"""A run that trains parts of a model: what cannot work, where its weights come from, what its checkpoints say."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert.adapters import fingerprint
from convert.composed import Part, composed, found_in, new_tensors, new_words
from convert.loom_files import Checkpoint
from convert.opened import Opened
from convert.part_runs import Over
from models import build
from models.config import ModelConfig
from models.parts import ALL, freeze, part_problems
from parallel.materialise import TensorSource
from trainer import folders
from trainer.problems import Problem

if TYPE_CHECKING:  # it asks this file for its problems
    from trainer.config import RunConfig


@dataclass(frozen=True)
class InitPartsConfig:
    """Parts to start from, each from a folder of its own; a part that is not named is fresh."""

    vision: str | None = None
    """The tower of a model that sees, or a CLIP or SigLIP folder."""
    connector: str | None = None
    """The connector of a model that sees."""
    decoder: str | None = None
    """A language model, or that of a model that sees; words it does not have begin fresh."""

    @property
    def folders(self) -> dict[Part, str]:
        """Those that are named."""
        named: dict[Part, str | None] = {
            "vision": self.vision,
            "connector": self.connector,
            "decoder": self.decoder,
        }
        return {part: folder for part, folder in named.items() if folder is not None}


def problems(cfg: RunConfig) -> list[Problem]:
    """Every reason why these parts cannot be trained, or not be started from."""
    if cfg.model.size_problems():
        return []
    return _start_problems(cfg) + _trained_problems(cfg)


def _start_problems(cfg: RunConfig) -> list[Problem]:
    named, found = cfg.init_parts.folders, []
    if named and cfg.init_from is not None:
        reason = f"init_from={cfg.init_from} is the whole model already"
        return [Problem("init_parts", ", ".join(named), reason, "init_from=null, or init_parts without a folder")]
    for part, folder in named.items():
        key = f"init_parts.{part}"
        if not Path(folder).is_dir():
            way = folders.nearby(Path(folder)) or "the path of a folder with weights"
            found.append(Problem(key, folder, "there is no such folder", way))
            continue
        try:
            if part != "decoder" and cfg.model.vision is None:
                raise ValueError(f"the model has no {part}: model.vision is null")
            found_in(cfg.model, part, folder)
        except ValueError as error:
            way = f"init_parts.{part}=null for fresh weights, or a model of these sizes"
            found.append(Problem(key, folder, str(error), way))
    return found


def _trained_problems(cfg: RunConfig) -> list[Problem]:
    parts = cfg.optim.parts
    if parts == ALL or parts.problems():
        return []
    if cfg.adapter is not None:
        reason = f"adapter={cfg.adapter.name} is trained beside a whole model that stays as it is"
        return [Problem("optim.parts", "the section", reason, "leave optim.parts as it is, or adapter=none")]
    return [Problem(f"optim.{key}", value, why, way) for key, value, why, way in part_problems(parts, cfg.model)]


def notes(cfg: RunConfig) -> list[str]:
    """Where the parts come from and what is trained of each, where that is not the same for all."""
    return _start_notes(cfg) + _trained_notes(cfg)


def _start_notes(cfg: RunConfig) -> list[str]:
    named = cfg.init_parts.folders
    if not named:
        return []
    fresh = [part for part in ("vision", "connector", "decoder") if part not in named]
    words = [f"{part} from {folder}" for part, folder in named.items()]
    words += [f"{' and '.join(fresh)} fresh"] if fresh else []
    more = new_words(cfg.model, named["decoder"]) if "decoder" in named else 0
    words += [f"{more} rows of the vocabulary fresh"] if more else []
    lacks = [name for part, folder in named.items() for name in new_tensors(cfg.model, part, folder)]
    words += [f"{len(lacks)} tensors fresh that these do not have ({modules_of(lacks)})"] if lacks else []
    return ["starts with " + ", ".join(words)]


def modules_of(names: Sequence[str]) -> str:
    """The modules that parameters belong to, each layer's part once for all layers: `connector.body.layers.*.cross`."""
    found = dict.fromkeys(
        re.sub(r"\.\d+\.", ".*.", name).removesuffix(".weight").removesuffix(".bias") for name in names
    )
    return ", ".join(found)


def _trained_notes(cfg: RunConfig) -> list[str]:
    parts = cfg.optim.parts
    if parts == ALL or cfg.adapter is not None:
        return []
    model = build(cfg.model)
    freeze(model, parts)
    counts: dict[str, list[int]] = {}
    for name, param in model.named_parameters():
        part = name.partition(".")[0]
        part = part if part in ("vision", "connector") else "decoder"
        trained, every = counts.setdefault(part, [0, 0])
        counts[part] = [trained + param.numel() * param.requires_grad, every + param.numel()]
    words = []
    for name, (trained, every) in counts.items():
        part = getattr(parts, name)
        if not trained:
            words.append(f"{name} frozen ({every:,})")
            continue
        last = getattr(part, "last_layers", None)
        layers = "" if last is None else f", last {last} layer{'s' * (last > 1)}"
        rate = "" if part.lr_scale == 1 else f" at {part.lr_scale:g} x optim.lr"
        words.append(f"{name} {trained:,} of {every:,}{layers}{rate}")
    return ["trained by part: " + "; ".join(words)]


def weights(cfg: RunConfig, base: Callable[[], TensorSource], saved: Checkpoint | None) -> TensorSource:
    """The weights of a run: those it starts from; of one that goes on what it trained, and the rest from there."""
    record(cfg)
    if saved is None:
        return base()
    return saved if cfg.optim.parts.everything else Over(saved, base())


def record(cfg: RunConfig) -> dict[str, Any] | None:
    """What a checkpoint keeps to find the rest of its model again; None where it holds all of it."""
    if cfg.adapter is not None or cfg.optim.parts.everything:
        return None
    about: dict[str, Any] = {"config": dataclasses.asdict(cfg.optim.parts), "base": None, "seed": cfg.run.seed}
    if cfg.init_from is not None:
        about |= {"base": str(Path(cfg.init_from).absolute()), "fingerprint": _fingerprint(cfg.init_from)}
    elif named := cfg.init_parts.folders:
        about["base"] = {part: str(Path(folder).absolute()) for part, folder in named.items()}
        about["fingerprint"] = _composed_fingerprint(cfg.model, cfg.init_parts, cfg.run.seed)
    return about


def composed_start(cfg: RunConfig) -> Opened:
    """The model with its parts from the folders of init_parts.

    Raises:
        ValueError: one of them does not hold its part.
    """
    return composed(cfg.model, cfg.init_parts.folders, cfg.run.seed)


@functools.lru_cache(maxsize=1)
def _fingerprint(init_from: str) -> str:
    """Taken once, at the start: the folder may be gone when the run is saved."""
    return fingerprint(folders.opened(init_from))


@functools.lru_cache(maxsize=1)
def _composed_fingerprint(model: ModelConfig, named: InitPartsConfig, seed: int) -> str:
    """The same of several folders."""
    return fingerprint(composed(model, named.folders, seed))


def other_parts(cfg: RunConfig, saved: dict[str, Any] | None) -> str | None:
    """Why a run cannot go on from a checkpoint with this record; None where it can."""
    ours = record(cfg)
    theirs_of, ours_of = (None if about is None else _trained(about["config"]) for about in (saved, ours))
    if theirs_of != ours_of:
        theirs, wanted = (_words(each) for each in (theirs_of, ours_of))
        way = f"a new run with init_from={cfg.run.dir}/NAME starts from its weights"
        return f"it trained {theirs}, and this run trains {wanted} (optim.parts); {way}"
    if saved is None or ours is None:
        return None
    if (saved["base"] is None) != (ours["base"] is None):
        return f"what it started from: {saved['base']} -> {ours['base']}"
    if saved["base"] is None and saved["seed"] != ours["seed"]:
        return f"run.seed: {saved['seed']} -> {ours['seed']}, by which the parts that are not trained are drawn"
    if saved["base"] is not None and saved["fingerprint"] != ours["fingerprint"]:
        return f"the weights in {ours['base']} are not those it started from ({saved['base']})"
    return None


def _trained(parts: dict[str, Any]) -> dict[str, int | str]:
    """Of each part that is trained, how much."""
    return {name: part.get("last_layers") or "all" for name, part in parts.items() if part["train"]}


def _words(parts: dict[str, int | str] | None) -> str:
    if parts is None:
        return "all parts"
    return " and ".join(
        f"all of {name}" if many == "all" else f"the last {many} layers of {name}" for name, many in parts.items()
    )
