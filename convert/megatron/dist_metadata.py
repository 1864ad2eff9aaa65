"""The `.metadata` of a `torch_dist` checkpoint: a pickle, read without making any object or running any code it names.

It holds torch.distributed.checkpoint's own dataclasses (names, shapes, places in files) and Megatron's notes beside
them; each becomes a record of its fields. A class from anywhere else is refused.
"""

import pickle
import re
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

RECORDED = ("torch.distributed.", "torch.serialization", "megatron.", "pathlib")
"""Modules whose classes become records."""
PLAIN = {
    ("torch", "Size"): tuple,
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "set"): set,
    ("builtins", "slice"): slice,
}
DAMAGED = (pickle.UnpicklingError, EOFError, AttributeError, IndexError, KeyError, TypeError, ValueError,
           OverflowError, MemoryError)  # fmt: skip
"""What an unpickler raises on bytes that are no pickle."""


class _Record:
    """The fields of an object under their names; what it was made from and its state, where that has no names."""

    def __new__(cls, *args: object) -> "_Record":
        record = super().__new__(cls)
        record.__dict__["values"] = args
        return record

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {"values": state})


class _Reader(pickle.Unpickler):
    """Makes records and plain values, and nothing else."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)
        self._kinds: dict[str, type] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in PLAIN:
            return PLAIN[module, name]
        if module == "torch" and re.fullmatch(r"\w+", name):
            found = getattr(torch, name, None)
            if isinstance(found, torch.dtype):
                return found
        if module.startswith(RECORDED):
            return self._kinds.setdefault(name, type(name, (_Record,), {}))  # its own, which the file may write on
        raise _Refused(f"{module}.{name}")


class _Refused(Exception):
    """A class that is not admitted."""


@dataclass(frozen=True)
class Place:
    """Bytes [start, stop) of a file."""

    file: Path
    start: int
    stop: int


@dataclass(frozen=True)
class Part:
    """A part of a tensor that is a rectangle in every dim, and where `torch.save` put it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    place: Place


@dataclass(frozen=True)
class Noted:
    """A tensor as the metadata has it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: tuple[Part, ...]


def read_metadata(folder: Path) -> tuple[dict[str, Noted], dict[str, Place]]:
    """The tensors and the other objects of a checkpoint, by name, and where they lie.

    Raises:
        ValueError: the metadata is damaged or holds something else, or a file is missing or too short.
    """
    file = folder / ".metadata"
    try:
        with file.open("rb") as handle:
            content = _Reader(handle).load()
    except _Refused as err:
        raise ValueError(
            f"{file} holds {err}, which is no part of a checkpoint's metadata and could run code when read; it is "
            "refused. Save the checkpoint again with Megatron's own --ckpt-format torch_dist."
        ) from err
    except DAMAGED as err:
        raise ValueError(f"{file} is damaged ({type(err).__name__}: {err}); fetch it again") from err
    try:
        return _understood(folder, content)
    except (AttributeError, KeyError, IndexError, TypeError) as err:
        raise ValueError(f"{file} is no metadata of torch.distributed.checkpoint ({err}); fetch it again") from err


def _understood(folder: Path, content: Any) -> tuple[dict[str, Noted], dict[str, Place]]:
    lengths = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}
    places: dict[str, dict[tuple[int, ...], Place]] = {}
    for index, info in content.storage_data.items():
        place = _place(folder, lengths, index.fqn, info)
        places.setdefault(index.fqn, {})[tuple(getattr(index, "offset", None) or ())] = place
    tensors: dict[str, Noted] = {}
    objects: dict[str, Place] = {}
    for name, entry in content.state_dict_metadata.items():
        found = places.get(name, {})
        if type(entry).__name__ == "BytesStorageMetadata":
            objects.update((name, place) for place in found.values())
            continue
        parts = []
        for chunk in entry.chunks:
            offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
            if offsets not in found:
                raise ValueError(f"{folder / '.metadata'}: {name} has no place for its part at {list(offsets)}")
            parts.append(Part(offsets, sizes, found[offsets]))
        kept = vars(entry.properties)
        dtype = kept.get("dtype") or kept["values"][0]
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"{name} has {dtype!r} for a dtype")
        tensors[name] = Noted(dtype, tuple(entry.size), tuple(parts))
    return tensors, objects


def _place(folder: Path, lengths: dict[str, int], name: str, info: Any) -> Place:
    file, start, stop = str(info.relative_path), int(info.offset), int(info.offset) + int(info.length)
    if getattr(info, "transform_descriptors", None):
        raise ValueError(f"{folder / file}: {name} is stored as {info.transform_descriptors}; save it uncompressed")
    if file not in lengths:
        raise ValueError(f"{folder / file} is missing, {name} lies in it; fetch the checkpoint again")
    if start < 0 or stop < start or stop > lengths[file]:
        raise ValueError(
            f"{folder / file} is truncated: it has {lengths[file]} bytes, {name} ends at byte {stop}; fetch it again"
        )
    return Place(folder / file, start, stop)
