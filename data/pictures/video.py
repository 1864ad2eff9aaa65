"""Videos as frames: animations, or lists of pictures. In native mode `data.pictures.geometry.plan` takes several frames
of one size; in other modes each frame is a picture of its own."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from data.pictures.errors import PictureError
from data.pictures.load import MAX_PIXELS, Source, blamed, load, opened, rgb, stream_of

FORMATS = ("GIF", "PNG", "WEBP")
"""Whose frames follow each other in time. (Those of TIFF are pages, those of JPEG two views.)"""
STILLS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
"""Endings of the files of a folder of frames."""
FILMS = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".flv", ".ts", ".ogv", ".3gp")


@dataclass(frozen=True)
class Clip:
    """Frames of a video, RGB and of one size."""

    frames: tuple[Image.Image, ...]
    seconds: float | None
    """From one frame to the next; None where the source does not say."""
    total: int
    """Frames of the source."""


def files_of(folder: str) -> list[str]:
    """Paths of the frames in a folder, by their names; numbers in these count as numbers (2.png before 10.png).

    Raises:
        PictureError: it cannot be read, or holds no pictures.
    """
    try:
        names = [name for name in os.listdir(folder) if name.lower().endswith(STILLS) and not name.startswith(".")]
    except OSError as error:
        raise PictureError(f"the folder cannot be read: {(error.strerror or str(error)).lower()}") from error
    if not names:
        raise PictureError(f"the folder holds no frames ({', '.join(STILLS)})")
    return [os.path.join(folder, name) for name in sorted(names, key=_by_number)]


def _by_number(name: str) -> tuple[list[tuple[int, int | str]], str]:
    parts = re.findall(r"[0-9]+|[^0-9]+", name)
    return [(0, int(part)) if part.isdigit() else (1, part) for part in parts], name


def frames_of(source: Source | Sequence[Source], count: int, limit: int = MAX_PIXELS) -> Clip:
    """At most `count` frames, at even distances from the first on.

    Args:
        source: path or bytes of an animation; or a list of them, one for each frame.
        count: frames at most.
        limit: pixels of all frames that are decoded; those of an animation build on the ones before, so that all up to
            the last one taken are.

    Raises:
        PictureError: a frame cannot be read, or has another size than the first.
    """
    if isinstance(source, bytes | str | Path):
        return _animation(source, count, limit)
    numbers = spread(len(source), count)
    frames = []
    for number in numbers:
        frame = load(source[number], limit // len(numbers))
        if frames and frame.size != frames[0].size:
            sizes = " and ".join(f"{each.width} x {each.height}" for each in (frames[0], frame))
            raise PictureError(f"the frames have different sizes: {sizes} pixels")
        frames.append(frame)
    return Clip(tuple(frames), None, len(source))


def spread(total: int, count: int) -> list[int]:
    """At most `count` of `total` numbers from 0, at even distances; rounded down, as Qwen2-VL's video processor does.

    Raises:
        PictureError: there is nothing to take.
    """
    assert count > 0, "no frame is asked for"
    if not total:
        raise PictureError("the video has no frames")
    return [number * total // count for number in range(count)] if count < total else list(range(total))


def _animation(source: Source, count: int, limit: int) -> Clip:
    with stream_of(source) as stream:
        if _is_film(stream.read(12)) or str(source)[-8:].lower().endswith(FILMS):
            raise PictureError(
                "it is a film, which nothing here decodes; take its frames out (ffmpeg -i FILE -vf fps=2 "
                'FOLDER/%05d.jpg) and name the folder: {"frames": "FOLDER", "fps": 2}'
            )
        stream.seek(0)
        with blamed(limit):
            image = opened(stream, limit)
            total = getattr(image, "n_frames", 1) if image.format in FORMATS else 1
        numbers = spread(total, count)
        decoded = image.width * image.height * (numbers[-1] + 1)
        if decoded > limit:
            raise PictureError(f"the video is too large: {decoded:,} pixels up to its last frame, more than {limit:,}")
        frames, pauses = [], []
        for number in numbers:
            with blamed(limit):
                image.seek(number)
                image.load()
            frames.append(rgb(image.copy()))  # the next one is drawn over it
            pauses.append(float(image.info.get("duration", 0)) / 1000)
    pause = sum(pauses) / len(pauses) * total / len(numbers)
    return Clip(tuple(frames), pause if pause > 0 else None, total)


def _is_film(head: bytes) -> bool:
    """Whether a file that begins so is MP4 or QuickTime, Matroska or WebM, AVI."""
    return head[4:8] == b"ftyp" or head[:4] == b"\x1a\x45\xdf\xa3" or (head[:4] == b"RIFF" and head[8:] == b"AVI ")
