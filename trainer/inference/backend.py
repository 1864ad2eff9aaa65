"""What makes the texts: Loom's generator, or another library behind the same door."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from models.generation import Completion, Generator
from models.generation.serving import Take, serve


class Backend(Protocol):
    """A model that writes."""

    def serve(self, take: Take) -> Iterator[Completion]:
        """Take requests as long as there are any; texts as they end.

        A completion's `prompt` counts the requests in the order in which they were taken.
        """
        ...


class LoomBackend:
    """Loom's own generator."""

    def __init__(self, generator: Generator) -> None:
        self.generator = generator

    def serve(self, take: Take) -> Iterator[Completion]:
        """As `Backend.serve`."""
        return serve(self.generator, take)
