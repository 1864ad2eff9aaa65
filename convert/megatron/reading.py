"""A Megatron checkpoint of one file a rank, opened: found, understood from its args, every name and shape checked."""

import dataclasses
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch

from convert.megatron.args import OWN, from_args, to_args
from convert.megatron.args_from import describe
from convert.megatron.fitting import first_lines, fitting, one_by_one
from convert.megatron.given import Given
from convert.megatron.layout import Layout, Rank
from convert.megatron.rank_files import CHECKPOINT_VERSION, RankFile, read_torch_file
from convert.megatron.safe_files import read_safetensors_file
from convert.megatron.writing import FILES, TRACKER
from convert.opened import Opened
from convert.same_model import differing, flat
from models import config_from_hf_folder
from models.config import ModelConfig

READ = {"torch": read_torch_file, "safetensors": read_safetensors_file}
HF_FILES = "huggingface"
"""The folder in a checkpoint that keeps the Hugging Face files the weights came with."""


def open_megatron(path: str | Path, files: Path | None = None) -> Opened:
    """A checkpoint of format torch or safetensors: the folder --save wrote to, or one of its iter_*/release folders.

    Args:
        files: a folder with the model's config.json, where it is not the one kept in the checkpoint.

    Raises:
        ValueError: no such checkpoint, a file truncated, corrupt or with unsafe content, ranks missing, or tensors that
            are not what the args inside say.
    """
    path = Path(path)
    root, folder = find_folder(path)
    form, name = _format(folder)
    first = READ[form](next(iter(sorted(folder.glob(f"mp_rank_*/{name}")))))
    cfg, layout = understood(first)
    read = {rank: READ[form](file) for rank, file in _rank_files(folder, layout, name).items()}
    for file in read.values():
        if (file.iteration, *understood(file)) != (first.iteration, cfg, layout):
            raise ValueError(
                f"{first.file} and {file.file} are not of one checkpoint: their iterations or args say different "
                "things of the model or its layout; copy the folder again"
            )
        if file.chunks != layout.vpp:
            raise ValueError(
                f"{file.file} holds {file.chunks} chunks of the model (model, or model0 ...), but its args cut each "
                f"pipeline rank into {layout.vpp}; copy it again from where it was written"
            )
    kept = files or root / HF_FILES
    cfg = with_config(kept, cfg, layout, first)
    layout = _as_named(cfg, layout, read)
    pieces = fitting(folder, cfg, layout, {rank: one_by_one(file.tensors, cfg, layout) for rank, file in read.items()})
    return Opened(path, form, cfg, pieces, kept if kept.is_dir() else None, layout)


def find_folder(path: Path) -> tuple[Path, Path]:
    """The root of a Megatron checkpoint and its iter_*/release folder, `path` being either.

    Raises:
        ValueError: there is none, or several and nothing says which.
    """
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder; give the folder of a Megatron checkpoint (with {TRACKER})")
    if re.fullmatch(r"iter_\d+|release", path.name):
        return path.parent, path
    if _rank_folders(path) or (path / ".metadata").is_file():
        return path, path
    tracker = path / TRACKER
    if tracker.is_file():
        word = tracker.read_text(encoding="utf-8", errors="replace").strip()
        if word != "release" and not word.isdecimal():
            raise ValueError(f"{tracker} says {word[:40]!r}, which is neither a number nor 'release'; correct it")
        folder = path / (word if word == "release" else f"iter_{int(word):07d}")
        if not folder.is_dir():
            raise ValueError(f"{tracker} says {word}, but there is no folder {folder}; fetch it, or correct the file")
        return path, folder
    found = sorted(p for p in path.iterdir() if p.is_dir() and re.fullmatch(r"iter_\d+|release", p.name))
    if len(found) == 1:
        return path, found[0]
    if found:
        names = ", ".join(p.name for p in found)
        raise ValueError(f"{path} has no {TRACKER} and holds {names}; give the path of one of them")
    why = "it holds no iter_* or release folder"
    if (path / "config.json").is_file():
        why = "it has a config.json, as Hugging Face folders do: give it where one of those is asked for"
    raise ValueError(f"{path} is no Megatron checkpoint: {why}")


def _rank_folders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("mp_rank_*") if p.is_dir())


def _format(folder: Path) -> tuple[Literal["torch", "safetensors"], str]:
    ranks = _rank_folders(folder)
    if not ranks:
        if (folder / ".metadata").is_file() or (folder / "metadata.json").is_file():
            raise ValueError(f"{folder} is of format torch_dist, not torch or safetensors")
        raise ValueError(f"{folder} holds no mp_rank_* folder, so no checkpoint of format torch or safetensors")
    held = [form for form in FILES if any((rank / FILES[form]).is_file() for rank in ranks)]
    if len(held) != 1:
        files = " and ".join(FILES.values())
        inside = ", ".join(sorted(p.name for p in ranks[0].iterdir())[:5]) or "nothing"
        which = f"both {files}: remove one" if held else f"neither {files} ({ranks[0].name} holds {inside})"
        raise ValueError(f"the mp_rank_* folders in {folder} hold {which}")
    return ("torch" if held[0] == "torch" else "safetensors"), FILES[held[0]]


