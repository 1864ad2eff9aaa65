"""Prompts to write answers to: what a row of a source gives to reinforcement learning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Prompt:
    """One prompt with everything its row says, for generation and for the functions that judge the answers."""

    number: int
    """Its place among all prompts of the run, held-out ones included: names it in records and seeds."""
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
