"""Whether the several copies of a weight that a Megatron checkpoint holds are equal: it loads all, and checks none."""

from collections import defaultdict
from collections.abc import Callable, Iterator

import torch

from convert.boxes import Box, Columns, Pieces
from convert.megatron.fitting import first_lines
from convert.megatron.rank_files import Found
from convert.opened import Opened

BLOCK_BYTES = 8 * 2**20

Part = tuple[int, int, Columns | None]


def check_copies(opened: Opened, moved: Callable[[int], None] = lambda size: None) -> None:
    """Compare what several files of a Megatron checkpoint repeat, byte for byte: norms on every tensor-parallel rank,
    all but experts on every expert-parallel rank, a tied embedding on the last pipeline stage.

    Args:
        moved: told the bytes of each block that was read.

    Raises:
        ValueError: copies differ; names the weights and both files.
    """
    assert isinstance(opened.tensors, Pieces), f"{opened.format} has no copies"
    pieces: Pieces[Found] = opened.tensors
    found = []
    for hf in pieces.metas:
        copies: dict[Part, list[tuple[Box, Found]]] = defaultdict(list)
        for box, tensor in pieces.of(hf):
            copies[box.start, box.stop, box.columns].append((box, tensor))
        for (start, stop, _), of_part in copies.items():
            for other in _unequal(of_part, moved):
                found.append(f"rows {start} to {stop} of {hf}: {of_part[0][1].file} and {other.file}")
    if found:
        why = "one of the two was changed or is of another iteration, and Megatron would compute with both"
        raise ValueError(f"{len(found)} copies of weights differ in {opened.path} ({why}):{first_lines(found)}")


def _unequal(copies: list[tuple[Box, Found]], moved: Callable[[int], None]) -> Iterator[Found]:
    """Of tensors that hold the same rows those that differ from the first, each once."""
    (box, first), others = copies[0], dict(enumerate(copies[1:]))
    rows = box.stop - box.start
    row_bytes = (first.shape[-1] if len(first.shape) > 1 else 1) * first.dtype.itemsize
    each = max(1, BLOCK_BYTES // row_bytes)
    for at in range(0, rows if others else 0, each):
        stop = min(rows, at + each)
        expected = _bytes(first.rows(box.at + at, box.at + stop))
        moved(expected.numel())
        for i, (place, tensor) in list(others.items()):
            same = torch.equal(_bytes(tensor.rows(place.at + at, place.at + stop)), expected)
            moved(expected.numel())
            if not same:
                del others[i]
                yield tensor


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.uint8)