def understood(file: RankFile) -> tuple[ModelConfig, Layout]:
    """The model and layout that a file's args describe.

    Raises:
        ValueError: they describe nothing that is computed here, or fused tensors have the order of old checkpoints.
    """
    if file.checkpoint_version < CHECKPOINT_VERSION:
        raise ValueError(
            f"{file.file}: checkpoint_version is {file.checkpoint_version or 'missing'}, and before 3.0 Megatron "
            "ordered the rows of query, key and value otherwise; load it with the Megatron that wrote it or a newer "
            "one, which puts them in order, and save it again"
        )
    try:
        return from_args(file.args)
    except ValueError as err:
        raise ValueError(f"{file.file}: {err}") from err


def _rank_files(folder: Path, layout: Layout, name: str) -> dict[Rank, Path]:
    """The file of every rank of a layout, all there and no others."""
    files = {rank: folder / layout.folder(rank) / name for rank in layout.ranks()}
    sizes = f"tp={layout.tp}, pp={layout.pp}, ep={layout.ep}"
    missing = [f"{file.parent.name}/{name}" for file in files.values() if not file.is_file()]
    if missing:
        raise ValueError(
            f"{folder}: {len(missing)} of {len(files)} files are missing for {sizes}, as the args inside say:"
            f"{first_lines(missing)}\nfetch them"
        )
    known = {file.parent for file in files.values()}
    others = [rank.name for rank in _rank_folders(folder) if rank not in known]
    if others:
        raise ValueError(
            f"{folder}: {len(others)} folders are of no rank of {sizes}, as the args inside say:{first_lines(others)}\n"
            "remove them if they belong to another checkpoint"
        )
    return files


def with_config(folder: Path, cfg: ModelConfig, layout: Layout, file: RankFile) -> ModelConfig:
    """The config kept beside a checkpoint, which knows more than args; it must be of the model that `file` describes.

    Where none is kept: `cfg`, with a warning if nothing says which rows of the vocabulary are padding.

    Raises:
        ValueError: it is of another model; names the fields.
    """
    if not (folder / "config.json").is_file():
        if file.args.get("vocab_size") != cfg.vocab_size:
            warnings.warn(
                f"{folder.parent} does not say how many of its {cfg.vocab_size} rows of the vocabulary are padding; "
                f"all are kept. Put the model's config.json into {folder} to have them cut off",
                stacklevel=3,
            )
        return cfg
    kept = config_from_hf_folder(folder)
    said, same = cfg, kept
    if OWN not in file.args:  # only what Megatron's own arguments can say of it
        said, same = (describe(Given(args))[0] for args in (file.args, to_args(kept, layout, torch.float32)))
    other = set(differing(said, same)) - {"max_seq_len"}  # which training may choose
    if file.args.get("vocab_size") != said.vocab_size >= kept.vocab_size:
        other -= {"vocab_size"}  # args say how many rows there are with padding
    if other:
        here, there = flat(said), flat(same)
        lines = [f"{key}: {here.get(key)} in args, {there.get(key)} in config.json" for key in sorted(other)]
        raise ValueError(
            f"{folder / 'config.json'} is of another model than the args in {file.file}:{first_lines(lines)}\n"
            f"correct it, or leave {folder} out to go by the args alone"
        )
    return kept


def _as_named(cfg: ModelConfig, layout: Layout, files: Mapping[Rank, RankFile]) -> Layout:
    """The layout with what the tensors' names and the embedding's padding say."""
    names = {name for file in files.values() for _, name in file.tensors}
    fused = any(name.endswith(".layer_norm_weight") for name in names)
    experts = layout.experts
    if cfg.moe is not None:
        experts = "sequential" if any(".experts.local_experts." in name for name in names) else "grouped"
    first = files[Rank(0, 0, 0)]
    embedding = first.tensors.get((0, "embedding.word_embeddings.weight"))
    padded = int(first.args.get("padded_vocab_size") or 0) or (embedding.shape[0] * layout.tp if embedding else 0)
    multiple = layout.vocab_multiple
    if padded >= cfg.vocab_size and padded % layout.tp == 0 and layout.padded_vocab(cfg.vocab_size) != padded:
        multiple = padded // layout.tp
    return dataclasses.replace(
        layout,
        implementation="transformer_engine" if fused else "local",
        experts=experts,
        vocab_multiple=multiple,
    )
