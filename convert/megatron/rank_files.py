"""One rank's file of a Megatron checkpoint: a torch.save archive, begun and opened without its values.

What is in one: Megatron-LM's `megatron/training/checkpointing.py` (`generate_state_dict`). A torch.save archive is a
zip whose entries are not compressed; where a storage's bytes lie in it torch tells itself (`skip_data` and
`_checkpoint_offset`: "Serialization semantics" in torch's notes).
"""

import math
import pickle
import struct
import zipfile
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PosixPath
from types import SimpleNamespace
from typing import IO, Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.serialization import (
    add_safe_globals,
    clear_safe_globals,
    get_safe_globals,
    get_unsafe_globals_in_checkpoint,
    safe_globals,
    skip_data,
)

from convert.boxes import Meta
from convert.stored import StoredTensor

CHECKPOINT_VERSION = 3.0
"""Megatron's number of the order of rows in fused tensors; older orders are not read."""

Key = tuple[int, str]
"""Which chunk of the rank's model, and Megatron's name of the tensor in it."""


@dataclass(frozen=True)
class Strided:
    """A vector or matrix in a file whose elements do not lie one after another: a view that was saved as one."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    start: int
    """Where its first element lies, in bytes."""

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) in their own memory, contiguous. The file is mapped, not read as a whole."""
        assert 1 <= len(self.shape) <= 2, f"{self} has no rows"
        last = sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        end = self.start + (last + 1) * self.dtype.itemsize
        mapped = torch.from_file(str(self.file), shared=False, size=end, dtype=torch.uint8)
        values = mapped[self.start :]
        if self.start % self.dtype.itemsize:
            values = values.clone()  # torch sees no elements in bytes that begin between two
        elements = values.view(self.dtype)
        found = elements.as_strided(self.shape, self.strides)[start:stop]
        return found.clone(memory_format=torch.contiguous_format)


Found = StoredTensor | Strided


@dataclass(frozen=True)
class RankFile:
    """What one rank's file says, and where its tensors lie."""

    file: Path
    args: Mapping[str, Any]
    checkpoint_version: float
    iteration: int
    chunks: int
    tensors: Mapping[Key, Found]


def begin_torch_file(file: Path, chunks: Sequence[Mapping[str, Meta]], args: Mapping[str, Any]) -> Mapping[Key, Found]:
    """A torch.save archive of its full length whose values are not written yet (zeros that take no space).

    Its checksums of values are 0, for they are known only later; torch does not look at them.
    """
    with FakeTensorMode():
        states = [{name: torch.empty(meta.shape, dtype=meta.dtype) for name, meta in chunk.items()} for chunk in chunks]
    content = {
        "args": Namespace(**args),
        "checkpoint_version": CHECKPOINT_VERSION,
        "iteration": args.get("iteration", 0),
    }
    with skip_data(materialize_fake_tensors=True):
        torch.save(content | dict(zip(model_keys(len(chunks)), states, strict=True)), file)
    return read_torch_file(file).tensors


def model_keys(chunks: int) -> list[str]:
    """What the weights of each chunk are called in a rank's file."""
    return ["model"] if chunks == 1 else [f"model{k}" for k in range(chunks)]


class StandIn:
    """In place of an object of a class of the file's: takes anything, keeps its fields and does nothing."""

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        if isinstance(state, dict):
            vars(self).update(state)


HARMLESS = (
    "_io.BytesIO",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.ndarray",
    "numpy.dtype",
    "numpy.dtypes.UInt32DType",
    "signal.Signals",
)
"""What Megatron's files hold beside the weights, by name: states of random numbers and of Transformer Engine."""

REAL: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    Namespace,
    SimpleNamespace,
    (PosixPath, "pathlib.PosixPath"),
    (PosixPath, "pathlib._local.PosixPath"),
]


def read_torch_file(file: Path) -> RankFile:
    """A rank's torch.save archive: its objects, and where its tensors lie. No class of the file is ever called.

    Raises:
        ValueError: truncated or corrupt, holds classes other than Megatron's own, or is no Megatron checkpoint.
    """
    storages = _storages(file)
    return _rank_file(file, read_objects(file, file), storages)


def read_objects(source: Path | IO[bytes], file: Path) -> Any:
    """What a torch.save archive holds, tensors without their values. No class it names is ever called.

    Args:
        source: the archive.
        file: the file it is, or lies in, for messages.

    Raises:
        ValueError: it is damaged, or holds classes other than Megatron's own.
    """
    if not zipfile.is_zipfile(source):
        raise ValueError(f"{file} is truncated, corrupt or no archive of torch.save; fetch it again")
    if not isinstance(source, Path):
        source.seek(0)
    with _only([*REAL, *((StandIn, name) for name in HARMLESS)]):
        try:
            unknown = get_unsafe_globals_in_checkpoint(source)
            if not isinstance(source, Path):
                source.seek(0)
            # Megatron's enumerations and options change with its versions; none of its code runs for a stand-in.
            others = sorted(name for name in unknown if not name.startswith("megatron."))
            if others:
                raise ValueError(_why_refused(file, others))
            with safe_globals([(StandIn, name) for name in unknown]):
                return torch.load(source, map_location="meta", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, IndexError, TypeError, AttributeError) as err:
            reason = str(err).strip().splitlines()[0] if str(err).strip() else type(err).__name__
            raise ValueError(
                f"{file} cannot be read without running code that it names, or is corrupt ({reason}); fetch it again, "
                "or load it where it was written and save it with torch.save as tensors and plain values only"
            ) from err


