"""A prompt to write answers to. A file of its own: processes that only judge answers need no more of this room."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Prompt:
    """One prompt with everything its row says, for generation and for the functions that judge the answers."""

    number: int
    """Its place in the order of the run, or among the held-out prompts: names it in records and seeds. A prompt that
    comes again, in another epoch or by its source's weight, has another number."""
    channel: int
    """Index into the run's channels."""
    channel_name: str
    tokens: tuple[int, ...]
    """The prompt as the model sees it: the chat template's generation prompt (or BOS) included."""
    text: str
    """What was tokenised: the rendered conversation, or the plain prompt."""
    messages: tuple[dict[str, Any], ...] | None
    """The conversation up to the answer that is asked for; None where the row has a plain text."""
    fields: Mapping[str, Any]
    """The row's other fields as they are (answers, task, tools): what reward functions are given."""
    row: int = -1
    """Its place among all rows of the run's sources: the same whenever the prompt comes again."""
    patches: int = 0
    """Of the pictures that it shows; 0 = it shows none. Their features' places are among `tokens`."""
