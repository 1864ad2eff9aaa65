"""Folders and files that a config names: why one cannot be used, and which was probably meant."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

from convert.from_hf import open_hf
from convert.loom_files import find_checkpoint, open_loom
from convert.opened import Opened
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


def opened(init_from: str) -> Opened:
    """The checkpoint to start from, opened: a Hugging Face folder, a run of Loom, or a Megatron checkpoint.

    Opened once, and again when files came or went: the checks and the run ask for it several times on every rank.

    Raises:
        ValueError: it cannot be read, or its tensors are not what its config says.
    """
    folder = Path(init_from)
    inside = (path for pattern in ("*", "checkpoints/*") for path in folder.glob(pattern))
    return _opened(init_from, max((path.stat().st_mtime_ns for path in (folder, *inside)), default=0))


@functools.lru_cache(maxsize=1)
def _opened(init_from: str, changed: int) -> Opened:
    folder = Path(init_from)
    if _is_hf(folder):
        return open_hf(folder)
    if find_checkpoint(folder):
        return open_loom(folder)
    from convert.opening import open_weights  # brings torch's distributed checkpoints in, half a second to import

    return open_weights(folder)


def forget() -> None:
    """Give back the headers of what was opened."""
    _opened.cache_clear()


def model_in(init_from: str) -> ModelConfig:
    """The model in a folder; of a Hugging Face folder only config.json is read.

    Raises:
        ValueError: it cannot be read, or is of a family that is not here.
    """
    return config_from_hf_folder(init_from) if _is_hf(Path(init_from)) else opened(init_from).cfg


def tokenizer_in(init_from: str) -> str | None:
    """Where the tokenizer of the model in a folder lies; None where nothing is kept beside its weights."""
    if _is_hf(Path(init_from)):
        return init_from
    files = opened(init_from).files
    return str(files) if files else None


def template_in(init_from: str) -> str | None:
    """The file of the chat template that a run of Loom was trained with, where the tokenizer has another."""
    template = None if _is_hf(Path(init_from)) else opened(init_from).chat_template
    return str(template) if template else None


def _is_hf(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any(any(folder.glob(pattern)) for pattern in WEIGHT_FILES)


def folder_problem(init_from: str) -> Problem | None:
    """Why a folder cannot be started from: missing, nothing known in it, not readable, or a family that is not here."""
    folder = Path(init_from)
    if not folder.is_dir():
        reason = "is a file, not a folder" if folder.exists() else "there is no such folder"
        return Problem("init_from", init_from, reason, nearby(folder) or "the path of a Hugging Face model folder")
    if not _is_hf(folder) and not find_checkpoint(folder) and not _is_megatron(folder):
        return Problem("init_from", init_from, *_nothing_known(folder))
    try:
        model_in(init_from)
    except ValueError as err:
        way = "a folder of a supported family" if _is_hf(folder) else "another checkpoint, or a Hugging Face folder"
        return Problem("init_from", init_from, str(err), way)
    return None


def _is_megatron(folder: Path) -> bool:
    from convert.opening import is_megatron  # see `_opened`

    return is_megatron(folder)


def _nothing_known(folder: Path) -> tuple[str, str]:
    """Why nothing can be started from in a folder, and the way out."""
    if (folder / "checkpoints").is_dir():
        return "is a run without a complete checkpoint", "another run, or one of its checkpoints/step_* folders"
    if not (folder / "config.json").is_file():
        way = (
            "a folder as written by save_pretrained: config.json beside the weights; a Megatron checkpoint; "
            "or the folder of a run"
        )
        return "holds no config.json, and neither a Megatron checkpoint nor one of a run", way
    other = sorted({file.suffix for pattern in OTHER_WEIGHTS for file in folder.glob(pattern)})
    if other:
        way = "the folder that AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW) writes"
        return f"holds weights only as {' and '.join(other)} files, which are not read", way
    return f"holds no weights (none of {', '.join(WEIGHT_FILES)})", "a folder as written by save_pretrained"


def other_model(init_from: str, model: ModelConfig) -> Problem | None:
    """The fields in which a model differs from the one in a folder, where that changes a tensor."""
    theirs = model_in(init_from)
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
    what = "its config.json is another model" if _is_hf(Path(init_from)) else "it is a checkpoint of another model"
    return Problem("init_from", init_from, f"{what}: {pairs}", way)


def tokenizer_problem(tokenizer: str | None, start: str | None, start_key: str = "init_from") -> Problem | None:
    """No tokenizer to be found; a folder that is missing is told by the section, or by ``folder_problem``."""
    way = "data.tokenizer=FOLDER with a tokenizer.json"
    key, path = "data.tokenizer", tokenizer
    if tokenizer is None and start is None:
        reason = "no tokenizer is named, and without init_from or init_parts.decoder there is no folder to take it from"
        return Problem(key, None, reason, way)
    if tokenizer is None and start is not None:
        if folder_problem(start):
            return None
        key, path = start_key, tokenizer_in(start)
        if path is None:
            return Problem(key, start, "no tokenizer is kept with this checkpoint, or it is gone", way)
    folder = Path(path or "")
    if not folder.is_dir() or any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    return Problem(key, path, f"holds no tokenizer (none of {', '.join(TOKENIZER_FILES)})", way)


def nearby(path: Path) -> str | None:
    """The existing path spelled most like a missing one, or the command that makes it; None when there is neither."""
    if path.parts[:1] == ("assets",):
        return "python scripts/prepare_quickstart.py makes the quickstart's model and data"
    parent = path.parent
    while not parent.is_dir() and parent != parent.parent:
        path, parent = parent, parent.parent
    close = nearest(path.name, (p.name for p in parent.iterdir()), limit=1) if parent.is_dir() else []
    return str(parent / close[0]) if close else None
