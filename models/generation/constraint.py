"""What a row may draw next where its settings say what its text must be: one of some texts, a match of a regular
expression, or made of some tokens only. A guide walks along with its row, token by token.

What may not come gets no chance before temperature and filters, so these always find a token that may.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from models.generation.config import Finish, SamplingConfig, Settings
from models.generation.expression import Expression, Lettering
from models.generation.text import Tokenizer, decoded


class Guide(Protocol):
    """Of one row."""

    def fill(self, allowed_V: NDArray[np.bool_]) -> None:
        """Mark the tokens that may come next; all are unmarked. Some token is left as long as `take` ended nothing."""
        ...

    def take(self, token: int) -> tuple[Finish | None, str]:
        """The row got this token, which does not end it: whether it ends now all the same, and if by an error, why."""
        ...


_KEPT = 16
"""Constraints that stay ready, for requests that come one by one."""
Begin = Callable[[], Guide]
"""A guide for a new row."""


def permitted(logits_NV: torch.Tensor, guides: Sequence[Guide | None]) -> torch.Tensor:
    """The logits, -inf where a row's guide forbids a token; the given ones stay as they are."""
    guided = [row for row, guide in enumerate(guides) if guide is not None]
    if not guided:
        return logits_NV
    allowed = np.ones(logits_NV.shape, dtype=bool)
    allowed[guided] = False
    for row, guide in enumerate(guides):
        if guide is not None:
            guide.fill(allowed[row])
    return logits_NV.where(torch.from_numpy(allowed).to(logits_NV.device), float("-inf"))


class Constraints:
    """What settings ask for, made ready for one tokenizer and one model's tokens."""

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int) -> None:
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        self._lettering: Lettering | None = None
        self._tree = lru_cache(_KEPT)(self._made_tree)
        self._expression = lru_cache(_KEPT)(self._made_expression)

    def all_of(
        self, settings: Iterable[Settings], stop_tokens: Sequence[int]
    ) -> tuple[dict[Settings, Begin | None], list[str]]:
        """`of` for each, and a line for each that cannot be. `stop_tokens` are of those that name none."""
        found: dict[Settings, Begin | None] = {}
        lines: list[str] = []
        for each in settings:
            ends = stop_tokens if each.stop_tokens is None else each.stop_tokens
            try:
                found[each] = self.of(each, ends) if isinstance(each, SamplingConfig) else None
            except ValueError as err:
                lines.append(str(err))
        return found, sorted(lines)

    def of(self, cfg: SamplingConfig, stop_tokens: Sequence[int]) -> Begin | None:
        """Guides for rows of these settings; None where they ask for nothing.

        Raises:
            ValueError: what they ask for cannot be; one line with key, value, reason and way out.
        """
        ends = frozenset(token for token in stop_tokens if token < self.vocab_size)
        if cfg.allowed_tokens is not None:
            tokens = _Tokens(self._known(cfg.allowed_tokens))
            return lambda: tokens
        if cfg.allowed is None and cfg.regex is None:
            return None
        key = "allowed" if cfg.regex is None else "regex"
        if self.tokenizer is None:
            raise ValueError(f"{key} is about text and there is no tokenizer; give one, or allowed_tokens instead")
        if cfg.allowed is not None:
            root, least = self._tree(cfg.allowed, ends)
            if least > cfg.max_new_tokens:
                raise ValueError(
                    f"max_new_tokens={cfg.max_new_tokens}: the shortest of the allowed texts takes {least} tokens; "
                    f"max_new_tokens={least} or more"
                )
            return lambda: _Choice(root, ends)
        assert cfg.regex is not None
        return self._expression(cfg.regex, ends).begin

    def _made_tree(self, texts: tuple[str, ...], ends: frozenset[int]) -> tuple["_Node", int]:
        """Of the texts, and the tokens of the shortest."""
        assert self.tokenizer is not None
        root = _tree(texts, self.tokenizer, self.vocab_size, ends)
        return root, _shortest(root)

    def _made_expression(self, regex: str, ends: frozenset[int]) -> Expression:
        assert self.tokenizer is not None
        if self._lettering is None:
            self._lettering = Lettering.of(self.tokenizer, self.vocab_size)
        return Expression(regex, self._lettering, ends)

    def _known(self, tokens: Sequence[int]) -> NDArray[np.int64]:
        for token in tokens:
            if token >= self.vocab_size:
                raise ValueError(
                    f"allowed_tokens has {token} and the model knows 0 to {self.vocab_size - 1}; leave it out"
                )
        return np.array(tokens)


@dataclass(frozen=True)
class _Tokens:
    """Always the same tokens."""

    ids: NDArray[np.int64]

    def fill(self, allowed_V: NDArray[np.bool_]) -> None:
        allowed_V[self.ids] = True

    def take(self, token: int) -> tuple[Finish | None, str]:
        return None, ""


@dataclass
class _Node:
    """A place in the tree of the allowed texts' tokens."""

    after: dict[int, "_Node"] = field(default_factory=dict)
    whole: bool = False
    """A text ends here."""


@dataclass
class _Choice:
    """One of the texts, each in the tokens in which the tokenizer writes it."""

    node: _Node
    ends: frozenset[int]

    def fill(self, allowed_V: NDArray[np.bool_]) -> None:
        allowed_V[list(self.node.after)] = True
        if self.node.whole:
            allowed_V[list(self.ends)] = True

    def take(self, token: int) -> tuple[Finish | None, str]:
        self.node = self.node.after[token]
        return None if self.node.after else "stop", ""


def _tree(texts: Sequence[str], tokenizer: Tokenizer, vocab_size: int, ends: frozenset[int]) -> _Node:
    root, written = _Node(), {text: _spelled(text, tokenizer) for text in texts}
    for text, tokens in written.items():
        if decoded(tokenizer, tokens) != text:
            become = decoded(tokenizer, tokens)
            raise ValueError(f"allowed has {text!r}: the tokenizer makes it {become!r}; give texts that it can write")
        if bad := [token for token in tokens if token >= vocab_size or token in ends]:
            why = f"has stop token {bad[0]}" if bad[0] in ends else f"has token {bad[0]}, which the model does not know"
            raise ValueError(f"allowed has {text!r}: it {why}; leave it out or change stop_tokens")
        node = root
        for token in tokens:
            node = node.after.setdefault(token, _Node())
        node.whole = True
    for text, tokens in written.items():
        if not ends and _at(root, tokens).after:
            raise ValueError(
                f"allowed has {text!r}: others go on from there, and it has no stop token to end with; give stop_tokens"
            )
    return root


def _at(root: _Node, tokens: Sequence[int]) -> _Node:
    for token in tokens:
        root = root.after[token]
    return root


def _spelled(text: str, tokenizer: Tokenizer) -> list[int]:
    """A text's tokens without those that the tokenizer puts around every text."""
    around, tokens = list(tokenizer.encode("")), list(tokenizer.encode(text))
    front = next((i for i, (one, other) in enumerate(zip(around, tokens, strict=False)) if one != other), len(around))
    return tokens[front : len(tokens) - (len(around) - front)]


def _shortest(root: _Node) -> int:
    """Tokens of the shortest text, with the stop token that a text needs from which others go on."""
    level, depth = [root], 0
    while True:
        if any(node.whole and not node.after for node in level):
            return depth
        if any(node.whole for node in level):
            return depth + 1
        level, depth = [child for node in level for child in node.after.values()], depth + 1
