"""A `torch_dist` checkpoint of Megatron, begun at its full size: every part has its place, no value is written yet.

Files in ROOT/release: `__0_N.distcp` (parts of tensors one after another, each as `torch.save` writes it), `.metadata`
(where each lies; torch.distributed.checkpoint's own classes), `common.pt` (the arguments), `metadata.json`.
Source: torch.distributed.checkpoint's `filesystem.py`; Megatron-core's `dist_checkpointing`.
"""

import argparse
import io
import json
import math
import os
import pickle
from collections.abc import Mapping
from contextlib import closing
from functools import cache, reduce
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.filesystem import _StorageInfo  # pyright: ignore[reportPrivateUsage]
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from convert.boxes import Box, Meta, Pieces
from convert.megatron.dist_names import Global, empty_objects, globals_of, stacks_layers
from convert.megatron.layout import Layout
from convert.megatron.writing import TRACKER
from convert.stored import StoredTensor
from models.config import ModelConfig

FILE_BYTES = 4 * 2**30
"""A file that has reached this size gets no further part."""
ALIGN = 64


def begin_dist(
    root: Path, cfg: ModelConfig, layout: Layout, metas: Mapping[str, Meta], args: Mapping[str, Any]
) -> Pieces[StoredTensor]:
    """Make the folder and every file at full length; values are not written yet, and padding is zero.

    Args:
        root: the folder that gets `latest_checkpointed_iteration.txt` and `release/`.
        cfg: the model.
        layout: the sizes it will be loaded at first: parts are cut by `tp`; any layout can load it.
        metas: every Hugging Face tensor with the dtype to write.
        args: Megatron's arguments.

    Returns:
        The Hugging Face tensors as pieces of the files.
    """
    folder = root / "release"
    folder.mkdir(parents=True, exist_ok=True)
    tensors = globals_of(cfg, layout, stacks_layers(args))
    found: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    pieces: list[tuple[StoredTensor, list[Box]]] = []
    with closing(_Files(folder)) as files:
        for tensor in tensors:
            dtype, name = _dtype(tensor, metas), tensor.names[0]
            chunks: list[ChunkStorageMetadata] = []
            for i, (offsets, sizes) in enumerate(tensor.chunks(layout.tp)):
                stored, places[MetadataIndex(name, offsets, i)] = files.add(dtype, sizes, tensor.rows_shape(sizes))
                chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
                pieces.append((stored, tensor.boxes(offsets, sizes)))
            found[name] = TensorStorageMetadata(TensorProperties(dtype), torch.Size(tensor.shape), chunks)
        nothing = files.add_object([None])  # one in the file stands for all of them
        for key in empty_objects(tensors, layout):
            found[key] = BytesStorageMetadata()
            places[MetadataIndex(key)] = nothing
    _write_beside(folder, args, Metadata(found, {key: (key,) for key in found}, places))
    (root / TRACKER).write_text("release", encoding="utf-8")
    return Pieces(metas, pieces)


def _write_beside(folder: Path, args: Mapping[str, Any], metadata: Metadata) -> None:
    common = {"args": argparse.Namespace(**args), "checkpoint_version": 3.0, "iteration": args.get("iteration", 0)}
    torch.save(common, folder / "common.pt")
    backend = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    text = json.dumps(backend | {"common_backend": "torch", "common_backend_version": 1})
    (folder / "metadata.json").write_text(text, encoding="utf-8")
    with (folder / ".metadata").open("wb") as handle:
        pickle.dump(metadata, handle)


def _dtype(tensor: Global, metas: Mapping[str, Meta]) -> torch.dtype:
    return reduce(torch.promote_types, {whole.dtype(metas) for whole in tensor.wholes})


class _Files:
    """Files of a folder that parts are put into one after another, holes where their values go."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files = 0
        self._open()

    def add(
        self, dtype: torch.dtype, sizes: tuple[int, ...], rows_shape: tuple[int, ...]
    ) -> tuple[StoredTensor, _StorageInfo]:
        """A tensor of shape `sizes`, given back as one of shape `rows_shape`."""
        head, tail = frame(dtype, sizes)
        size = math.prod(sizes) * dtype.itemsize
        at = self._place(len(head) + size + len(tail))
        first = at + len(head)
        os.pwrite(self._handle, head, at)
        os.pwrite(self._handle, tail, first + size)
        stored = StoredTensor(self._folder / self._name, dtype, rows_shape, first, first + size)
        return stored, _StorageInfo(self._name, at, len(head) + size + len(tail))

    def add_object(self, content: object) -> _StorageInfo:
        """Anything `torch.save` takes."""
        blob = io.BytesIO()
        torch.save(content, blob)
        at = self._place(blob.tell())
        os.pwrite(self._handle, blob.getvalue(), at)
        return _StorageInfo(self._name, at, blob.tell())

    def close(self) -> None:
        """No further part."""
        os.truncate(self._handle, self._end)
        os.close(self._handle)

    def _place(self, length: int) -> int:
        if self._end >= FILE_BYTES:
            self.close()
            self._open()
        at = -(-self._end // ALIGN) * ALIGN
        self._end = at + length
        return at

    def _open(self) -> None:
        self._name = f"__0_{self._files}.distcp"
        self._files += 1
        self._end = 0
        self._handle = os.open(self._folder / self._name, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)


@cache
def frame(dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[bytes, bytes]:
    """What `torch.save` writes before and behind the bytes of a tensor; its memory is never there."""
    with FakeTensorMode():
        tensor = torch.empty(shape, dtype=dtype)
    out = _Hole()
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save(tensor, cast(IO[bytes], out))
    size = math.prod(shape) * dtype.itemsize
    assert out.skipped == [size], f"torch.save left {out.skipped} bytes out, not {size}"
    return out.before.getvalue(), out.behind.getvalue()


class _Hole(io.RawIOBase):
    """Keeps what is written before and behind the bytes that `torch.save` steps over."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.behind = io.BytesIO(), io.BytesIO()
        self.skipped: list[int] = []

    def write(self, data: Any) -> int:
        return (self.behind if self.skipped else self.before).write(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        assert whence == os.SEEK_CUR, "torch.save steps over a tensor's bytes from where it is"
        self.skipped.append(offset)
        return offset
