"""Small models as Hugging Face folders, and the conversion commands run in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from convert import hf_to_mega, mega_to_hf, reshard
from convert.boxes import Tensors
from convert.cli import told
from convert.from_hf import whole_shapes
from convert.hf_files import read_folder
from convert.to_hf import export
from models.config import ModelConfig
from models.init import InitSource
from scripts.params import load_model

ROOT = Path(__file__).resolve().parents[1]
SMOLLM2 = ROOT / "assets" / "smollm2-135m-instruct"
COMMANDS: dict[str, Callable[[Sequence[str] | None], None]] = {
    "hf_to_mega": hf_to_mega.run,
    "mega_to_hf": mega_to_hf.run,
    "reshard": reshard.run,
}


def command(name: str, *words: object) -> int:
    """Run a command here and return its exit code, torch's threads as they were."""
    threads = torch.get_num_threads()
    try:
        return told(COMMANDS[name], [str(word) for word in words])
    except SystemExit as left:  # argparse
        assert isinstance(left.code, int)
        return left.code
    finally:
        torch.set_num_threads(threads)


def tiny(model: str, folder: Path, dtype: torch.dtype = torch.float32) -> ModelConfig:
    """A tiny model with random weights as a Hugging Face folder."""
    cfg = load_model(model, [])
    source = InitSource(cfg, 0)
    export(folder, cfg, ((name, source.tensor(name)) for name in whole_shapes(cfg)), dtype=dtype)
    return cfg


def unequal(a: Path, b: Path) -> list[str]:
    """The tensors of two Hugging Face folders that are not the same bytes of the same dtype and shape."""
    ours, theirs = read_folder(a), read_folder(b)
    names = sorted(set(ours) | set(theirs))
    return [
        name
        for name in names
        if name not in ours or name not in theirs or not same(ours[name].read(), theirs[name].read())
    ]


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are the same bytes of the same dtype and shape."""
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(_bytes(a), _bytes(b))


def rows_unequal(a: Tensors, b: Tensors) -> list[str]:
    """The tensors of two sources that are not the same bytes."""
    return [
        hf
        for hf, meta in a.metas.items()
        if hf not in b.metas or not same(a.rows(hf, 0, meta.shape[0]), b.rows(hf, 0, meta.shape[0]))
    ]


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
