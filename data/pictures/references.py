"""What a row calls a picture or a video: a path, bytes, `{"path": ...}`, `{"bytes": ...}` or a `data:` address; a video
also a list of pictures, or `{"frames": [...], "fps": 2}`."""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from data.pictures.load import Source
from data.rows import Row, RowError, kind_of

RATES = ("fps", "sample_fps")
"""Frames a second."""


@dataclass(frozen=True)
class Reference:
    """Where a picture is: a file, or its encoded bytes. Of a video: an animation likewise, a folder, or its frames."""

    path: str | None = None
    content: bytes | None = None
    named: str = ""
    """The path as the row gives it."""
    video: bool = False
    """It is looked at as a video."""
    frames: tuple[Reference, ...] = ()
    """Pictures of a video that is named by them."""
    seconds: float | None = None
    """From one frame to the next, where the row says it."""

    @property
    def identity(self) -> bytes:
        """The same wherever the data lie."""
        if self.frames:
            return b"\1".join(frame.identity for frame in self.frames)
        return self.named.encode() if self.content is None else hashlib.blake2b(self.content, digest_size=16).digest()

    @property
    def source(self) -> Source:
        """What a file is opened with."""
        return self.content if self.content is not None else self.path or ""

    def __str__(self) -> str:
        if self.frames:
            return f"of {len(self.frames)} frames from {self.frames[0]}"
        return self.path if self.path is not None else f"{len(self.content or b'')} bytes in the row"


def address_of(part: Row, names: Sequence[str]) -> Any:
    """What a message's part of a picture or video calls it, under one of `names`; None where it does not say."""
    found = next((part[name] for name in names if part.get(name)), None)
    return found.get("url") if isinstance(found, dict) and "url" in found else found


def picture_of(part: Any, folder: str, what: str = "picture") -> Reference:
    """A picture, or a video that is one file or a folder.

    Args:
        folder: what relative paths start from.

    Raises:
        RowError: it is neither path nor bytes, or lies on the network.
    """
    video = what == "video"
    if isinstance(part, dict):
        part = part.get("bytes") or part.get("path")
    if isinstance(part, bytes | bytearray):
        return Reference(content=bytes(part), video=video)
    if not isinstance(part, str) or not part:
        raise RowError(f"a {what} is {kind_of(part)}, not a path or bytes")
    if part.startswith("data:"):
        try:
            content = base64.b64decode(part.partition(",")[2], validate=True)
        except (binascii.Error, ValueError) as err:
            raise RowError(f"a {what}'s data: address is not base64: {err}") from err
        return Reference(content=content, video=video)
    if part.startswith(("http://", "https://")):
        raise RowError(f"the {what} {part} is on the network; fetch it and give its path")
    path = os.path.expanduser(part.removeprefix("file://"))
    return Reference(path=path if os.path.isabs(path) else os.path.join(folder, path), named=part, video=video)


def video_of(part: Any, folder: str) -> Reference:
    """A video.

    Raises:
        RowError: it is no list of pictures and nothing that could be one file.
    """
    rate, given = None, part
    if isinstance(part, dict):
        rate = next((part[name] for name in RATES if part.get(name) is not None), None)
        given = part.get("frames", part)
    if rate is not None and (isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < 1e6):
        raise RowError(f"the fps of a video is {rate!r}, not a number above 0")
    seconds = None if rate is None else 1 / rate
    if isinstance(given, list | tuple):
        if not given:
            raise RowError("a video has an empty list of frames")
        frames = tuple(picture_of(frame, folder) for frame in given)
        return Reference(video=True, frames=frames, seconds=seconds)
    found = picture_of(given, folder, "video")
    return Reference(found.path, found.content, found.named, True, (), seconds)
