"""Videos as frames."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from data.pictures.errors import PictureError
from data.pictures.video import frames_of


def animation(kind: str, shades: list[int], **options) -> bytes:
    """Frames of one shade of grey each, with a square that moves on."""
    frames = []
    for number, shade in enumerate(shades):
        pixels = np.full((8, 16, 3), shade, np.uint8)
        pixels[2:6, number : number + 4] = 255
        frames.append(Image.fromarray(pixels))
    stream = io.BytesIO()
    frames[0].save(stream, kind, save_all=True, append_images=frames[1:], duration=40, lossless=True, **options)
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_frames_of_an_animation_at_even_distances(kind: str, tmp_path) -> None:
    shades = [10, 40, 70, 100, 130, 160, 190]
    file = tmp_path / "moving"
    file.write_bytes(animation(kind, shades))
    for count, taken in [(1, [0]), (2, [0, 3]), (3, [0, 2, 4]), (7, [*range(7)]), (99, [*range(7)])]:
        for source in (file, file.read_bytes()):
            clip = frames_of(source, count)
            assert [frame.getpixel((15, 0)) for frame in clip.frames] == [(shades[n],) * 3 for n in taken]
            squares = [np.asarray(frame)[3, :, 0].tolist().index(255) for frame in clip.frames]
            assert squares == taken and {frame.mode for frame in clip.frames} == {"RGB"}
            assert clip.seconds == pytest.approx(0.04 * 7 / len(taken))


def test_a_list_of_pictures_is_a_video_if_they_have_one_size(picture) -> None:
    def written(image: Image.Image) -> bytes:
        stream = io.BytesIO()
        image.save(stream, "PNG")
        return stream.getvalue()

    pictures = [picture(9, 5, seed) for seed in range(4)]
    clip = frames_of([written(each) for each in pictures], 2)
    assert [frame.tobytes() == pictures[n].tobytes() for frame, n in zip(clip.frames, (0, 2), strict=True)] == [
        True,
        True,
    ]
    assert clip.seconds is None
    with pytest.raises(PictureError, match="the frames have different sizes: 9 x 5 and 5 x 9 pixels"):
        frames_of([written(pictures[0]), written(picture(5, 9))], 2)
    assert len(frames_of(written(pictures[0]), 8).frames) == 1
    with pytest.raises(PictureError, match="has no frames"):
        frames_of([], 2)


def test_what_is_decoded_is_bounded_and_broken_animations_are_told() -> None:
    moving = animation("GIF", list(range(50)))
    assert len(frames_of(moving, 2, limit=8 * 16 * 26).frames) == 2
    with pytest.raises(PictureError, match="too large: 3,328 pixels up to its last frame, more than 3,327"):
        frames_of(moving, 2, limit=8 * 16 * 26 - 1)
    for kind in ("PNG", "WEBP"):
        file = animation(kind, list(range(50)))
        with pytest.raises(PictureError, match=r"broken|cut off|known kind"):
            frames_of(file[: len(file) // 2], 50)
    draw = np.random.default_rng(0)
    for number in range(150):
        file = np.frombuffer(animation("GIF", [1, 90, 200]), np.uint8).copy()
        where = draw.integers(0, len(file), number % 7 + 1)
        file[where] = draw.integers(0, 256, len(where))
        try:
            frames_of(file.tobytes(), 3, limit=100_000)
        except PictureError as error:
            assert "\n" not in str(error)
