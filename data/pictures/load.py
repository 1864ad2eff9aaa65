"""Pictures from files: any kind of pixels becomes RGB with 8 bits, and whatever is wrong becomes a PictureError."""

from __future__ import annotations

import io
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from data.pictures.errors import PictureError

Source = bytes | str | Path

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""What is opened. Pillow knows more, some of which start other programs (PostScript)."""

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What the numbers of EXIF's orientation ask for."""

MAX_PIXELS = 178_956_970
"""Most pixels that are ever decoded: twice Pillow's MAX_IMAGE_PIXELS, above which it refuses itself."""


def load(source: Source, limit: int = MAX_PIXELS) -> Image.Image:
    """The picture of a file or of its bytes: RGB, upright, on white where it is transparent, an animation's first.

    Args:
        source: path or bytes.
        limit: pixels of the largest picture that is decoded.

    Raises:
        PictureError: it cannot be read; the reason is one line and names neither file nor library.
    """
    with stream_of(source) as stream:
        with blamed(limit):
            image = opened(stream, limit)
            image.load()
        return rgb(upright(image))


def measure(source: Source, limit: int = MAX_PIXELS) -> tuple[int, int]:
    """Width and height of what `load` gives. Decodes all of it, so that a file without an end is found here.

    Raises:
        PictureError: see `load`.
    """
    return load(source, limit).size


def stream_of(source: Source) -> BinaryIO:
    """What to read the file from; to be closed by the caller.

    Raises:
        PictureError: it cannot be opened, or is empty.
    """
    if isinstance(source, bytes):
        if not source:
            raise PictureError("the picture has no bytes")
        return io.BytesIO(source)
    try:
        about = os.stat(source)
        usable = stat.S_ISREG(about.st_mode) and about.st_size  # opening a pipe would wait for a writer
        stream = open(source, "rb") if usable else None  # noqa: SIM115
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        cause = (getattr(error, "strerror", None) or str(error)).lower()
        raise PictureError(f"the file cannot be opened: {cause}") from error
    if stream is None:
        regular = stat.S_ISREG(about.st_mode)
        raise PictureError("the file is empty" if regular else "the file cannot be opened: it is a folder or a device")
    return stream


@contextmanager
def blamed(limit: int) -> Iterator[None]:
    """Whatever Pillow trips over in here is the file's fault: its decoders raise a dozen kinds of exceptions on broken
    bytes. Nothing else may run in here."""
    # Threads share the filters, so they are set and never put back. Broken EXIF blocks are common, and harmless.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    try:
        yield
    except UnidentifiedImageError as error:
        raise PictureError("the file is not a picture of a known kind, or its beginning is broken") from error
    except Image.DecompressionBombError as error:
        raise PictureError(f"the picture is too large: more than {min(limit, MAX_PIXELS):,} pixels") from error
    except Exception as error:
        if isinstance(error, EOFError) or "truncated" in str(error).lower():
            raise PictureError("the picture is cut off: the file ends before its pixels do") from error
        raise PictureError("the picture is broken: its bytes cannot be decoded") from error


def opened(stream: BinaryIO, limit: int) -> Image.Image:
    """The picture with nothing decoded, if it has no more pixels than `limit`; to be called within `blamed`."""
    image = Image.open(stream, formats=FORMATS)
    if image.width * image.height > limit:
        raise Image.DecompressionBombError
    return image


def upright(image: Image.Image) -> Image.Image:
    """A decoded picture, turned as its EXIF notes ask for. Notes that cannot be read ask for nothing."""
    try:
        turn = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # as many kinds as in `blamed`; the pixels are sound
        turn = None
    return image.transpose(TURNS[turn]) if turn in TURNS else image


def rgb(image: Image.Image) -> Image.Image:
    """The same with 8 bits and three colours, on white.

    Raises:
        PictureError: its pixels have no meaning as colours.
    """
    if image.mode.startswith("I") or image.mode == "F":
        return _of_numbers(image).convert("RGB")
    try:
        if image.has_transparency_data:
            clear = image.convert("RGBA")
            white = Image.new("RGBA", clear.size, (255, 255, 255, 255))
            return Image.alpha_composite(white, clear).convert("RGB")
        return image if image.mode == "RGB" else image.convert("RGB")
    except ValueError as error:
        raise PictureError(f"its colours ({image.mode}) cannot be turned into red, green and blue") from error


def _of_numbers(image: Image.Image) -> Image.Image:
    """Grey values of 16 bits as 8. Pillow's own conversion cuts them off at 255, which leaves a white sheet."""
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise PictureError("its pixels are 32-bit numbers, of which no file says what is black and what is white")
    return Image.fromarray(np.rint(values.astype(np.float32) / 257).astype(np.uint8))
