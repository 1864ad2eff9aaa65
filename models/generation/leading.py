"""One tensor-parallel rank asks, the others follow: for whoever gets prompts in one place (a terminal, a queue)."""

from collections.abc import Callable, Iterator
from types import GeneratorType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from models.generation.config import Completion, Settings, Step
from models.generation.generator import Generator, Prompts
from models.generation.team import FirstRankFailed, Team

Result = TypeVar("Result")
Asked = tuple[str, Prompts, Settings | None]
"""A method of the generator and its arguments."""


def lead(generator: Generator, work: Callable[[Generator], Result]) -> Result | None:
    """Run `work` on rank 0 of the generator's tp ranks, with a generator that it may ask when and as often as it likes.

    Every rank calls this. The others write along until `work` ends or raises. They wait for the next prompt no longer
    than their process group's timeout: build the groups with a long one where a person types.

    Returns:
        What `work` does; None on the other ranks.
    """
    team = generator.team
    if team.axis.size == 1:
        return work(generator)
    if team.axis.rank:
        while (asked := _sent(team, None)) is not None:
            _follow(generator, *asked)
        return None
    leader = _Leader(generator)
    try:
        return work(leader)
    finally:
        leader.send(None)


class _Leader(Generator):
    """Tells the other ranks what it is asked for."""

    def __init__(self, led: Generator) -> None:
        super().__init__(led.model, led.tokenizer, led.config, led.stop_tokens, led.draft)
        self.draft_stats = led.draft_stats
        self._stream: GeneratorType[Step, None, None] | None = None

    def generate(self, prompts: Prompts, sampling: Settings | None = None) -> list[Completion]:
        self.send(("generate", prompts, sampling))
        return super().generate(prompts, sampling)

    def stream_generate(self, prompts: Prompts, sampling: Settings | None = None) -> Iterator[Step]:
        """As of any generator, but begun when the first step is asked for, and ended when anything else is."""
        self.send(("stream_generate", prompts, sampling))
        steps = super().stream_generate(prompts, sampling)
        assert isinstance(steps, GeneratorType)
        self._stream = steps
        yield from steps

    def send(self, asked: Asked | None) -> None:
        """What is to be done next; None = nothing more."""
        if self._stream is not None:
            self._stream.close()
        _sent(self.team, asked)


def _sent(team: Team, asked: Asked | None) -> Asked | None:
    """What rank 0 sends."""
    told: list[Any] = [asked]
    dist.broadcast_object_list(told, group=team.axis.group, device=torch.device("cpu"), group_src=0)
    return told[0]


def _follow(generator: Generator, name: str, prompts: Prompts, sampling: Settings | None) -> None:
    """Write along."""
    try:
        for _ in getattr(generator, name)(prompts, sampling):
            pass
    except (ValueError, FirstRankFailed):
        return  # rank 0 raised too, where somebody asked and hears of it
