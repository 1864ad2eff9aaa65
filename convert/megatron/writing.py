"""Megatron checkpoints of one file a rank, begun: every folder and file there at full length, without its values."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from convert.boxes import Meta, Pieces
from convert.megatron.layout import Layout, Rank
from convert.megatron.rank_files import Found, Key, begin_torch_file
from convert.megatron.safe_files import begin_safetensors_file
from convert.megatron.shards import Local, locals_of
from convert.stored import StoredTensor
from models.config import ModelConfig

TRACKER = "latest_checkpointed_iteration.txt"
FILES = {"torch": "model_optim_rng.pt", "safetensors": "model_optim_rng.safetensors"}
"""The name of each rank's file, by format."""

Begin = Callable[[Path, Sequence[Mapping[str, Meta]], Mapping[str, Any]], Mapping[Key, Found]]


def begin_torch(
    root: Path, cfg: ModelConfig, layout: Layout, metas: Mapping[str, Meta], args: Mapping[str, Any]
) -> Pieces[StoredTensor]:
    """Begin a checkpoint in Megatron's `torch` format at `root`, as a release.

    Args:
        root: the checkpoint's folder.
        metas: every Hugging Face tensor with the dtype to write; fused tensors are written as what theirs promote to.
        args: what Megatron calls args (`convert.megatron.args.to_args`).

    Returns:
        The Hugging Face tensors, each row with all its places in the files. What no row goes to is padding and zero.
    """
    return _begin(root, FILES["torch"], begin_torch_file, cfg, layout, metas, args)


def begin_safetensors(
    root: Path, cfg: ModelConfig, layout: Layout, metas: Mapping[str, Meta], args: Mapping[str, Any]
) -> Pieces[StoredTensor]:
    """As `begin_torch`, in safetensors files: the same names, `model{k}/` before them where a rank has chunks."""
    return _begin(root, FILES["safetensors"], begin_safetensors_file, cfg, layout, metas, args)


def _begin(
    root: Path,
    name: str,
    begin: Begin,
    cfg: ModelConfig,
    layout: Layout,
    metas: Mapping[str, Meta],
    args: Mapping[str, Any],
) -> Pieces[StoredTensor]:
    of_rank: dict[Rank, list[Local]] = defaultdict(list)
    for local in locals_of(cfg, layout):
        of_rank[local.rank].append(local)
    pieces = []
    for rank in layout.ranks():
        chunks: list[dict[str, Meta]] = [{} for _ in range(layout.vpp)]
        for local in of_rank[rank]:
            chunks[local.chunk][local.name] = Meta(local.whole.dtype(metas), local.shape)
        file = root / "release" / layout.folder(rank) / name
        file.parent.mkdir(parents=True, exist_ok=True)
        places = begin(file, chunks, args)
        for local in of_rank[rank]:
            place = places[local.chunk, local.name]
            assert isinstance(place, StoredTensor)
            pieces.append((place, local.boxes))
    (root / TRACKER).write_text("release", encoding="utf-8")
    return Pieces(metas, pieces)
