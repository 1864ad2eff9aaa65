"""What a stage is: its name, which tokens it learns from, and its loss over one micro-batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class StageConfig:
    """The stage section."""

    name: Literal["pretrain", "sft"] = "sft"
    """Which training stage to run."""
    loss_on: Literal["assistant", "all"] = "assistant"
    """Tokens that carry loss: only the assistant's (chat) or completion's, or every token."""
