"""A Hugging Face folder's weight files, begun: there at full length, values not written yet."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

from convert.boxes import Box, Meta, Pieces
from convert.hf_files import INDEX, SHARD_BYTES, SINGLE
from convert.stored import StoredTensor, begin_file


def begin_hf(folder: Path, metas: Mapping[str, Meta], limit: int = SHARD_BYTES) -> Pieces[StoredTensor]:
    """Make the safetensors files, and the index where there are several.

    Args:
        metas: every tensor, in the order in which they are dealt out.
        limit: most bytes of a file; a larger tensor has a file of its own.
    """
    files: list[dict[str, Meta]] = []
    used = limit
    for hf, meta in metas.items():
        size = math.prod(meta.shape) * meta.dtype.itemsize
        if used + size > limit:
            files.append({})
            used = 0
        files[-1][hf] = meta
        used += size
    count = len(files)
    names = [SINGLE] if count == 1 else [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    stored: dict[str, StoredTensor] = {}
    for name, held in zip(names, files, strict=True):
        described = {hf: (meta.dtype, meta.shape) for hf, meta in held.items()}
        stored |= begin_file(folder / name, described, {"format": "pt"})
    if count > 1:
        total = sum(tensor.stop - tensor.start for tensor in stored.values())
        index = {
            "metadata": {"total_size": total},
            "weight_map": {hf: tensor.file.name for hf, tensor in stored.items()},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return Pieces(metas, [(stored[hf], [Box(hf, 0, _rows(meta), 0)]) for hf, meta in metas.items()])


def _rows(meta: Meta) -> int:
    return math.prod(meta.shape[:-1] if len(meta.shape) > 1 else meta.shape)
