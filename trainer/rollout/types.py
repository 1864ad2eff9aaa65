"""What goes into a rollout and what comes out of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from data.prompt import Prompt

if TYPE_CHECKING:  # processes that only judge texts read this file too, and have no use for torch
    from models.generation import Completion, SamplingConfig

__all__ = ["Answer", "Finish", "Prompt", "Rollout", "Turn", "Writer"]

Finish = Literal["stop", "length", "turns", "error"]
"""The policy ended its text (and the task the conversation); no room for new tokens was left; the task would have gone
on, but `max_turns` were used; the prompt could not be run (`Rollout.errors["generation"]` says why)."""


@dataclass(frozen=True)
class Turn:
    """A run of tokens behind the prompt that one side wrote."""

    role: str
    """assistant = the policy; tool, user = the task."""
    text: str
    start: int
    """Its tokens are `tokens[start:stop]` of the rollout."""
    stop: int

    @property
    def learnt(self) -> bool:
        """Whether the policy wrote it."""
        return self.role == "assistant"


@dataclass(frozen=True)
class Answer:
    """What a task says to the policy's last text."""

    text: str | None
    """None ends the conversation."""
    reward: float = 0.0
    """Added to the part of the reward called `task`."""


@dataclass(frozen=True)
class Rollout:
    """One sample of one prompt. All sequences over tokens have the length of `tokens`."""

    prompt: Prompt
    sample: int
    """0 .. samples-1: the samples of one prompt are a group."""
    tokens: tuple[int, ...]
    """The prompt and everything after it, in the order in which the policy saw it."""
    learn: tuple[bool, ...]
    """Written by the policy (its stop tokens included): False for the prompt and for what a task put in."""
    log_probs: tuple[float, ...]
    """nats, the generator's own, under the distribution each token was drawn from; 0 where `learn` is False."""
    text: str
    """The last thing the policy wrote, without its stop token."""
    finish: Finish
    turns: tuple[Turn, ...]
    rewards: Mapping[str, float] = field(default_factory=dict)
    """Parts of the reward by name, unweighted; 0 where a part failed."""
    reward: float = 0.0
    """The weighted sum of the parts."""
    errors: Mapping[str, str] = field(default_factory=dict)
    """Why a part of the reward (or "generation", or "task") failed."""

    @property
    def new_tokens(self) -> int:
        """Tokens the policy wrote."""
        return sum(self.learn)

    @property
    def written(self) -> str:
        """All that the policy wrote, a line break between its turns."""
        return "\n".join(turn.text for turn in self.turns if turn.learnt)


class Writer(Protocol):
    """The policy as an author: Loom's generator on training weights, a vLLM server, or a fake in a test."""

    def write(
        self,
        prompts: Sequence[tuple[int, ...]],
        samples: int,
        settings: SamplingConfig,
        seeds: Sequence[int],
        shown: Sequence[Prompt] | None = None,
    ) -> list[list[Completion]]:
        """`samples` texts for each prompt, with log-probabilities where `settings.log_probs`.

        Args:
            samples: how many for each prompt (`settings.samples` is not looked at).
            seeds: one a prompt; sample s of a prompt draws by (seed, s), whatever else is written beside it.
            shown: what each of `prompts` begins with, and whose pictures it shows; None = nothing is shown.

        Returns:
            For each prompt its completions by sample. A prompt that cannot be run has completions with finish="error".
            The same on every rank that calls.
        """
        ...
