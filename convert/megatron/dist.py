"""A `torch_dist` checkpoint of Megatron opened: its parts, cut by whatever run wrote them, as Hugging Face tensors."""

import io
import itertools
import math
import re
from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch.distributed.checkpoint.utils import _create_file_view  # pyright: ignore[reportPrivateUsage]

from convert.boxes import Box, Pieces
from convert.megatron.dist_metadata import Noted, Part, Place, read_metadata
from convert.megatron.dist_names import Global, globals_of
from convert.megatron.dist_writing import begin_dist
from convert.megatron.fitting import is_ignored, metas_of, refuse_other_tensors, refuse_values, tell_left_out
from convert.megatron.layout import Layout
from convert.megatron.rank_files import RankFile, Strided, read_objects
from convert.megatron.reading import HF_FILES, find_folder, understood, with_config
from convert.opened import Opened
from convert.stored import StoredTensor
from models.config import ModelConfig

__all__ = ["Blob", "begin_dist", "open_dist"]

COMMON = "common_state/shard_0_1"
"""The object that newer versions of Megatron keep in place of the file common.pt."""
OPTIMIZER = re.compile(r"(chained_\d+\.)?optimizer\.")
"""Tensors that training adds beside the model's."""


@dataclass(frozen=True)
class Blob:
    """A part of a tensor as `torch.save` wrote it into a file. Where in the file its values are is found when asked."""

    dtype: torch.dtype
    part: Part
    shape: tuple[int, ...]
    """Its shape seen as rows of Hugging Face tensors."""

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop): [stop - start, columns], or [stop - start] of a vector.

        Raises:
            ValueError: the file is damaged.
        """
        return self._stored.rows(start, stop)

    @cached_property
    def _stored(self) -> StoredTensor | Strided:
        place, sizes = self.part.place, self.part.sizes
        try:
            with place.file.open("rb") as handle:
                view = _create_file_view(handle, place.start, place.stop - place.start)
                found = torch.load(cast(IO[bytes], view), map_location="meta", weights_only=True)
        except Exception as err:  # torch raises all kinds on damaged bytes
            raise ValueError(f"{self._told} is damaged ({type(err).__name__}); fetch it again") from err
        if not isinstance(found, torch.Tensor) or (found.dtype, tuple(found.shape)) != (self.dtype, sizes):
            raise ValueError(f"{self._told} is not {list(sizes)} of {self.dtype}, as .metadata says; fetch it again")
        size = self.dtype.itemsize
        begin = found.untyped_storage()._checkpoint_offset
        assert begin is not None, "torch notes where the values are that it has left out"
        first = place.start + begin + int(found.storage_offset()) * size
        if found.is_contiguous():
            stop = first + found.numel() * size
            if stop > place.stop:
                raise ValueError(f"{self._told} is damaged: its values end behind its end; fetch it again")
            return StoredTensor(place.file, self.dtype, self.shape, first, stop)
        strides = tuple(stride for stride, n in zip(found.stride(), sizes, strict=True) if n > 1)
        shape = tuple(n for n in sizes if n > 1)
        if shape != self.shape:
            raise ValueError(f"{self._told} is stored with strides {found.stride()}, which is not read; save it again")
        return Strided(place.file, self.dtype, shape, strides, first)

    @property
    def file(self) -> Path:
        """The file it lies in."""
        return self.part.place.file

    @property
    def _told(self) -> str:
        place = self.part.place
        return f"{place.file} (bytes {place.start} to {place.stop})"


def open_dist(path: str | Path, files: Path | None = None) -> Opened:
    """A checkpoint of format torch_dist: the folder --save wrote to, or one of its iter_*/release folders.

    Args:
        files: a folder with the model's config.json, where it is not the one kept in the checkpoint.

    Raises:
        ValueError: no such checkpoint, a file damaged, truncated or with unsafe content, or tensors that are not what
            the args inside say.
    """
    path = Path(path)
    root, folder = find_folder(path)
    tensors, objects = read_metadata(folder)
    common = _common(folder, objects)
    cfg, layout = understood(common)
    kept = files or root / HF_FILES
    cfg = with_config(kept, cfg, layout, common)
    layout = _as_saved(layout, common.args)
    pieces = _fitting(folder, cfg, layout, tensors)
    layout = _as_padded(cfg, layout, tensors)
    found = Pieces(metas_of(cfg, pieces), pieces)
    return Opened(path, "torch_dist", cfg, found, kept if kept.is_dir() else None, layout)


def _common(folder: Path, objects: Mapping[str, Place]) -> RankFile:
    """What a checkpoint holds beside tensors: args and version."""
    file = folder / "common.pt"
    if file.is_file():
        content = read_objects(file, file)
    elif COMMON in objects:
        place = objects[COMMON]
        with place.file.open("rb") as handle:
            handle.seek(place.start)
            listed = read_objects(io.BytesIO(handle.read(place.stop - place.start)), place.file)
        file, content = place.file, listed[0] if isinstance(listed, list) and listed else listed
    else:
        raise ValueError(
            f"{folder} does not say how its model is made: it has neither common.pt nor {COMMON} in .metadata; "
            "fetch it again"
        )
    args = content.get("args") if isinstance(content, dict) else None
    if not isinstance(args, Namespace | dict):
        raise ValueError(f"{file} does not say how its model is made: it holds no args; fetch the checkpoint again")
    assert isinstance(content, dict)
    version, iteration = float(content.get("checkpoint_version") or 0), int(content.get("iteration") or 0)
    return RankFile(file, args if isinstance(args, dict) else vars(args), version, iteration, 1, {})


def _as_saved(layout: Layout, args: Mapping[str, Any]) -> Layout:
    """The layout with the names that the model had which was saved."""
    local, grouped = args.get("transformer_impl") == "local", bool(args.get("moe_grouped_gemm", True))
    return replace(
        layout,
        implementation="local" if local else "transformer_engine",
        experts="grouped" if grouped else "sequential",
    )


def _as_padded(cfg: ModelConfig, layout: Layout, tensors: Mapping[str, Noted]) -> Layout:
    """The layout with what the embedding's padding says."""
    padded = tensors["embedding.word_embeddings.weight"].shape[0]
    if padded % layout.tp or layout.padded_vocab(cfg.vocab_size) == padded:
        return layout
    return replace(layout, vocab_multiple=padded // layout.tp)


def _fitting(
    folder: Path, cfg: ModelConfig, layout: Layout, tensors: Mapping[str, Noted]
) -> list[tuple[Blob, list[Box]]]:
    """What lies where, after every tensor that the model has was found with its shape, whole, and no other."""
    missing: list[str] = []
    unequal: list[str] = []
    pieces: list[tuple[Blob, list[Box]]] = []
    left = dict(tensors)
    for tensor in globals_of(cfg, layout, stacked=not any(name.startswith("decoder.layers.0.") for name in tensors)):
        name = next((name for name in tensor.names if name in left), None)
        if name is None:
            missing.append(tensor.names[0])
            continue
        noted = left.pop(name)
        if not _has_shape(tensor, noted, cfg.vocab_size):
            unequal.append(f"{name}: {list(noted.shape)} in the file, {list(tensor.shape)} by the args")
        elif (problem := _not_whole(tensor, noted)) is not None:
            raise ValueError(f"{folder / '.metadata'}: {name} {problem}; fetch the checkpoint again")
        else:
            for part in noted.parts:
                blob = Blob(noted.dtype, part, tensor.rows_shape(part.sizes))
                if not tensor.wholes[0].segments:
                    refuse_values(name, blob, blob.shape[0])
                pieces.append((blob, tensor.boxes(part.offsets, part.sizes)))
    unused = [name for name in left if not OPTIMIZER.match(name)]
    refuse_other_tensors(folder, cfg, missing, unequal, [name for name in unused if not is_ignored(name)])
    tell_left_out(folder, unused)
    return pieces


def _has_shape(tensor: Global, noted: Noted, vocab_size: int) -> bool:
    if tensor.is_vocabulary and len(noted.shape) == len(tensor.shape):
        return noted.shape[0] >= vocab_size and noted.shape[1:] == tensor.shape[1:]
    return noted.shape == tensor.shape


def _not_whole(tensor: Global, noted: Noted) -> str | None:
    """What is wrong with the parts of a tensor, which must cover it without overlapping."""
    held = 0
    at: dict[tuple[int, ...], list[Part]] = {}
    for part in noted.parts:
        if len(part.sizes) != len(noted.shape) or any(
            a < 0 or n < 1 or a + n > size for a, n, size in zip(part.offsets, part.sizes, noted.shape, strict=False)
        ):
            return f"has a part of {list(part.sizes)} at {list(part.offsets)}, outside of {list(noted.shape)}"
        held += math.prod(part.sizes)
        for index in _stacked(tensor, part):
            at.setdefault(index, []).append(part)
    for parts in at.values():
        for one, other in itertools.combinations(parts, 2):
            if all(a < b + m and b < a + n for a, n, b, m in _spans(one, other)):
                return f"has two parts for the same place, at {list(one.offsets)} and {list(other.offsets)}"
    whole = math.prod(noted.shape)
    return None if held == whole else f"is not whole: {held} of {whole} elements are there"


def _stacked(tensor: Global, part: Part) -> Iterator[tuple[int, ...]]:
    """Which of the stacked layers and experts a part is of."""
    lead = len(tensor.lead)
    spans = zip(part.offsets[:lead], part.sizes[:lead], strict=True)
    return itertools.product(*(range(a, a + n) for a, n in spans))


def _spans(one: Part, other: Part) -> Iterator[tuple[int, int, int, int]]:
    return zip(one.offsets, one.sizes, other.offsets, other.sizes, strict=True)
