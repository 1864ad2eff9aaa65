"""What the pools run for batch inference."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from models.generation import Completion, Request
from models.generation.serving import Take, serve
from parallel.groups import Groups
from parallel.sharding import Axis
from trainer.inference.loading import generator_of, open_text_model
from trainer.inference.worker import Following, Leading


def giving(asked: list[Request]) -> Take:
    """Gives requests, at most three at a time, with a pause after each time."""
    left, pause = list(asked), [True]

    def take(room: int, idle: bool) -> list[Request] | None:
        pause[0] = not pause[0]
        if pause[0]:
            return []
        given = left[: min(room, 3)]
        del left[: len(given)]
        return given or None

    return take


def served(folder: Path, asked: list[Request]) -> list[Completion]:
    """The texts on this tp rank of a generator, where only rank 0 knows what is asked."""
    size, rank = dist.get_world_size(), dist.get_rank()
    groups = Groups(rank, size, torch.device("cpu"), Axis(), tp=Axis(size, rank, dist.group.WORLD))
    generator = generator_of(open_text_model(folder), device=groups.device, groups=groups)
    take = Following(groups).take if rank else Leading(groups, giving(asked)).take
    return sorted(serve(generator, take), key=lambda made: (made.prompt, made.sample))
