"""Hugging Face folders of families that Loom does not train: config.json and weights, safetensors or torch files.

No code that lies in such a folder is ever run.
"""

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from convert.boxes import Columns, Meta, Tensors
from convert.hf_files import INDEX, SINGLE, read_folder
from convert.stored import StoredTensor

TORCH_INDEX = "pytorch_model.bin.index.json"
TORCH_SINGLE = "pytorch_model.bin"


class Stored:
    """Tensors of safetensors files. Is `convert.boxes.Tensors`."""

    def __init__(self, stored: Mapping[str, StoredTensor]) -> None:
        self._stored = stored
        self.metas = {name: Meta(tensor.dtype, tensor.shape) for name, tensor in stored.items()}

    def rows(self, hf: str, start: int, stop: int, columns: Columns | None = None) -> torch.Tensor:
        """Rows [start, stop) of one tensor, all columns or some."""
        rows = self._stored[hf].rows(start, stop)
        return rows if columns is None else rows[:, slice(*columns)].clone()


class Mapped:
    """Tensors of torch files, mapped into memory and read from the disk where they are touched. Is `Tensors`."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors
        self.metas = {name: Meta(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}

    def rows(self, hf: str, start: int, stop: int, columns: Columns | None = None) -> torch.Tensor:
        """Rows [start, stop) of one tensor, all columns or some."""
        whole = self._tensors[hf]
        rows = whole.reshape(-1, whole.shape[-1])[start:stop] if whole.dim() > 1 else whole[start:stop]
        return (rows if columns is None else rows[:, slice(*columns)]).clone()


def read_weights(folder: Path) -> Tensors:
    """The weights of a folder: safetensors, or torch files where there are none (many older checkpoints).

    Raises:
        ValueError: no weights, a file missing or damaged, or a torch file that holds more than tensors.
    """
    torch_files = (folder / TORCH_INDEX).is_file() or (folder / TORCH_SINGLE).is_file()
    if torch_files and not (folder / INDEX).is_file() and not (folder / SINGLE).is_file():
        return Mapped(_read_torch(folder))
    return Stored(read_folder(folder))


def _read_torch(folder: Path) -> dict[str, torch.Tensor]:
    if not (folder / TORCH_INDEX).is_file():
        return _load(folder / TORCH_SINGLE)
    placed = read_object(folder / TORCH_INDEX).get("weight_map")
    if not isinstance(placed, dict):
        raise ValueError(f"{folder / TORCH_INDEX} is not an index of weights; fetch it again")
    files = sorted(set(placed.values()))
    gone = [name for name in files if not (folder / name).is_file()]
    if gone:
        raise ValueError(f"{folder} lacks {len(gone)} of {len(files)} weight files: {', '.join(gone[:5])}")
    loaded = {name: _load(folder / name) for name in files}
    wrong = [name for name, file in placed.items() if name not in loaded[file]]
    if wrong:
        raise ValueError(f"{TORCH_INDEX} places {wrong[0]} in {placed[wrong[0]]}, which has no such tensor")
    return {name: loaded[file][name] for name, file in placed.items()}


def _load(file: Path) -> dict[str, torch.Tensor]:
    try:
        content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as err:
        raise ValueError(
            f"{file} holds something else than tensors, which could run code when read; it is refused. "
            "Fetch the checkpoint from a source you trust as safetensors."
        ) from err
    except (RuntimeError, EOFError, OSError) as err:
        raise ValueError(f"{file} cannot be read ({_short(err)}): it is cut, damaged or of an old kind") from err
    others = [] if not isinstance(content, dict) else [k for k, v in content.items() if not torch.is_tensor(v)]
    if not isinstance(content, dict) or others:
        raise ValueError(f"{file} is not a list of named tensors" + (f" (see {others[0]!r})" if others else ""))
    return content


def _short(err: Exception) -> str:
    return (str(err).strip().splitlines() or [type(err).__name__])[0][:100]


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: no such file, or it holds something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{file.parent} has no {file.name}; give the folder of a Hugging Face checkpoint") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as err:
        raise ValueError(f"{file} is not JSON ({err}); fetch it again") from err
    if not isinstance(content, dict):
        raise ValueError(f"{file} is not a JSON object; fetch it again")
    return content
