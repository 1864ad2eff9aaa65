"""Whether the tensors found in the files of a Megatron checkpoint are those of its model; Megatron's own check is not
enough: where names are wrong it loads what fits, says so in a line of the log and trains on random weights."""

import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch

from convert.boxes import Box, Lying, Meta, Pieces
from convert.from_hf import hf_shapes
from convert.megatron.layout import Layout, Rank
from convert.megatron.rank_files import Found, Key, Strided
from convert.megatron.shards import locals_of
from convert.stored import StoredTensor
from models.config import ModelConfig

SHOWN = 5
IGNORED = ("_extra_state", "inv_freq")
"""How names end that hold no weights: states of Transformer Engine; rotary frequencies, which the config gives."""


class InFile(Protocol):
    """A tensor that lies in a file."""

    @property
    def file(self) -> Path:
        """Which."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Its dtype."""
        ...


def one_by_one(tensors: Mapping[Key, Found], cfg: ModelConfig, layout: Layout) -> dict[Key, Found]:
    """A rank's tensors; experts of Megatron's former GroupedMLP, stacked and transposed, as one matrix each.

    `weight1` is in memory a stack of experts [D, 2F / tp] and `weight2` one of [F / tp, D], whatever shapes they say.
    """
    each = cfg.moe.num_experts // layout.ep if cfg.moe else 1
    found: dict[Key, Found] = {}
    for (chunk, name), tensor in tensors.items():
        match = re.fullmatch(r"(.*\.mlp\.experts\.)weight([12])", name)
        if match is None or not isinstance(tensor, StoredTensor) or len(tensor.shape) != 2:
            found[chunk, name] = tensor
            continue
        rows, columns = cfg.hidden_size, tensor.shape[1] // each  # of an expert, as it lies in the file
        if match[2] == "2":
            rows, columns = tensor.shape[0] // each, tensor.shape[1]
        size = rows * columns * tensor.dtype.itemsize
        for expert in range(each):
            turned = Strided(tensor.file, tensor.dtype, (columns, rows), (1, columns), tensor.start + expert * size)
            found[chunk, f"{match[1]}linear_fc{match[2]}.weight{expert}"] = turned
    return found


def fitting(folder: Path, cfg: ModelConfig, layout: Layout, found: Mapping[Rank, Mapping[Key, Found]]) -> Pieces[Found]:
    """The Hugging Face tensors in the files, after each tensor the model has was found with its shape, and no other.

    Raises:
        ValueError: tensors are missing, have another shape or have no place in the model; names five of each.
    """
    pieces: list[tuple[Found, tuple[Box, ...]]] = []
    missing: list[str] = []
    unequal: list[str] = []
    left = {rank: dict(tensors) for rank, tensors in found.items()}
    for local in locals_of(cfg, layout):
        key = (local.chunk, local.name)
        tensor = left[local.rank].pop(key, None)
        if tensor is None:
            missing.append(_called(layout, local.rank, key))
        elif tensor.shape != local.shape:
            sizes = f"{list(tensor.shape)} in the file, {list(local.shape)} by the args"
            unequal.append(f"{_called(layout, local.rank, key)}: {sizes}")
        else:
            if not local.whole.segments:
                refuse_values(_called(layout, local.rank, key), tensor, math.prod(local.shape))
            pieces.append((tensor, local.boxes))
    unused = [(rank, key) for rank, tensors in left.items() for key in tensors]
    ignored = [key[1] for _, key in unused if is_ignored(key[1])]
    unknown = [_called(layout, rank, key) for rank, key in unused if not is_ignored(key[1])]
    refuse_other_tensors(folder, cfg, missing, unequal, unknown)
    tell_left_out(folder, ignored)
    return Pieces(metas_of(cfg, pieces), pieces)


def refuse_other_tensors(
    folder: Path, cfg: ModelConfig, missing: Sequence[str], unequal: Sequence[str], unknown: Sequence[str]
) -> None:
    """Raise the ValueError that names these tensors, five of each kind; nothing where there are none."""
    problems = [
        f"{len(lines)} tensors {what}:{first_lines(lines)}"
        for lines, what in (
            (missing, "are missing"),
            (unequal, "have another shape"),
            (unknown, "have no place in the model"),
        )
        if lines
    ]
    if problems:
        raise ValueError(
            f"the weights in {folder} are not those of the model that the args inside describe (family {cfg.family}, "
            f"{cfg.num_layers} layers, hidden size {cfg.hidden_size}):\n" + "\n".join(problems)
        )


def refuse_values(name: str, tensor: Lying, rows: int) -> None:
    """Raise a ValueError where a bias that the model does not have is not zero."""
    if tensor.rows(0, rows).any():
        raise ValueError(
            f"{name} is a bias that the model has no place for, and is not zero; leave out what the args and the kept "
            "config.json say of biases (args.loom, huggingface/), or set these biases to zero"
        )


def tell_left_out(folder: Path, ignored: Iterable[str]) -> None:
    """Warn of tensors that a model here has no place for, the states of Transformer Engine apart."""
    told = sorted({name for name in ignored if not name.endswith("_extra_state")})
    if told:
        warnings.warn(f"{folder}: {len(told)} tensors are left out:{first_lines(told)}", stacklevel=4)


def is_ignored(name: str) -> bool:
    """Whether a tensor is one that a model here has no place for and needs none for."""
    return name.endswith(IGNORED)


def _called(layout: Layout, rank: Rank, key: Key) -> str:
    chunk, name = key
    return f"{layout.folder(rank)}: " + (f"model{chunk} " if layout.vpp > 1 else "") + name


def metas_of(cfg: ModelConfig, pieces: Iterable[tuple[InFile, Iterable[Box]]]) -> dict[str, Meta]:
    """Dtype and shape of each Hugging Face tensor, all of whose rows must be stored alike."""
    of: dict[str, InFile] = {}
    for tensor, boxes in pieces:
        for box in boxes:
            first = of.setdefault(box.hf, tensor)
            if first.dtype != tensor.dtype:
                raise ValueError(
                    f"rows of {box.hf} are stored as {first.dtype} in {first.file} and as {tensor.dtype} in "
                    f"{tensor.file}: these are not files of one checkpoint"
                )
    return {hf: Meta(of[hf].dtype, shape) for hf, shape in hf_shapes(cfg).items()}


def first_lines(lines: Iterable[str]) -> str:
    """The first five lines and how many more there are, to follow a message."""
    listed = list(lines)
    more = [f"... and {len(listed) - SHOWN} more"] if len(listed) > SHOWN else []
    return "".join(f"\n  {line}" for line in listed[:SHOWN] + more)
