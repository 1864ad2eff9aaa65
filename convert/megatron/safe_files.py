"""One rank's file of a Megatron checkpoint in safetensors: the names and tensors of the torch.save archive, no pickle.

Several chunks of a rank are told apart by `model{k}/` before the names; args are JSON in the header's metadata.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from convert.boxes import Meta
from convert.megatron.rank_files import CHECKPOINT_VERSION, Found, Key, RankFile, model_keys
from convert.stored import begin_file, read_header


def begin_safetensors_file(
    file: Path, chunks: Sequence[Mapping[str, Meta]], args: Mapping[str, Any]
) -> Mapping[Key, Found]:
    """A safetensors file of its full length whose values are not written yet."""
    prefixes = [f"{key}/" if len(chunks) > 1 else "" for key in model_keys(len(chunks))]
    names = {prefix + name: (k, name) for k, prefix in enumerate(prefixes) for name in chunks[k]}
    metas = {stored: chunks[k][name] for stored, (k, name) in names.items()}
    metadata = {
        "args": json.dumps(dict(args), default=_dtype_name),
        "checkpoint_version": str(CHECKPOINT_VERSION),
        "iteration": str(args.get("iteration", 0)),
        "format": "pt",
    }
    tensors = begin_file(file, {stored: (meta.dtype, meta.shape) for stored, meta in metas.items()}, metadata)
    return {names[stored]: tensor for stored, tensor in tensors.items()}


def _dtype_name(value: object) -> str:
    if isinstance(value, torch.dtype):
        return str(value)
    raise TypeError(f"args hold {value!r}, which JSON cannot")


def read_safetensors_file(file: Path) -> RankFile:
    """A rank's safetensors file, from its header.

    Raises:
        ValueError: truncated, corrupt, or without the args that make it Megatron's.
    """
    stored = read_header(file)
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
        args = {key: _value(value) for key, value in json.loads(metadata["args"]).items()}
        version, iteration = float(metadata["checkpoint_version"]), int(metadata["iteration"])
    except SafetensorError as err:
        raise ValueError(f"{file} is not a readable safetensors file ({err}); fetch it again") from err
    except (KeyError, json.JSONDecodeError, AttributeError, ValueError) as err:
        raise ValueError(
            f"{file} does not say how its model is made and cut: its header holds no readable args, checkpoint_version "
            f"and iteration ({type(err).__name__}: {err}); a checkpoint written by Loom does"
        ) from err
    tensors: dict[Key, Found] = {}
    chunks = 1
    for name, tensor in stored.items():
        numbered = re.fullmatch(r"model(\d+)/(.*)", name)
        key = (int(numbered[1]), numbered[2]) if numbered else (0, name)
        chunks = max(chunks, key[0] + 1)
        tensors[key] = tensor
    return RankFile(file, args, version, iteration, chunks, tensors)


def _value(value: Any) -> Any:
    dtype = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else None
    return dtype if isinstance(dtype, torch.dtype) and value == str(dtype) else value
