"""A model as a Hugging Face folder: config.json, safetensors, generation config, tokenizer."""

import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch

from convert.boxes import Tensors
from convert.from_hf import hf_shapes, weight_rules
from convert.hf_files import SHARD_BYTES, SafetensorsWriter
from convert.hf_folder_files import copy_files, has_tokenizer, write_config
from convert.stored import StoredTensor
from models import build
from models.config import ModelConfig
from models.rules import Rule


def export(
    folder: str | Path,
    cfg: ModelConfig,
    tensors: Iterable[tuple[str, torch.Tensor]] | Tensors,
    tokenizer_folder: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
) -> Path:
    """Write a folder that `AutoModelForCausalLM.from_pretrained` loads. It appears under its name when complete.

    Args:
        tensors: our names with whole tensors, each once, in any order, taken one at a time; or those of an opened
            checkpoint, read one by one.
        tokenizer_folder: where the tokenizer's files, special token ids and generation config are copied from.
        dtype: of the written weights.
        shard_bytes: largest weight file.
        overwrite: replace a folder that holds an earlier export.

    Returns:
        The folder.

    Raises:
        ValueError: the folder is in use, the disk is full, or the tokenizer's folder has no tokenizer.
    """
    folder = Path(folder).absolute()
    _check_target(folder, overwrite)
    if tokenizer_folder is not None and not has_tokenizer(tokenizer_folder):
        raise ValueError(
            f"{tokenizer_folder} has no tokenizer (tokenizer.json); give the folder the run took its tokenizer from"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    temp = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        _write_weights(temp, cfg, tensors, dtype, shard_bytes)
        if tokenizer_folder is not None:
            copy_files(tokenizer_folder, temp)
        write_config(temp, cfg, dtype, tokenizer_folder)
        temp.chmod(0o755)
        _replace(temp, folder)
    finally:
        shutil.rmtree(temp, ignore_errors=True)
    return folder


def _check_target(folder: Path, overwrite: bool) -> None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a new folder for the export")
    if not overwrite:
        raise ValueError(
            f"{folder} already holds something; give a new folder, or ask for it to be replaced (overwrite)"
        )
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} is not an earlier export (it has no config.json), so it is not replaced; give a new folder"
        )


def _replace(temp: Path, folder: Path) -> None:
    """Put `temp` in the place of `folder`; an earlier export stays until the new one is there."""
    if not folder.exists():
        os.rename(temp, folder)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
    os.rename(folder, old / folder.name)
    os.rename(temp, folder)
    shutil.rmtree(old)


def begin(folder: Path, cfg: ModelConfig, dtype: torch.dtype, tokenizer_folder: str | Path | None) -> None:
    """Write an export into an empty folder but for the values of its tensors: the files have their full length, and
    `put` writes into them, from as many processes as like.

    Raises:
        ValueError: the disk is full.
    """
    _writer(folder, cfg, dtype, SHARD_BYTES)
    if tokenizer_folder is not None:
        copy_files(tokenizer_folder, folder)
    write_config(folder, cfg, dtype, tokenizer_folder)


def put(stored: Mapping[str, StoredTensor], rule: Rule, tensor: torch.Tensor) -> None:
    """Write one of our tensors, whole, into the files of an export that was begun.

    Raises:
        ValueError: the disk is full.
    """
    for hf, values in rule.to_hf(tensor).items():
        stored[hf].put(0, values.reshape(-1, *stored[hf].row_shape))


def _writer(folder: Path, cfg: ModelConfig, dtype: torch.dtype, shard_bytes: int) -> SafetensorsWriter:
    rules, _ = weight_rules(cfg)
    # A router's correction bias moves by steps that bf16 rounds away: it stays fp32, as in published checkpoints.
    exact = {name for buffer, _ in build(cfg).named_buffers() for name in rules[buffer].sources}
    return SafetensorsWriter(folder, hf_shapes(cfg), dtype, shard_bytes, exact)


def _write_weights(
    folder: Path,
    cfg: ModelConfig,
    tensors: Iterable[tuple[str, torch.Tensor]] | Tensors,
    dtype: torch.dtype,
    shard_bytes: int,
) -> None:
    writer = _writer(folder, cfg, dtype, shard_bytes)
    for hf, tensor in _in_their_names(tensors, weight_rules(cfg)[0]):
        writer.put(hf, tensor)
    writer.finish()


def _in_their_names(
    tensors: Iterable[tuple[str, torch.Tensor]] | Tensors, rules: Mapping[str, Rule]
) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(tensors, Iterable):
        for ours, tensor in tensors:
            yield from rules[ours].to_hf(tensor).items()
        return
    for hf, meta in tensors.metas.items():
        rows = math.prod(meta.shape[:-1] if len(meta.shape) > 1 else meta.shape)
        yield hf, tensors.rows(hf, 0, rows).view(meta.shape)
