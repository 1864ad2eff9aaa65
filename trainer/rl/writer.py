"""The policy as an author: the generator on its weights, prompts dealt out over as many copies of it as there are."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

import torch

from data.batch import Row, split_ragged
from data.prompt import Prompt
from models.generation import Completion, Generator, Request, SamplingConfig, Sight
from parallel.groups import Groups
from trainer.rl.sights import Sights


@dataclasses.dataclass
class Written:
    """What was written since the last `Author.reset`, over all ranks."""

    tokens: int = 0
    """New tokens."""
    seconds: float = 0.0
    """From call to return."""
    busy: float = 0.0
    """Mean of the ranks' own time within these."""

    @property
    def idle(self) -> float:
        """Share of the time in which ranks waited for the slowest."""
        return 1 - self.busy / self.seconds if self.seconds else 0.0


class Author:
    """Loom's generator as a `trainer.rollout.types.Writer`. Every rank calls alike and gets all texts.

    Args:
        generator: this rank's copy of the policy, or its part of one that `generator.model.place.tp` ranks share;
            they are neighbours.
        groups: the ranks of the run.
        autocast: the dtype of autocast around the model, None for the weights' own.
        sights: gives what prompts show; None = the model sees nothing.
    """

    def __init__(
        self,
        generator: Generator,
        groups: Groups,
        autocast: torch.dtype | None = None,
        sights: Sights | None = None,
    ) -> None:
        self.generator, self.groups, self.autocast, self.sights = generator, groups, autocast, sights
        self.written = Written()

    def reset(self) -> None:
        """Count what is written from here on."""
        self.written = Written()

    def write(
        self,
        prompts: Sequence[tuple[int, ...]],
        samples: int,
        settings: SamplingConfig,
        seeds: Sequence[int],
        shown: Sequence[Prompt] | None = None,
    ) -> list[list[Completion]]:
        """`samples` texts for each prompt, see `trainer.rollout.types.Writer`."""
        started = time.perf_counter()
        settings = dataclasses.replace(settings, samples=samples)
        tp = self.generator.model.place.tp
        mine = _share(prompts, settings.max_new_tokens, self.groups.rank // tp.size, self.groups.world // tp.size)
        sights: list[Sight | None] = [None] * len(mine)
        if self.sights is not None and shown is not None:
            sights = self.sights.of([shown[i] for i in mine], [len(prompts[i]) for i in mine])
        requests = [Request(prompts[i], settings, seeds[i], sight) for i, sight in zip(mine, sights, strict=True)]
        with torch.autocast(self.groups.device.type, self.autocast, enabled=self.autocast is not None):
            made = self.generator.generate(requests) if requests else []
        busy = time.perf_counter() - started
        everyone = self.groups.all_gather(([(mine[each.prompt], each) for each in made] if tp.rank == 0 else [], busy))
        found: list[list[Completion]] = [[] for _ in prompts]
        for given, _ in everyone:
            for index, each in given:
                found[index].append(dataclasses.replace(each, prompt=index))
        self.written.tokens += sum(len(each.tokens) for texts in found for each in texts)
        self.written.seconds += time.perf_counter() - started
        self.written.busy += sum(time for _, time in everyone) / len(everyone)
        return [_all_samples(texts, samples) for texts in found]


def _share(prompts: Sequence[Sequence[int]], new: int, copy: int, copies: int) -> list[int]:
    """The prompts that one of `copies` generators writes to: equally many of like lengths."""
    rows = [Row((i,), (max(len(prompt), 1) + new,)) for i, prompt in enumerate(prompts)]
    if not rows:
        return []
    (mine,) = split_ragged(rows, copy, copies, -(-len(rows) // copies))
    return [row.pieces[0] for row in mine]


def _all_samples(texts: list[Completion], samples: int) -> list[Completion]:
    """A prompt that cannot be run has one completion that says so; every sample gets it."""
    if len(texts) == 1 and texts[0].finish == "error":
        return [dataclasses.replace(texts[0], sample=sample) for sample in range(samples)]
    assert [each.sample for each in texts] == list(range(samples)), "a text is missing"
    return texts
