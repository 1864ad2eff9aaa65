"""Looking at the pictures and videos of a row once, when its text becomes tokens: can they be read, how many tokens are
they."""

from __future__ import annotations

import os
from dataclasses import replace

from data.pictures.errors import PictureError
from data.pictures.load import measure
from data.pictures.notes import Seen
from data.pictures.references import Reference
from data.pictures.rows import MARK, placed, replaced, split_row
from data.pictures.seen import plan_of
from data.pictures.types import PictureConfig
from data.pictures.video import files_of, frames_of, spread
from data.rows import Row, RowError


def look_at(
    row: Row, folder: str, cfg: PictureConfig | None, max_pixels: int, answered: bool = True
) -> tuple[Row, tuple[Seen, ...], bytes]:
    """The row with the model's own text in the places of pictures, its pictures, and what tells them from others.

    Args:
        folder: what relative paths start from.
        cfg: what the model makes of pictures; None sees none.
        max_pixels: of a picture that is decoded.
        answered: see `split_row`.

    Raises:
        RowError: a picture cannot be used, or there is nothing that sees it.
    """
    row, found = split_row(row, os.path.expanduser(folder), answered)
    if not found:
        return row, (), b""
    if cfg is None:
        raise RowError("the row has pictures, but this run sees none (model.vision=null)")
    each = [_frames(where, cfg, max_pixels) if where.video else (_seen(where, cfg, max_pixels),) for where in found]
    texts = [f"{cfg.begin}{_token(part, cfg)}{cfg.end}" * len(part) for part in each]
    if any(where.video for where in found):
        row = placed(row, texts)
    else:
        row = replaced(row, lambda text: text.replace(MARK, texts[0]))
    return row, tuple(seen for part in each for seen in part), b"\0".join(where.identity for where in found)


def _token(part: tuple[Seen, ...], cfg: PictureConfig) -> str:
    return cfg.of_video.token if part[0].frames else cfg.token


def _seen(where: Reference, cfg: PictureConfig, max_pixels: int) -> Seen:
    try:
        width, height = measure(where.source, max_pixels)
        return _counted(Seen(where, width, height, 0, 0), cfg)
    except PictureError as err:
        raise RowError(f"picture {where}: {err}") from err


def _frames(where: Reference, cfg: PictureConfig, max_pixels: int) -> tuple[Seen, ...]:
    """The frames of a video that are taken: together in native mode, else each as a picture of its own."""
    try:
        if where.path is not None and os.path.isdir(where.path):
            where = replace(where, frames=tuple(Reference(path=path) for path in files_of(where.path)))
        named = where.frames
        frames = [named[number] for number in spread(len(named), cfg.video_frames)] if named else []
        clip = frames_of([frame.source for frame in frames] or where.source, cfg.video_frames, max_pixels)
        total, count = len(named) or clip.total, len(clip.frames)
        seconds = where.seconds * total / count if where.seconds is not None else clip.seconds or 0.0
        taken = replace(where, frames=tuple(frames))
        whole = Seen(taken, *clip.frames[0].size, 0, 0, count, 0, seconds)
        if cfg.mode == "native":
            return (_counted(whole, cfg),)
        alone = [replace(whole, where=frames[n] if frames else taken, frame=n) for n in range(count)]
        return tuple(_counted(each, cfg) for each in alone)
    except PictureError as err:
        raise RowError(f"video {where}: {err}") from err


def _counted(seen: Seen, cfg: PictureConfig) -> Seen:
    planned = plan_of(seen, cfg)
    return replace(seen, tokens=planned.tokens, patches=sum(rows * columns for rows, columns in planned.grids))
