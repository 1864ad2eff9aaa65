"""The adapter section of virtual tokens: learnt ones that every document begins with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from models.config import Problem


@dataclass(frozen=True)
class PromptConfig:
    """Embeddings that stand before those of every document (Lester et al. 2021, prompt tuning)."""

    name: Literal["prompt"] = "prompt"
    """Which kind of adapter."""
    tokens: int = 20
    """Virtual tokens that every document begins with; its own tokens have the positions after them."""
    tokens_init: Literal["vocab", "text", "random"] = "vocab"
    """What they begin as: vocab = embeddings of tokens drawn from the vocabulary, text = those of adapter.init_text,
    random = a normal distribution; of prefix also zero = keys and values of 0, which take a share of the attention
    (random ones spoil the model at first)."""
    init_text: str | None = None
    """Text whose embeddings the virtual tokens begin as; repeated or cut to their number (tokens_init=text)."""
    start: str | None = None
    """Folder of an adapter in peft's format to start from."""

    can_be_off: ClassVar[bool] = True

    def problems(self) -> list[Problem]:
        """Values wrong in themselves."""
        found = _tokens(self.tokens)
        if (self.tokens_init == "text") != (self.init_text is not None):
            reason = "needs adapter.init_text" if self.tokens_init == "text" else "does not read adapter.init_text"
            way = "adapter.tokens_init=text 'adapter.init_text=Classify the review:'"
            way += ", or adapter.tokens_init=vocab adapter.init_text=null"
            found.append(("tokens_init", self.tokens_init, reason, way))
        elif self.init_text is not None and not self.init_text.strip():
            found.append(("init_text", self.init_text, "is empty", "'adapter.init_text=Classify the review:'"))
        return found


@dataclass(frozen=True)
class PrefixConfig:
    """Keys and values in every layer that stand before those of every document (Li & Liang 2021, prefix tuning)."""

    name: Literal["prefix"] = "prefix"
    """Which kind of adapter."""
    tokens: int = 20
    """Virtual tokens that every document begins with; its own tokens have the positions after them."""
    tokens_init: Literal["zero", "random"] = "zero"
    """What they begin as: zero = keys and values of 0, which take a share of the attention; random = a normal
    distribution, as `peft` does, from which the model has to find back."""
    start: str | None = None
    """Folder of an adapter in peft's format to start from."""

    can_be_off: ClassVar[bool] = True

    def problems(self) -> list[Problem]:
        """Values wrong in themselves."""
        return _tokens(self.tokens)


VirtualConfig = PromptConfig | PrefixConfig


def _tokens(tokens: int) -> list[Problem]:
    return [] if tokens >= 1 else [("tokens", tokens, "must be at least 1", "adapter.tokens=20")]
