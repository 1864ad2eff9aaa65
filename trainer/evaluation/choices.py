"""Multiple choice by log-likelihood: the choice that the model would most likely write after the prompt.

A choice's score is the sum of log p(token | everything before) over the tokens that share a character with it or with
the spaces before it; two more scores divide that by its tokens and by its UTF-8 bytes, since a long choice is less
likely than a short one. Documents are packed without padding, and one that is the beginning of another of the same
question is not computed again: choices of one token, such as letters, cost their prompt once.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
from tqdm import tqdm

from data.cache_files import BadRow
from data.chat import Render
from data.encode import mask_from_spans
from data.formats import RowError
from data.tokenizer import describe
from trainer.evaluation.questions import Question
from trainer.evaluation.rows import windows
from trainer.evaluation.scorer import Scorer
from trainer.evaluation.tokens import check_ids

WINDOW = 256
"""Questions in memory at one time; among them documents are sorted by length."""
ALL = "all"
RULES = ("sum", "per_token", "per_byte")
"""The three ways to compare choices."""


@dataclass(frozen=True)
class Choice:
    """One choice behind its prompt."""

    tokens_L: np.ndarray
    asked_A: np.ndarray
    """Places of the tokens that are the choice, each at least 1."""


@dataclass(frozen=True)
class Answered:
    """A question and what the model gives its choices."""

    question: Question
    log_likelihood: tuple[float, ...]
    """Of each choice, in nats."""
    tokens: tuple[int, ...]
    """Of each choice."""

    def scores(self) -> dict[str, list[float]]:
        """What is compared, by rule."""
        sizes = [len(choice.encode("utf-8")) for choice in self.question.choices]
        return {
            "sum": list(self.log_likelihood),
            "per_token": [score / n for score, n in zip(self.log_likelihood, self.tokens, strict=True)],
            "per_byte": [score / n for score, n in zip(self.log_likelihood, sizes, strict=True)],
        }

    def right(self) -> dict[str, bool]:
        """Whether the best choice is the answer, by rule."""
        return {rule: int(np.argmax(scores)) == self.question.answer for rule, scores in self.scores().items()}


class QuestionEncoder:
    """Questions to tokens.

    Args:
        tokenizer: a fast `transformers` tokenizer.
        folder: where it lies, for messages.
        scorer: the model, whose context and vocabulary are the limits.
        render: the chat template; the question is the user's turn and a choice is the answer. None = plain text.
        separator: what stands between prompt and choice in plain text, unless the prompt ends in white space.
    """

    def __init__(
        self, tokenizer: Any, folder: str, scorer: Scorer, render: Render | None = None, separator: str = " "
    ) -> None:
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._folder, self._scorer, self._render, self._separator = folder, scorer, render, separator
        info = describe(tokenizer)
        self._bos = info.bos_id if info.adds_bos else None

    def encode(self, question: Question) -> list[Choice]:
        """The choices of a question, each behind its prompt.

        Raises:
            RowError: too long, or the chat template refuses it.
            ValueError: the tokenizer makes ids that the model has not.
        """
        prompt = self._prompt(question.prompt)
        texts = [prompt + choice for choice in question.choices]
        encodings = self._backend.encode_batch(texts, add_special_tokens=False)
        # A space before a choice may be a token of its own or part of the choice's first: it counts for all alike.
        begin = len(prompt.rstrip(" "))
        return [self._choice(*each, begin) for each in zip(texts, encodings, strict=True)]

    def _prompt(self, text: str) -> str:
        if self._render is not None:
            return self._render([{"role": "user", "content": text}], None, True)
        return text if text[-1].isspace() else text + self._separator

    def _choice(self, text: str, encoding: Any, begin: int) -> Choice:
        tokens_L = np.array(encoding.ids, dtype=np.int64)
        offsets_L2 = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        mask_L = mask_from_spans(offsets_L2, ((begin, len(text)),))
        if self._render is None and self._bos is not None:
            tokens_L, mask_L = np.insert(tokens_L, 0, self._bos), np.insert(mask_L, 0, False)
        if len(tokens_L) > self._scorer.context:
            raise RowError(
                f"prompt and choice are {len(tokens_L)} tokens, and the model's context is {self._scorer.context}"
            )
        check_ids(int(tokens_L.max(initial=0)), self._folder, self._scorer.vocab_size)
        if not mask_L.any() or mask_L[0]:
            raise RowError("prompt and choice share their first token: there is nothing before the choice")
        return Choice(tokens_L, np.flatnonzero(mask_L))


@dataclass
class _Document:
    """Tokens to compute once, and what is asked of them."""

    tokens_L: np.ndarray
    asks: list[tuple[int, Choice]] = field(default_factory=list)
    """(number of the choice in the window, choice)"""


def answer(
    scorer: Scorer,
    questions: Iterable[Question | BadRow],
    encoder: QuestionEncoder,
    batch_tokens: int,
    bad: Callable[[BadRow], None],
) -> Iterator[Answered]:
    """Answer questions in order.

    Args:
        batch_tokens: most tokens of a forward pass, but at least one document. Changes no result.
        bad: is told of every row that is passed over.
    """
    with tqdm(unit="question", desc="questions", disable=None) as bar:
        for count, kept in windows(questions, encoder.encode, WINDOW, bad):
            sums = _log_likelihoods(scorer, [choices for _, choices in kept], batch_tokens)
            for (question, choices), values in zip(kept, sums, strict=True):
                yield Answered(question, values, tuple(len(choice.asked_A) for choice in choices))
            bar.update(count)


def _log_likelihoods(scorer: Scorer, asked: list[list[Choice]], batch_tokens: int) -> list[tuple[float, ...]]:
    """Of each question's choices."""
    documents, number = [], 0
    for choices in asked:
        documents += _documents(choices, number)
        number += len(choices)
    sums = np.zeros(number)
    for batch in _batches(documents, batch_tokens):
        owner, rows, targets, start = [], [], [], 0
        for document in batch:
            for index, choice in document.asks:
                owner.append(np.full(len(choice.asked_A), index))
                rows.append(start + choice.asked_A - 1)
                targets.append(choice.tokens_L[choice.asked_A])
            start += len(document.tokens_L)
        losses = scorer.asked([d.tokens_L for d in batch], np.concatenate(rows), np.concatenate(targets))
        np.subtract.at(sums, np.concatenate(owner), losses.double().numpy())
    values = iter(sums.tolist())
    return [tuple(islice(values, len(choices))) for choices in asked]


