"""Safetensors files of a Hugging Face folder: read tensor by tensor, written without holding a file.

Format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, then the bytes.
Source: the safetensors specification, https://github.com/huggingface/safetensors#format.
"""

import errno
import json
import shutil
import struct
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: file, dtype, shape, and its bytes from the start of the file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    def read(self) -> torch.Tensor:
        """The tensor, its own memory, in the stored dtype."""
        data = bytearray(self.stop - self.start)
        with self.file.open("rb") as handle:
            handle.seek(self.start)
            got = handle.readinto(data)
        if got != len(data):
            raise ValueError(f"{self.file} ended early while reading: it changed or was cut; fetch it again")
        if not data:
            return torch.empty(self.shape, dtype=self.dtype)
        return torch.frombuffer(data, dtype=self.dtype).reshape(self.shape)


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Every tensor of one safetensors file, from its header; checks that the file holds all its bytes.

    Raises:
        ValueError: the file is truncated or is not safetensors.
    """
    size = file.stat().st_size
    with file.open("rb") as handle:
        head = handle.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if len(head) < 8 or 8 + length > size:
            raise ValueError(f"{file} is truncated: {size} bytes do not even hold its header; fetch it again")
        try:
            header = json.loads(handle.read(length))
        except (json.JSONDecodeError, UnicodeDecodeError) as err:
            raise ValueError(f"{file} is not a safetensors file ({err}); fetch it again") from err
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{file}: tensor {name} is stored as {entry['dtype']}; readable are {', '.join(DTYPES)}")
        start, stop = (8 + length + offset for offset in entry["data_offsets"])
        tensors[name] = StoredTensor(file, DTYPES[entry["dtype"]], tuple(entry["shape"]), start, stop)
    expected = max((tensor.stop for tensor in tensors.values()), default=8 + length)
    if size < expected:
        raise ValueError(f"{file} is truncated: it has {size} bytes, its header promises {expected}; fetch it again")
    return tensors


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
        size = _numel(shape) * (torch.float32 if name in exact else dtype).itemsize
        if used + size > limit:
            files.append([])
            used = 0
        files[-1].append(name)
        used += size
    return files


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


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
        self._place: dict[str, tuple[Path, int]] = {}
        self.total = sum(_numel(shape) * self._dtype(name).itemsize for name, shape in shapes.items())
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
            self._begin(folder / file, {name: shapes[name] for name in tensors})
        if len(files) > 1:
            index = {
                "metadata": {"total_size": self.total},
                "weight_map": {n: p.name for n, (p, _) in self._place.items()},
            }
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _dtype(self, name: str) -> torch.dtype:
        return torch.float32 if name in self.exact else self.dtype

    def _begin(self, file: Path, shapes: dict[str, tuple[int, ...]]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, shape in shapes.items():
            dtype = self._dtype(name)
            end = offset + _numel(shape) * dtype.itemsize
            header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8
        with file.open("wb") as handle:
            handle.write(struct.pack("<Q", len(text)) + text)
        for name in shapes:
            self._place[name] = (file, 8 + len(text) + header[name]["data_offsets"][0])

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor, converted to the dtype of the files.

        Raises:
            ValueError: the disk is full.
        """
        shape = self._left.pop(name)
        assert tuple(tensor.shape) == shape, f"{name} has shape {tuple(tensor.shape)}, planned was {shape}"
        file, offset = self._place[name]
        data = tensor.detach().to("cpu", self._dtype(name)).contiguous().view(-1).view(torch.uint8)
        try:
            with file.open("r+b") as handle:
                handle.seek(offset)
                handle.write(data.numpy().data)
        except OSError as err:
            if err.errno != errno.ENOSPC:
                raise
            raise ValueError(f"the disk is full while writing {file}; free space or choose another disk") from err

    def finish(self) -> None:
        """Assert that every planned tensor was written."""
        assert not self._left, f"{len(self._left)} tensors were never written, first {list(self._left)[:5]}"


def iter_tensors(folder: str | Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a Hugging Face folder, one at a time, by its name there."""
    for name, stored in read_folder(folder).items():
        yield name, stored.read()