@contextmanager
def _only(classes: list[Any]) -> Iterator[None]:
    """Let torch.load make these and nothing that another library has added (accelerate adds numpy's real ones)."""
    before = get_safe_globals()
    clear_safe_globals()
    add_safe_globals(classes)
    try:
        yield
    finally:
        clear_safe_globals()
        add_safe_globals(before)


def _why_refused(file: Path, classes: list[str]) -> str:
    return (
        f"{file} holds objects of {', '.join(classes[:5])}{' ...' if len(classes) > 5 else ''}, which is not read: "
        "making them would run code from the file. Tensors, plain values and Megatron's own options are read. Load it "
        "with torch.load(..., weights_only=False) in the environment that wrote it, if you trust it, take those "
        "objects out (most are in args) and save it again"
    )


def _rank_file(file: Path, content: object, storages: Mapping[int, int]) -> RankFile:
    if not isinstance(content, dict) or "args" not in content:
        found = ", ".join(map(str, list(content)[:5])) if isinstance(content, dict) else type(content).__name__
        raise ValueError(
            f"{file} is no Megatron checkpoint that says how its model is made and cut: it has no args (found {found})"
        )
    args: Any = content["args"]
    args = args if isinstance(args, dict) else getattr(args, "__dict__", {})
    chunks = 0 if "model" in content else sum(f"model{k}" in content for k in range(len(content)))
    states = [content.get(key) for key in model_keys(chunks or 1)]
    tensors: dict[Key, Found] = {}
    for chunk, state in enumerate(states):
        if not isinstance(state, dict):
            raise ValueError(f"{file} holds no weights: neither model nor model0, model1 ... hold tensors by name")
        for name, tensor in state.items():
            if isinstance(tensor, torch.Tensor):
                tensors[chunk, name] = _place(file, name, tensor, storages)
            elif not name.endswith("_extra_state"):
                raise ValueError(
                    f"{file}: {name} is no tensor but {type(tensor).__name__}; only models of Megatron-core are read "
                    "(a model saved before it has language_model here: convert it with Megatron's own tools first)"
                )
    version, iteration = content.get("checkpoint_version") or 0, content.get("iteration") or 0
    return RankFile(file, args, float(version), int(iteration), len(states), tensors)


def _place(file: Path, name: str, tensor: torch.Tensor, storages: Mapping[int, int]) -> Found:
    """Where the values of a tensor lie that was loaded without them."""
    storage = tensor.untyped_storage()
    size, shape = tensor.dtype.itemsize, tuple(tensor.shape)
    at = int(storage._checkpoint_offset or 0)  # not set on a storage without bytes
    start = at + int(tensor.storage_offset()) * size
    strides = tensor.stride()
    last = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) if tensor.numel() else -1
    if tensor.numel() and start + (last + 1) * size > at + storages.get(at, -1):
        raise ValueError(f"{file} is corrupt: {name} does not lie within a storage of the archive; fetch it again")
    if tensor.is_contiguous():
        return StoredTensor(file, tensor.dtype, shape, start, start + math.prod(shape) * size)
    return Strided(file, tensor.dtype, shape, strides, start)


def _storages(file: Path) -> dict[int, int]:
    """Where the archive's own list says that entries lie: bytes from the start of the file, and their length."""
    try:
        with zipfile.ZipFile(file) as archive, file.open("rb") as handle:
            found = {}
            for entry in archive.infolist():
                if entry.compress_type != zipfile.ZIP_STORED:
                    raise ValueError(f"{file}: {entry.filename} is compressed, which torch.save does not do")
                handle.seek(entry.header_offset + 26)  # the lengths of name and padding before the bytes
                name, padding = struct.unpack("<HH", handle.read(4))
                found[entry.header_offset + 30 + name + padding] = entry.file_size
                if entry.filename.endswith("/byteorder") and archive.read(entry) != b"little":
                    raise ValueError(f"{file} is big-endian; save it again on a little-endian machine")
                if entry.filename.endswith("/data.pkl"):
                    archive.read(entry)  # checks its checksum
            return found
    except (zipfile.BadZipFile, struct.error, EOFError) as err:
        raise ValueError(
            f"{file} is truncated, corrupt or no archive of torch.save ({err}); fetch it again. (One from before "
            "torch 1.6 has to be saved again by a newer torch.)"
        ) from err
