"""Tasks that a model answers in its own words: its texts, which of them are right, and how sure the share is."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from tqdm import tqdm

from data.cache_files import BadRow
from data.chat import Render
from data.formats import RowError
from models.generation import Completion, Generator, Request, SamplingConfig, Sight
from models.generation.config import Settings
from trainer.evaluation.choices import ALL
from trainer.evaluation.judging import Rule, Take, Verdict, judge
from trainer.evaluation.rows import windows
from trainer.evaluation.tasks import Task
from trainer.inference.eyes import BLIND, Eyes

WINDOW = 1024
"""Tasks in memory at one time; among them the generator puts like lengths together."""
SHOWN_WINDOW = 128
"""The same where they may have pictures, which are in memory too."""
Z95 = 1.959963984540054
"""Of a normal distribution, 95 % lie within so many standard deviations."""


@dataclass(frozen=True)
class Judging:
    """How texts are compared with answers."""

    rules: tuple[Rule, ...] = ("whitespace",)
    take: Take = "first"


@dataclass(frozen=True)
class Written:
    """One text for a task."""

    completion: Completion
    verdict: Verdict


@dataclass(frozen=True)
class Attempted:
    """A task and the model's texts, one for each sample."""

    task: Task
    texts: tuple[Written, ...]

    def share(self) -> float:
        """Of the texts that are right."""
        return sum(each.verdict.right for each in self.texts) / len(self.texts)

    def details(self) -> Iterator[dict[str, Any]]:
        """A row for each text."""
        for each in self.texts:
            made = each.completion
            yield self.task.described() | {
                "sample": made.sample,
                "completion": made.text,
                "extracted": each.verdict.extracted,
                "right": each.verdict.right,
                "tokens": len(made.tokens),
                "finish": made.finish,
            }


class TaskEncoder:
    """Tasks to the tokens of their prompts.

    Args:
        tokenizer: a fast `transformers` tokenizer.
        render: the chat template, if there is one; messages need it.
        chat: a prompt that is a text is the user's turn too; otherwise it is plain text.
        eyes: what the model makes of pictures.
    """

    def __init__(self, tokenizer: Any, render: Render | None, chat: bool, eyes: Eyes = BLIND) -> None:
        self._tokenizer, self._render, self._chat, self.eyes = tokenizer, render, chat, eyes

    def shown(self, task: Task) -> tuple[list[int], Sight | None]:
        """The prompt's tokens, and what they show.

        Raises:
            RowError: as `encode`, or a picture cannot be read.
        """
        return self.eyes.shown(self.encode(task), task.seen)

    def encode(self, task: Task) -> list[int]:
        """The prompt's tokens.

        Raises:
            RowError: messages without a chat template, or it refuses them.
        """
        messages = task.prompt
        if isinstance(messages, str):
            if not self._chat:
                return self._tokenizer.encode(messages)
            messages = [{"role": "user", "content": messages}]
        if self._render is None:
            raise RowError("it has messages, and the tokenizer has no chat template; give --chat-template FILE")
        return self._tokenizer.encode(self._render(messages, None, True), add_special_tokens=False)


def attempt(
    generator: Generator,
    tasks: Iterable[Task | BadRow],
    encoder: TaskEncoder,
    sampling: Settings,
    judging: Judging,
    bad: Callable[[BadRow], None],
) -> Iterator[Attempted]:
    """Answer tasks in order; task i draws with the settings' seed + i.

    Args:
        bad: is told of every row that is passed over: malformed, longer than the context, with a runaway pattern.
    """
    seed = sampling.seed if isinstance(sampling, SamplingConfig) else 0  # a search draws nothing
    with tqdm(unit="task", desc="tasks", disable=None) as bar:
        size = WINDOW if encoder.eyes.cfg is None else SHOWN_WINDOW
        for count, kept in windows(tasks, encoder.shown, size, bad):
            requests = [Request(tokens, sampling, seed + i, sight) for i, (_, (tokens, sight)) in enumerate(kept)]
            seed += len(kept)
            made = groupby(generator.generate(requests), key=lambda each: each.prompt)
            for (task, _), (_, texts) in zip(kept, made, strict=True):
                try:
                    yield Attempted(task, tuple(_judged(task, text, judging) for text in texts))
                except RowError as error:
                    bad(BadRow(task.file, task.line, str(error)))
            bar.update(count)


def _judged(task: Task, made: Completion, judging: Judging) -> Written:
    if made.finish == "error":
        raise RowError(made.error)
    assert made.text is not None
    return Written(made, judge(made.text, task.answers, task.pattern, judging.rules, judging.take))


@dataclass(frozen=True)
class ChannelTasks:
    """One channel, or all of them."""

    channel: str
    tasks: int
    accuracy: float
    """Mean over tasks of the share of right texts (with one sample a task: of right tasks)."""
    low: float
    high: float
    """95 % interval of the accuracy over tasks such as these (Wilson 1927)."""
    cut: int
    """Texts that were cut at max_new_tokens."""
    unmatched: int
    """Texts in which the task's regular expression found nothing."""


class Tally:
    """Counts right tasks by channel."""

    def __init__(self) -> None:
        self._shares: dict[str, list[float]] = defaultdict(list)
        self._cut: dict[str, int] = defaultdict(int)
        self._unmatched: dict[str, int] = defaultdict(int)

    def add(self, attempted: Attempted) -> None:
        """Count one task."""
        for name in ("channel/" + attempted.task.channel, ALL):
            self._shares[name].append(attempted.share())
            self._cut[name] += sum(each.completion.finish == "length" for each in attempted.texts)
            self._unmatched[name] += sum(each.verdict.extracted is None for each in attempted.texts)

    def results(self) -> list[ChannelTasks]:
        """Each channel by name, and at last all together; empty when nothing was counted."""
        names = sorted(name for name in self._shares if name != ALL)
        return [self._result(name) for name in (*names, *([ALL] if names else []))]

    def _result(self, name: str) -> ChannelTasks:
        shares = self._shares[name]
        share = math.fsum(shares) / len(shares)
        low, high = wilson(share, len(shares))
        channel = name.removeprefix("channel/")
        return ChannelTasks(channel, len(shares), share, low, high, self._cut[name], self._unmatched[name])


def wilson(share: float, count: int) -> tuple[float, float]:
    """95 % interval of a share of `count` draws (Wilson 1927): sound for few draws and for shares of 0 and 1.

    With shares of several samples a draw, whose spread is smaller, it is wider than need be.
    """
    square = Z95**2 / count
    middle = (share + square / 2) / (1 + square)
    half = math.sqrt(square * (share * (1 - share) + square / 4)) / (1 + square)
    return max(middle - half, 0.0), min(middle + half, 1.0)
