"""Positions of three numbers against transformers' get_rope_index."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel

from data.pictures.positions import rotary_positions


class Stand:
    """What get_rope_index reads of a model."""

    def __init__(self, kind: Any, tokens_per_second: int) -> None:
        vision = SimpleNamespace(spatial_merge_size=2, tokens_per_second=tokens_per_second)
        self.config = SimpleNamespace(vision_config=vision)
        self.get_vision_position_ids = kind.get_vision_position_ids.__get__(self)


def theirs(parts: list[int | tuple[int, int, int]], kind: Any = Qwen2VLModel, **video: Any) -> np.ndarray:
    """`parts`: tokens of a text, or the shape of a picture or video."""
    types, grids = [], []
    for part in parts:
        if isinstance(part, int):
            types += [0] * part
        else:
            types += [2 if video else 1] * int(np.prod(part))
            grids.append([part[0], part[1] * 2, part[2] * 2])
    pace, seconds = video.get("tokens_per_second", 1), video.get("seconds")
    name = "video_grid_thw" if video else "image_grid_thw"
    more = {name: torch.tensor(grids)} | ({"second_per_grid_ts": torch.tensor(seconds)} if seconds else {})
    ids = torch.zeros(1, len(types), dtype=torch.int64)
    found, _ = kind.get_rope_index(cast(Any, Stand(kind, pace)), ids, torch.tensor([types]), **more)
    return found[:, 0].numpy()


def ours(parts: list[int | tuple[int, int, int]], pace: list[float] | None = None) -> np.ndarray:
    at, pictures = 0, []
    for part in parts:
        if isinstance(part, int):
            at += part
        else:
            pictures.append((at, part))
            at += int(np.prod(part))
    return rotary_positions(at, pictures, pace)


@pytest.mark.parametrize(
    "parts",
    [[5], [3, (1, 4, 6), 7], [(1, 2, 2), 1, (1, 5, 3), 2, (1, 1, 1), 4], [2, (1, 3, 9)], [(1, 1, 8)]],
    ids=str,
)
def test_text_and_pictures(parts: list[Any]) -> None:
    found = ours(parts)
    assert found.dtype == np.int64 and np.array_equal(found, theirs(parts))


def test_videos_that_are_shorter_than_wide() -> None:
    assert np.array_equal(ours([3, (3, 4, 5), 2, (2, 2, 2), 1]), theirs([3, (3, 4, 5), 2, (2, 2, 2), 1], video=True))
    parts, seconds = [3, (3, 8, 9), 2, (2, 6, 6), 1], [1.3, 0.7]
    expected = theirs(parts, Qwen2_5_VLModel, tokens_per_second=3, seconds=seconds)
    assert np.array_equal(ours(parts, [3 * each for each in seconds]), expected)


def test_text_behind_a_long_video_goes_on_after_its_last_moment() -> None:
    """The example that Qwen2.5-VL's authors give: 3 x 2 x 2 tokens, 50 positions between two steps, text from 101."""
    found = ours([(3, 2, 2), 5], [50])
    assert found[0].tolist() == [0] * 4 + [50] * 4 + [100] * 4 + [101, 102, 103, 104, 105]
    assert found[1].tolist() == [0, 0, 1, 1] * 3 + [101, 102, 103, 104, 105]
    assert found[2].tolist() == [0, 1, 0, 1] * 3 + [101, 102, 103, 104, 105]
