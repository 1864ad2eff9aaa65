"""Text of a row while it grows: whole characters only, and an end at the first stop string."""

from collections.abc import Sequence
from copy import copy
from typing import Any, Protocol

_HALF = "\ufffd"
"""What a decoder writes for bytes that are no whole character."""


class Tokenizer(Protocol):
    """What is needed of a tokenizer; those of `transformers` have it."""

    eos_token_id: Any

    def encode(self, text: str, /) -> list[int]: ...

    def decode(self, token_ids: Any, /, *, skip_special_tokens: bool) -> Any: ...


def decoded(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    """The text of tokens, without special ones."""
    text = tokenizer.decode(list(tokens), skip_special_tokens=True)
    assert isinstance(text, str)
    return text


class TextStream:
    """The text of one row, token by token.

    Only the last few tokens are decoded again, from a place that was whole text, because some tokenizers write the
    first token of a text without its space.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.text = ""
        """All of it up to here, or up to the stop string."""
        self.stopped = False
        self._tokens: list[int] = []
        self._from = self._until = self._given = 0

    def fork(self) -> "TextStream":
        """A stream of its own that goes on from here."""
        other = copy(self)
        other._tokens = list(self._tokens)
        return other

    def push(self, token: int) -> None:
        """Take the next token; `text` and `stopped` then tell of it."""
        self._tokens.append(token)
        whole = decoded(self.tokenizer, self._tokens[self._from :])
        if not whole.endswith(_HALF):
            self._add(whole)
            self._from, self._until = self._until, len(self._tokens)

    def finish(self) -> None:
        """No more comes: halves of characters are given as they are."""
        if self._until < len(self._tokens) and not self.stopped:
            self._add(decoded(self.tokenizer, self._tokens[self._from :]))

    def new(self, ended: bool) -> str:
        """The text that was not given yet, without an end that may become a stop string (unless the row ended)."""
        sure = len(self.text) if ended else len(self.text) - self._undecided()
        given, self._given = self._given, max(sure, self._given)
        return self.text[given : self._given]

    def _add(self, whole: str) -> None:
        old = len(self.text)
        self.text += whole[len(decoded(self.tokenizer, self._tokens[self._from : self._until])) :]
        found = [self.text.find(stop, max(0, old - len(stop) + 1)) for stop in self.stop]
        first = min((at for at in found if at >= 0), default=None)
        if first is not None:
            self.text, self.stopped = self.text[:first], True

    def _undecided(self) -> int:
        """Longest end of the text that a stop string begins with."""
        return max(
            (n for stop in self.stop for n in range(1, len(stop)) if self.text.endswith(stop[:n])),
            default=0,
        )
