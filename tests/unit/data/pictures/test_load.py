"""Pictures of every kind of file and pixel; and files that are none."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.pictures.errors import PictureError
from data.pictures.load import load, measure


def written(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def pixels(source) -> np.ndarray:
    image = load(source)
    assert image.mode == "RGB" and measure(source) == image.size
    return np.asarray(image)


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def hollow_png(width: int, height: int) -> bytes:
    """A file of a hundred bytes that says it is that large."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 9)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


GREY = np.arange(0, 65536, 4369, dtype=np.uint16).reshape(4, 4)  # 0, 17 * 257, ... 65535: 8 bits are 0, 17, ... 255


def test_kinds_of_files(picture, tmp_path: Path) -> None:
    image = picture(20, 30)
    for kind in ("PNG", "BMP", "TIFF", "PPM"):
        (tmp_path / "picture").write_bytes(written(image, kind))
        for source in (tmp_path / "picture", str(tmp_path / "picture"), written(image, kind)):
            assert np.array_equal(pixels(source), np.asarray(image))
    for kind in ("JPEG", "WEBP"):
        near = pixels(written(image, kind, quality=95)).astype(int) - np.asarray(image)
        assert np.abs(near).mean() < 12


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bits_become_8_and_not_white(kind: str) -> None:
    found = pixels(written(Image.fromarray(GREY), kind))
    assert np.array_equal(found, np.repeat(np.arange(0, 256, 17, dtype=np.uint8).reshape(4, 4, 1), 3, 2))


def test_transparent_pixels_lie_on_white(picture) -> None:
    clear = np.dstack([np.asarray(picture(8, 8)), np.tile(np.array([0, 255, 51, 204], np.uint8), (8, 2))])
    share = clear[..., 3:] / 255
    white = np.rint(clear[..., :3] * share + 255 * (1 - share))
    assert np.abs(pixels(written(Image.fromarray(clear, "RGBA"))) - white).max() <= 1

    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    assert pixels(written(palette)).tolist() == [[[10, 20, 30], [40, 50, 60]]]
    assert pixels(written(palette, transparency=0)).tolist() == [[[255] * 3, [40, 50, 60]]]
    assert pixels(written(palette, transparency=bytes([255, 0]))).tolist() == [[[10, 20, 30], [255] * 3]]
    assert pixels(written(palette, "GIF", transparency=1)).tolist() == [[[10, 20, 30], [255] * 3]]
    assert pixels(written(Image.fromarray(np.array([[7, 9]], np.uint8)), transparency=7)).tolist() == [
        [[255] * 3, [9] * 3]
    ]


