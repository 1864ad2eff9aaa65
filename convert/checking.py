"""Does the output hold what the source holds? Read again with the reader of its format, and once more another way."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from convert.boxes import Meta, Pieces, Tensors
from convert.copying import blocks, each_at_once, total_bytes
from convert.logits import compare_logits
from convert.megatron.copies import check_copies
from convert.opened import Opened
from convert.opening import open_weights
from convert.output import size
from convert.rebuilding import check_rebuilt
from convert.same_model import differing

SHOWN = 5


def verify(
    source: Opened,
    folder: Path,
    metas: Mapping[str, Meta],
    workers: int,
    moved: Callable[[int], object] = lambda count: None,
    say: Callable[[str], object] = print,
) -> None:
    """Compare a converted checkpoint with what it was made from, and say what was found.

    Args:
        source: what was converted.
        folder: the output.
        metas: every tensor with the dtype it was asked to have.
        workers: tensors compared at once.
        moved: told the bytes of each block compared (once, not for both sides).
        say: told each check with its numbers.

    Raises:
        ValueError: a difference; names it.
    """
    output = open_weights(folder)
    other = differing(source.cfg, output.cfg)
    if other:
        raise ValueError(f"the config of the output differs from the source's in {', '.join(other)}")
    _check_names(metas, output.tensors.metas)
    say(f"names, shapes and dtypes: {len(metas)} tensors as planned; the config describes the same model")
    compare_checksums(source.tensors, output.tensors, metas, workers, moved)
    say(f"checksums (SHA-256): {len(metas)} of {len(metas)} tensors equal, {size(total_bytes(metas))}")
    if output.layout is not None:
        if isinstance(output.tensors, Pieces) and output.format != "torch_dist":
            check_copies(output)
            say("copies: all places that hold the same weights hold the same bytes")
        say(check_rebuilt(source.tensors, output, metas))
    say(compare_logits(source, output, metas))


def _check_names(planned: Mapping[str, Meta], found: Mapping[str, Meta]) -> None:
    missing, more = [hf for hf in planned if hf not in found], [hf for hf in found if hf not in planned]
    # A fused tensor of several dtypes has the one that holds them all.
    wrong = [
        f"{hf}: {found[hf]}, planned {meta}"
        for hf, meta in planned.items()
        if hf in found
        and (found[hf].shape != meta.shape or torch.promote_types(meta.dtype, found[hf].dtype) != found[hf].dtype)
    ]
    problems = [
        f"{len(names)} tensors {what}: {', '.join(names[:SHOWN])}"
        for what, names in (("are missing", missing), ("are too many", more), ("are others", wrong))
        if names
    ]
    if problems:
        raise ValueError("the output is not what was planned:\n" + "\n".join(problems))


def compare_checksums(
    source: Tensors,
    output: Tensors,
    metas: Mapping[str, Meta],
    workers: int,
    moved: Callable[[int], object] = lambda count: None,
) -> None:
    """Compare the checksum of every tensor's bytes, those of the source converted as the output's are.

    Raises:
        ValueError: some differ; names them.
    """
    unequal: list[str] = []

    def one(hf: str) -> None:
        asked, dtype = metas[hf].dtype, output.metas[hf].dtype
        sums = hashlib.sha256(), hashlib.sha256()
        for block in blocks(hf, output.metas[hf]):
            rows = source.rows(hf, block.start, block.stop).to(asked).to(dtype)
            for found, part in zip(sums, (rows, output.rows(hf, block.start, block.stop)), strict=True):
                found.update(_bytes(part))
            moved(block.bytes)
        if sums[0].digest() != sums[1].digest():
            unequal.append(hf)

    each_at_once(iter(metas), one, workers)
    if unequal:
        raise ValueError(f"{len(unequal)} of {len(metas)} tensors are not what the source has: {told(sorted(unequal))}")


def _bytes(rows: torch.Tensor) -> memoryview:
    return rows.contiguous().view(-1).view(torch.uint8).numpy().data


def told(names: Sequence[str]) -> str:
    """The first of some names."""
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
