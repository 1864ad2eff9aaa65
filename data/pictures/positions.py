"""Positions of tokens among pictures as three numbers: time, row and column (M-RoPE; Wang et al. 2024, Qwen2-VL)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def rotary_positions(
    length: int, pictures: Sequence[tuple[int, tuple[int, int, int]]], pace: Sequence[float] | None = None
) -> np.ndarray:
    """Time, row and column of each token of a document.

    A text's token has the same number three times, one more than the greatest before it. The tokens of a picture count
    from there by their place in its grid, time in steps of its `pace`, rounded down.

    Args:
        length: tokens of the document.
        pictures: where each begins, ascending, and its tokens' (time, rows, columns).
        pace: of each picture the positions between two of its steps in time (Qwen2.5-VL: tokens_per_second x seconds of
            a step); None is 1 for all.

    Returns:
        int64 [3, length]
    """
    out_3L = np.empty((3, length), dtype=np.int64)
    at, number = 0, 0
    paces = [1.0] * len(pictures) if pace is None else pace
    for (start, shape), step in zip(pictures, paces, strict=True):
        stop = start + int(np.prod(shape))
        assert at <= start and stop <= length, "pictures overlap or lie outside the document"
        out_3L[:, at:start] = number + np.arange(start - at)
        number += start - at
        grid_3F = np.indices(shape).reshape(3, -1)
        grid_3F[0] = (grid_3F[0] * np.float32(step)).astype(np.int64)
        out_3L[:, start:stop] = number + grid_3F
        at, number = stop, number + int(grid_3F.max(initial=-1)) + 1
    out_3L[:, at:] = number + np.arange(length - at)
    return out_3L
