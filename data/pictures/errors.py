"""What is wrong with a picture, in words for the gate's table."""

from __future__ import annotations


class PictureError(ValueError):
    """A picture that cannot be used; the message is the reason, without the file's name."""
