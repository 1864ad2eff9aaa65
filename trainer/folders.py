"""Folders and files that a config names: why one cannot be used, and which was probably meant."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from models import config_from_hf_folder
from models.config import ModelConfig
from trainer.problems import Problem, nearest

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")
OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.gguf")
MAY_DIFFER_FROM_FOLDER = ("rope", "max_seq_len", "sliding_window", "full_attention_layers", "init_std", "head")
"""Model fields that change no tensor of a checkpoint: a longer context, another window or head is a choice."""
ROUTER_TRAINING = ("bias_rate", "balance_loss", "balance_over", "z_loss", "capacity")
"""And those of ``model.moe``: they say how the router is trained, not what it is."""


def folder_problem(init_from: str) -> Problem | None:
    """Why a folder cannot be started from: missing, or without config, weights or a family we know."""
    folder = Path(init_from)
    if not folder.is_dir():
        reason = "is a file, not a folder" if folder.exists() else "there is no such folder"
        return Problem("init_from", init_from, reason, nearby(folder) or "the path of a Hugging Face model folder")
    if not (folder / "config.json").is_file():
        way = "a folder as written by save_pretrained: config.json beside the weights"
        return Problem("init_from", init_from, "holds no config.json", way)
    if not any(any(folder.glob(pattern)) for pattern in WEIGHT_FILES):
        reason, way = f"holds no weights (none of {', '.join(WEIGHT_FILES)})", "a folder as written by save_pretrained"
        other = sorted({file.suffix for pattern in OTHER_WEIGHTS for file in folder.glob(pattern)})
        if other:
            reason = f"holds weights only as {' and '.join(other)} files, which are not read"
            way = "the folder that AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW) writes"
        return Problem("init_from", init_from, reason, way)
    try:
        config_from_hf_folder(init_from)
    except ValueError as err:
        return Problem("init_from", init_from, str(err), "a folder of a supported family")
    return None


def other_model(init_from: str, model: ModelConfig) -> Problem | None:
    """The fields in which a model differs from the one in a folder, where that changes a tensor."""
    theirs = config_from_hf_folder(init_from)
    fields = [f.name for f in dataclasses.fields(ModelConfig) if f.name not in MAY_DIFFER_FROM_FOLDER]
    differ = [name for name in fields if getattr(model, name) != getattr(theirs, name)]
    if "moe" in differ and model.moe and theirs.moe:
        trained_as = {name: getattr(theirs.moe, name) for name in ROUTER_TRAINING}
        if dataclasses.replace(model.moe, **trained_as) == theirs.moe:
            differ.remove("moe")
    if not differ:
        return None
    pairs = ", ".join(f"model.{n} is {getattr(model, n)} against {getattr(theirs, n)} in the folder" for n in differ)
    way = "model=hf reads the sizes from the folder"
    return Problem("init_from", init_from, f"its config.json is another model: {pairs}", way)


def tokenizer_problem(key: str, path: str) -> Problem | None:
    """A folder without a tokenizer; a missing one is told by the section, or by ``folder_problem``."""
    folder = Path(path)
    if not folder.is_dir() or any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    reason = f"holds no tokenizer (none of {', '.join(TOKENIZER_FILES)})"
    return Problem(key, path, reason, "data.tokenizer=FOLDER with a tokenizer.json")


def nearby(path: Path) -> str | None:
    """The existing path spelled most like a missing one, or the command that makes it; None when there is neither."""
    if path.parts[:1] == ("assets",):
        return "python scripts/prepare_quickstart.py makes the quickstart's model and data"
    parent = path.parent
    while not parent.is_dir() and parent != parent.parent:
        path, parent = parent, parent.parent
    close = nearest(path.name, (p.name for p in parent.iterdir()), limit=1) if parent.is_dir() else []
    return str(parent / close[0]) if close else None
