"""Safetensors files of a Hugging Face folder: read tensor by tensor, written without holding a file."""

import json
import math
import shutil
from collections.abc import Iterator, Mapping, Set
from pathlib import Path

import torch

from convert.stored import StoredTensor, begin_file, read_header

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD_BYTES = 5 * 10**9


def read_folder(folder: str | Path) -> dict[str, StoredTensor]:
    """Every tensor of a Hugging Face folder (one file, or several with an index), from the headers only.

    Raises:
        ValueError: no folder, no safetensors in it, a file missing or truncated.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give the folder of a Hugging Face checkpoint")
    if (folder / INDEX).is_file():
        return _read_indexed(folder)
    if (folder / SINGLE).is_file():
        return read_header(folder / SINGLE)
    others = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".gguf", ".h5"))
    if others:
        names = ", ".join(others[:3])
        raise ValueError(
            f"{folder} has weights only as {names}, none as safetensors. Convert once with transformers: "
            f"AutoModelForCausalLM.from_pretrained({str(folder)!r}).save_pretrained(NEW_FOLDER)"
            + (f" (with gguf_file={others[0]!r} in from_pretrained)" if others[0].endswith(".gguf") else "")
            + "; it writes safetensors."
        )
    parts = sorted(path.name for path in folder.glob("*.safetensors"))
    if parts:
        raise ValueError(
            f"{folder} holds {', '.join(parts[:3])} but no {INDEX}, which says what lies where; fetch it too"
        )
    raise ValueError(f"{folder} holds no weights: neither {SINGLE} nor {INDEX} is there; fetch the checkpoint again")


def _read_indexed(folder: Path) -> dict[str, StoredTensor]:
    try:
        placed: dict[str, str] = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError) as err:
        raise ValueError(f"{folder / INDEX} is not a safetensors index ({err!r}); fetch it again") from err
    files = sorted(set(placed.values()))
    gone = [name for name in files if not (folder / name).is_file()]
    if gone:
        raise ValueError(
            f"{folder} lacks {len(gone)} of {len(files)} weight files named in {INDEX}: {', '.join(gone[:5])}"
        )
    headers = {name: read_header(folder / name) for name in files}
    wrong = [name for name, file in placed.items() if name not in headers[file]]
    if wrong:
        raise ValueError(f"{INDEX} places {wrong[0]} in {placed[wrong[0]]}, which has no such tensor; fetch both again")
    return {name: headers[file][name] for name, file in placed.items()}


def plan_files(
    shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, limit: int, exact: Set[str] = frozenset()
) -> list[list[str]]:
    """Deal tensors, in order, into files of at most `limit` bytes (a larger tensor has a file of its own)."""
    files: list[list[str]] = []
    used = limit
    for name, shape in shapes.items():
        size = math.prod(shape) * (torch.float32 if name in exact else dtype).itemsize
        if used + size > limit:
            files.append([])
            used = 0
        files[-1].append(name)
        used += size
    return files


class SafetensorsWriter:
    """Writes a known set of tensors into `folder`, in any order, holding one tensor at a time.

    All are converted to `dtype` but those in `exact`, which stay fp32.
    """

    def __init__(
        self,
        folder: Path,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: torch.dtype,
        limit: int,
        exact: Set[str] = frozenset(),
    ) -> None:
        self.folder, self.dtype, self.exact = folder, dtype, exact
        self._left = dict(shapes)
        self.stored: dict[str, StoredTensor] = {}
        self.total = sum(math.prod(shape) * self._dtype(name).itemsize for name, shape in shapes.items())
        free = shutil.disk_usage(folder).free
        if free < self.total:
            raise ValueError(
                f"{folder} has {free} bytes free, the weights need {self.total}; free space or choose another disk"
            )
        files = plan_files(shapes, dtype, limit, exact)
        names = (
            [SINGLE]
            if len(files) == 1
            else [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
        )
        for file, tensors in zip(names, files, strict=True):
            described = {name: (self._dtype(name), shapes[name]) for name in tensors}
            self.stored |= begin_file(folder / file, described, {"format": "pt"})
        if len(files) > 1:
            index = {
                "metadata": {"total_size": self.total},
                "weight_map": {name: stored.file.name for name, stored in self.stored.items()},
            }
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _dtype(self, name: str) -> torch.dtype:
        return torch.float32 if name in self.exact else self.dtype

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor, converted to the dtype of the files.

        Raises:
            ValueError: the disk is full.
        """
        shape = self._left.pop(name)
        assert tuple(tensor.shape) == shape, f"{name} has shape {tuple(tensor.shape)}, planned was {shape}"
        self.stored[name].put(0, tensor.reshape(-1, *self.stored[name].row_shape))

    def finish(self) -> None:
        """Assert that every planned tensor was written."""
        assert not self._left, f"{len(self._left)} tensors were never written, first {list(self._left)[:5]}"


def iter_tensors(folder: str | Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a Hugging Face folder, one at a time, by its name there."""
    for name, stored in read_folder(folder).items():
        yield name, stored.read()
