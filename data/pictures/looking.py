"""Looking at the pictures of a row once, when its text becomes tokens: can they be read, how many tokens are they."""

from __future__ import annotations

import os

from data.pictures.geometry import plan
from data.pictures.load import PictureError, measure
from data.pictures.notes import Seen
from data.pictures.rows import MARK, Reference, replaced, split_row
from data.pictures.types import PictureConfig
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
    seen = tuple(_seen(where, cfg, max_pixels) for where in found)
    text = f"{cfg.begin}{cfg.token}{cfg.end}"
    row = replaced(row, lambda each: each.replace(MARK, text))
    return row, seen, b"\0".join(where.identity for where in found)


def _seen(where: Reference, cfg: PictureConfig, max_pixels: int) -> Seen:
    try:
        width, height = measure(where.content if where.content is not None else where.path or "", max_pixels)
        planned = plan(width, height, cfg)
    except PictureError as err:
        raise RowError(f"picture {where}: {err}") from err
    patches = sum(rows * columns for rows, columns in planned.grids)
    return Seen(where, width, height, planned.tokens, patches)