def test_other_pixels(picture) -> None:
    assert pixels(written(Image.new("CMYK", (2, 2), (0, 255, 255, 0)), "TIFF"))[0, 0].tolist() == [255, 0, 0]
    assert pixels(written(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"))[0, 0].tolist()[0] > 250
    assert pixels(written(Image.new("1", (2, 2), 1)))[0, 0].tolist() == [255] * 3
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue", "green")]
    for kind in ("GIF", "PNG", "WEBP"):
        moving = written(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
        assert pixels(moving)[0, 0].tolist() == [255, 0, 0]


def test_the_camera_was_turned(picture) -> None:
    """Each number of EXIF's orientation, against what it says in words (first row and column of the file)."""
    image = np.array([[[200, 0, 0], [0, 200, 0]], [[0, 0, 200], [200, 200, 0]], [[0, 200, 200], [9, 9, 9]]], np.uint8)
    upright = {
        1: image,  # top, left
        2: image[:, ::-1],  # top, right
        3: image[::-1, ::-1],  # bottom, right
        4: image[::-1],  # bottom, left
        5: image.transpose(1, 0, 2),  # left, top
        6: image.transpose(1, 0, 2)[:, ::-1],  # right, top
        7: image.transpose(1, 0, 2)[::-1, ::-1],  # right, bottom
        8: image.transpose(1, 0, 2)[::-1],  # left, bottom
    }
    for number, expected in upright.items():
        exif = Image.Exif()
        exif[0x0112] = number
        for kind in ("PNG", "TIFF"):
            assert np.array_equal(pixels(written(Image.fromarray(image), kind, exif=exif)), expected), (number, kind)


def test_broken_files_are_told_in_one_line(picture, tmp_path: Path) -> None:
    def reason(source, **options) -> str:
        with pytest.raises(PictureError) as told:
            measure(source, **options)
        assert "\n" not in str(told.value)
        return str(told.value)

    whole = {kind: written(picture(64, 64), kind) for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM")}
    for kind, file in whole.items():
        assert "cut off" in reason(file[: len(file) * 2 // 3]) or "broken" in reason(file[: len(file) * 2 // 3]), kind
        for length in (4, 13, 40):
            assert reason(file[:length]), kind
    unknown = "the file is not a picture of a known kind, or its beginning is broken"
    assert reason(b"") == "the picture has no bytes"
    assert reason(b"<html>not found</html>") == unknown
    assert reason(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n") == unknown
    assert reason(tmp_path / "nowhere.png") == "the file cannot be opened: no such file or directory"
    assert reason("a\0b.png").startswith("the file cannot be opened:")
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path, tmp_path / "pipe.png"):
        assert reason(path) == "the file cannot be opened: it is a folder or a device"
    (tmp_path / "empty.png").touch()
    assert reason(tmp_path / "empty.png") == "the file is empty"
    assert reason(hollow_png(0, 5)) == unknown
    assert "32-bit numbers" in reason(written(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF"))


def test_a_small_file_that_holds_far_too_much_is_not_decoded() -> None:
    for width, height, limit, said in [
        (100, 100, 9_999, "the picture is too large: more than 9,999 pixels"),
        (12_000, 12_000, 100_000_000, "the picture is too large: more than 100,000,000 pixels"),
        (200_000, 200_000, 178_956_970, "the picture is too large: more than 178,956,970 pixels"),
    ]:
        with pytest.raises(PictureError) as told:
            load(hollow_png(width, height), limit=limit)
        assert str(told.value) == said


def test_nothing_is_written_to_the_screen(picture, tmp_path: Path) -> None:
    """Not by a picture above the library's own warning, by a broken EXIF block, nor by a palette with alpha."""
    exif = b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01\x03\0\x09\0\0\0"  # five entries promised, not one whole
    (tmp_path / "exif.jpg").write_bytes(written(picture(20, 10), "JPEG", exif=exif))
    (tmp_path / "large.png").write_bytes(hollow_png(9_500, 9_500))
    command = """
import sys
from data.pictures.load import PictureError, load, measure
print(measure(sys.argv[1]))
try: measure(sys.argv[2], limit=90_000_000)
except PictureError as error: print(error)
"""
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", command, tmp_path / "exif.jpg", tmp_path / "large.png"],
        capture_output=True, text=True, cwd=Path(__file__).parents[4],
    )  # fmt: skip
    assert done.stderr == ""
    assert done.stdout == "(20, 10)\nthe picture is too large: more than 90,000,000 pixels\n"


def test_any_bytes_are_a_picture_or_a_reason(picture) -> None:
    """Bytes of real files changed at random: nothing but PictureError ever comes out."""
    draw = np.random.default_rng(0)
    image = picture(24, 16)
    files = [written(image, kind) for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM")]
    told = 0
    for number in range(700):
        file = np.frombuffer(files[number % len(files)], np.uint8).copy()
        where = draw.integers(0, min(len(file), 200 if number % 2 else len(file)), draw.integers(1, 8))
        file[where] = draw.integers(0, 256, len(where))
        try:
            load(file.tobytes(), limit=1_000_000)
        except PictureError:
            told += 1
    assert 100 < told < 700
