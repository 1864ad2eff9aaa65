"""From what was looked at to its tokens, places and patches: the same for pictures and videos, in training and answers.

In native mode a video is one thing of several frames; in the others each frame is a picture of its own, one tile large.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from data.pictures.errors import PictureError
from data.pictures.geometry import plan
from data.pictures.load import load
from data.pictures.notes import Seen
from data.pictures.patches import patches_of
from data.pictures.positions import rotary_positions
from data.pictures.types import PictureConfig, Plan
from data.pictures.video import frames_of

USUAL_SECONDS = 0.5
"""From frame to frame where nothing says it: two frames a second, as Qwen2.5-VL takes them."""


def plan_of(seen: Seen, cfg: PictureConfig) -> Plan:
    """What becomes of it.

    Raises:
        PictureError: no plan for such a size.
    """
    if not seen.frames:
        return plan(seen.width, seen.height, cfg)
    return plan(seen.width, seen.height, cfg.of_video, seen.frames if cfg.mode == "native" else 1)


def rotary_of(length: int, starts: Sequence[int], seen: Sequence[Seen], plans: Sequence[Plan], cfg: PictureConfig
) -> np.ndarray:  # fmt: skip
    """Time, row and column of each token of a document, int64 [3, length], whose pictures begin at `starts`."""
    shapes = [(at, each.shape) for at, each in zip(starts, plans, strict=True)]
    return rotary_positions(length, shapes, [pace_of(each, cfg) for each in seen])


def pace_of(seen: Seen, cfg: PictureConfig) -> float:
    """Positions between two of its steps in time."""
    if not seen.frames or cfg.tokens_per_second is None:
        return 1.0
    return cfg.tokens_per_second * cfg.frames * (seen.seconds or USUAL_SECONDS)


def patches_of_all(
    seen: Sequence[Seen], plans: Sequence[Plan], cfg: PictureConfig, max_pixels: int
) -> list[torch.Tensor]:
    """The patches of each, fp32 [P, X]. Frames of an animation are decoded together.

    Raises:
        PictureError: it cannot be read, or is not what it was when it was looked at; the reason names it.
    """
    made: list[torch.Tensor] = []
    frames: list[Image.Image] = []
    for each, planned in zip(seen, plans, strict=True):
        try:
            if not each.frames:
                made.append(patches_of(_of_size(load(each.where.source, max_pixels), each), planned, cfg))
            elif cfg.mode == "native":
                made.append(patches_of(_frames(each, max_pixels), planned, cfg.of_video))
            elif not each.where.video:
                made.append(patches_of(_of_size(load(each.where.source, max_pixels), each), planned, cfg.of_video))
            else:
                frames = frames if each.frame else _frames(each, max_pixels)
                made.append(patches_of(frames[each.frame], planned, cfg.of_video))
        except PictureError as error:
            raise PictureError(f"{'video' if each.frames else 'picture'} {each.where}: {error}") from error
    return made


def _frames(seen: Seen, max_pixels: int) -> list[Image.Image]:
    where = seen.where
    found = frames_of([frame.source for frame in where.frames] or where.source, seen.frames, max_pixels).frames
    if len(found) != seen.frames:
        raise PictureError(f"it had {seen.frames} frames or more and has {len(found)}")
    _of_size(found[0], seen)
    return list(found)


def _of_size(image: Image.Image, seen: Seen) -> Image.Image:
    if image.size != (seen.width, seen.height):
        raise PictureError(f"it was {seen.width} x {seen.height} pixels and is {image.width} x {image.height}")
    return image
