"""A tensor that lies somewhere in a file, read and written by rows; and safetensors files made of such tensors.

Format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, then the bytes.
Source: the safetensors specification, https://github.com/huggingface/safetensors#format.
"""

import errno
import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
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


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: file, dtype, shape, and its bytes from the start of the file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape of one row: the last dim, where there are several."""
        return self.shape[-1:] if len(self.shape) > 1 else ()

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return math.prod(self.row_shape) * self.dtype.itemsize

    def read(self) -> torch.Tensor:
        """The tensor, its own memory, in the stored dtype."""
        return self._read(self.start, self.shape)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop), all dims but the last counted as rows: [stop - start, last dim], own memory.

        Raises:
            ValueError: the file ended early.
        """
        return self._read(self.start + start * self.row_bytes, (stop - start, *self.row_shape))

    def strip(self, start: int, stop: int, columns: tuple[int, int]) -> torch.Tensor:
        """Some columns of rows [start, stop). The file is mapped: no more than these is copied out of its cache.

        Raises:
            ValueError: the file ended early.
        """
        if self.file.stat().st_size < self.stop:
            raise ValueError(f"{self.file} ended early while reading: it changed or was cut; fetch it again")
        size, row = self.dtype.itemsize, self.row_bytes
        mapped = np.memmap(self.file, np.uint8, "r", self.start + start * row, (stop - start, row))
        return torch.from_numpy(np.array(mapped[:, columns[0] * size : columns[1] * size])).view(self.dtype)

    def put(self, start: int, rows: torch.Tensor) -> None:
        """Write rows from `start` on, converted to the stored dtype; the file has its full length already.

        Raises:
            ValueError: the disk is full.
        """
        assert rows.shape[1:] == self.row_shape, f"rows of shape {tuple(rows.shape)} for {self}"
        at = self.start + start * self.row_bytes
        data = rows.detach().to("cpu", self.dtype).contiguous().view(-1).view(torch.uint8)
        assert at + data.numel() <= self.stop, f"{rows.shape[0]} rows from {start} on do not fit into {self}"
        left = data.numpy().data
        try:
            with _opened(self.file, os.O_WRONLY) as number:
                while left:
                    written = os.pwrite(number, left, at)
                    at, left = at + written, left[written:]
        except OSError as err:
            self.not_full(err)
            raise

    def not_full(self, err: OSError) -> None:
        """See that a failed write has another reason than a full disk.

        Raises:
            ValueError: the disk is full.
        """
        if err.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ValueError(f"the disk is full while writing {self.file}; free space or choose another disk") from err

    def ended(self) -> ValueError:
        """What to raise where the file is shorter than it was."""
        return ValueError(f"{self.file} ended early while reading: it changed or was cut; fetch it again")

    def _read(self, at: int, shape: tuple[int, ...]) -> torch.Tensor:
        out = torch.empty(shape, dtype=self.dtype)
        if not out.numel():
            return out
        into = out.view(-1).view(torch.uint8).numpy().data
        with _opened(self.file, os.O_RDONLY) as number:
            while into:
                got = os.preadv(number, [into], at)
                if not got:
                    raise self.ended()
                at, into = at + got, into[got:]
        return out


@contextmanager
def _opened(file: Path, flags: int) -> Iterator[int]:
    """A file's descriptor, without the buffer and locks of Python's own files."""
    number = os.open(file, flags | os.O_CLOEXEC)
    try:
        yield number
    finally:
        os.close(number)


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
        text = handle.read(length)
    try:
        header = json.loads(text)
        tensors = {
            name: _described(file, name, entry, 8 + length) for name, entry in header.items() if name != "__metadata__"
        }
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, KeyError, TypeError) as err:
        raise ValueError(f"{file} is not a safetensors file ({type(err).__name__}: {err}); fetch it again") from err
    expected = max((tensor.stop for tensor in tensors.values()), default=8 + length)
    if size < expected:
        raise ValueError(f"{file} is truncated: it has {size} bytes, its header promises {expected}; fetch it again")
    return tensors


def _described(file: Path, name: str, entry: Any, first: int) -> StoredTensor:
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"{file}: tensor {name} is stored as {entry['dtype']}; readable are {', '.join(DTYPES)}")
    start, stop = entry["data_offsets"]
    dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
    if start < 0 or stop - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{file} is corrupt: {name} has shape {list(shape)} and {stop - start} bytes; fetch it again")
    return StoredTensor(file, dtype, shape, first + start, first + stop)


def begin_file(
    file: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]
) -> dict[str, StoredTensor]:
    """Make a safetensors file of its full length whose values are not written yet (`StoredTensor.put` writes them)."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8
    first = 8 + len(text)
    with file.open("wb") as handle:
        handle.write(struct.pack("<Q", len(text)) + text)
    os.truncate(file, first + offset)
    places = {name: [first + at for at in header[name]["data_offsets"]] for name in tensors}
    return {name: StoredTensor(file, *tensors[name], *places[name]) for name in tensors}