def _documents(choices: Sequence[Choice], first: int) -> list[_Document]:
    """What must be computed for a question: the last token of a choice is never an input, and no document begins
    another one. Choices are numbered from `first`."""
    found: list[_Document] = []
    for index in sorted(range(len(choices)), key=lambda index: -len(choices[index].tokens_L)):
        inputs_L = choices[index].tokens_L[:-1]
        longer = (d for d in found if np.array_equal(d.tokens_L[: len(inputs_L)], inputs_L))
        document = next(longer, None)
        if document is None:
            found.append(document := _Document(inputs_L))
        document.asks.append((first + index, choices[index]))
    return found


def _batches(documents: list[_Document], batch_tokens: int) -> Iterator[list[_Document]]:
    """Longest first, so that equal lengths stand side by side."""
    batch, total = [], 0
    for document in sorted(documents, key=lambda document: -len(document.tokens_L)):
        if batch and total + len(document.tokens_L) > batch_tokens:
            yield batch
            batch, total = [], 0
        batch.append(document)
        total += len(document.tokens_L)
    if batch:
        yield batch


@dataclass(frozen=True)
class ChannelAccuracy:
    """One channel, or all of them."""

    channel: str
    questions: int
    accuracy: dict[str, float]
    """By rule: `sum`, `per_token`, `per_byte`."""
    error: dict[str, float | None]
    """One standard error of each over questions; None for a single one."""
    chance: float
    """Accuracy of guessing."""


class Tally:
    """Counts answers by channel."""

    def __init__(self) -> None:
        self._count: dict[str, int] = defaultdict(int)
        self._chance: dict[str, float] = defaultdict(float)
        self._right: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(RULES, 0))

    def add(self, answered: Answered) -> None:
        """Count one answer."""
        right = answered.right()
        for name in ("channel/" + answered.question.channel, ALL):
            self._count[name] += 1
            self._chance[name] += 1 / len(answered.question.choices)
            for rule in RULES:
                self._right[name][rule] += right[rule]

    def results(self) -> list[ChannelAccuracy]:
        """Each channel by name, and at last all together; empty when nothing was counted."""
        names = sorted(name for name in self._count if name != ALL)
        return [self._result(name) for name in (*names, *([ALL] if names else []))]

    def _result(self, name: str) -> ChannelAccuracy:
        n = self._count[name]
        share = {rule: self._right[name][rule] / n for rule in RULES}
        error = {rule: math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else None for rule, p in share.items()}
        return ChannelAccuracy(name.removeprefix("channel/"), n, share, error, self._chance[name] / n)
