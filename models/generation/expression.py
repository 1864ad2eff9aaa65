"""Texts that match a regular expression: which tokens may come next, from the library llguidance.

Its masks allow a token if its bytes can still become a match, whatever tokens the text is written in. Regular
expressions are Python's as far as they speak of letters one after another; look-around and back-references do not.
"""

import re
import unicodedata
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from models.generation.config import Finish
from models.generation.text import Tokenizer, decoded

if TYPE_CHECKING:
    import llguidance

_SAMPLE = 200
"""Tokens on which a tokenizer's texts are held against its tokens' bytes."""
_KNOWN = rf"\p{{Age={unicodedata.unidata_version.rpartition('.')[0]}}}"
_PYTHONS = {
    "d": rf"[\p{{Nd}}&&{_KNOWN}]",
    "D": rf"[^\p{{Nd}}&&{_KNOWN}]",
    "w": rf"[[\p{{L}}\p{{N}}_]&&{_KNOWN}]",
    "W": rf"[^[\p{{L}}\p{{N}}_]&&{_KNOWN}]",
    "s": r"[\s\x1c-\x1f]",
    "S": r"[^\s\x1c-\x1f]",
}
"""Classes as this Python has them. The library's own `\\w` has combining marks too, its `\\s` lacks four separators,
and its Unicode has letters that an older Python's has not."""


def _library() -> Any:
    try:
        import llguidance
    except ImportError as err:
        raise ValueError(
            f"regex needs the package llguidance ({err}); pip install llguidance, or give allowed"
        ) from err
    return llguidance


@dataclass(frozen=True)
class _Tokens:
    """The tokenizer as the library asks for it."""

    tokens: Sequence[bytes]
    special_token_ids: Sequence[int]
    eos_token_id: int
    bos_token_id: None = None

    def __call__(self, _: Any) -> list[int]:
        """It could ask for texts in tokens to force these; it is told not to."""
        return []


@dataclass(frozen=True)
class Lettering:
    """The bytes that the tokens of a model stand for."""

    library: Any
    known: "llguidance.LLTokenizer"
    size: int
    """Tokens; the next number is the library's own for the end of a text."""
    drops_space: bool
    """A text is decoded without the space that it begins with, as sentencepiece's are."""

    @staticmethod
    def of(tokenizer: Tokenizer, vocab_size: int) -> "Lettering":
        """Takes about a second for 50,000 tokens.

        Raises:
            ValueError: no library, or a tokenizer whose tokens do not stand for bytes.
        """
        library, backend = _library(), getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ValueError("regex needs a tokenizer that was loaded from tokenizer.json; give allowed instead")
        try:
            raw = library.LLTokenizer(backend.to_str())
        except ValueError as err:
            raise ValueError(f"regex: the tokenizer's bytes are not known ({_first_line(err)}); give allowed") from err
        size = min(raw.vocab_size, vocab_size)
        added = backend.get_added_tokens_decoder()
        special = [i for i in range(size) if raw.is_special_token(i) or (i in added and added[i].special)]
        tokens = [raw.decode_bytes([i]) for i in range(size)]
        wrapped = library.TokenizerWrapper(_Tokens([*tokens, b"<end>"], [*special, size], size))
        drops = _drops_space(tokenizer, tokens, frozenset(special))
        return Lettering(library, library.LLTokenizer(wrapped), size, drops)


def _drops_space(tokenizer: Tokenizer, tokens: Sequence[bytes], special: frozenset[int]) -> bool:
    """Whether the space before a text is lost.

    Raises:
        ValueError: texts are made otherwise than by joining the bytes of tokens.
    """
    plain = [
        i for i, own in enumerate(tokens) if i not in special and own and "\ufffd" not in own.decode(errors="replace")
    ]
    first = [i for i in plain if tokens[i][:1] == b" " and tokens[i][1:2].strip()][:1]
    some = first + plain[:: max(1, len(plain) // _SAMPLE)]
    text, whole = decoded(tokenizer, some), b"".join(tokens[i] for i in some).decode()
    if text in (whole, whole[len(first) :]):
        return text != whole
    raise ValueError("regex: the tokenizer's texts are not its tokens one after another; give allowed instead")


class Expression:
    """A regular expression, made ready.

    Raises:
        ValueError: it is none, has what the library has not, or no text that tokens can write matches it.
    """

    def __init__(self, regex: str, letters: Lettering, ends: frozenset[int]) -> None:
        self.regex, self.letters, self.ends = regex, letters, ends
        library = letters.library.LLMatcher
        grammar = _grammar(regex, letters)
        if problem := library.validate_grammar(grammar):
            raise _wrong(regex, _reason(problem), "write \\ before what stands for itself, or do without")
        self.start = library(letters.known, grammar, log_level=0)
        end_and_stops = np.zeros(letters.size + 1, dtype=bool)
        end_and_stops[[token for token in (*ends, letters.size) if token <= letters.size]] = True
        self.no_text = ~np.packbits(end_and_stops, bitorder="little")
        """Bits of the tokens that can be text, eight a byte."""
        self.first = self.next(self.start)
        if not self.first.any():
            nothing = "no text of the model's tokens matches it"
            reason = "it matches the empty text alone" if self.start.is_accepting() else self.why(self.start, nothing)
            raise _wrong(regex, reason, "write another")

    def next(self, matcher: "llguidance.LLMatcher") -> NDArray[np.uint8]:
        """Bits of the tokens that may come as text."""
        return np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)[: len(self.no_text)] & self.no_text

    def why(self, matcher: "llguidance.LLMatcher", nothing: str) -> str:
        """What is wrong with a matcher that allows no text; `nothing` if it is that."""
        said = _first_line(matcher.get_error())
        return nothing if said in ("", "NoExtensionBias") else said

    def begin(self) -> "Match":
        """A guide for a new row."""
        return Match(self)


class Match:
    """The guide of one row (`constraint.Guide`)."""

    def __init__(self, expression: Expression) -> None:
        self.of, self.bits, self.whole = expression, expression.first, expression.start.is_accepting()
        self._matcher: llguidance.LLMatcher | None = None

    def fill(self, allowed_V: NDArray[np.bool_]) -> None:
        """As in `Guide`."""
        size = self.of.letters.size
        allowed_V[:size] = np.unpackbits(self.bits, count=size, bitorder="little")
        if self.whole:
            allowed_V[list(self.of.ends)] = True

    def take(self, token: int) -> tuple[Finish | None, str]:
        """As in `Guide`."""
        matcher = self._matcher = self._matcher or self.of.start.deep_copy()
        matcher.consume_token(token)
        self.bits, self.whole = self.of.next(matcher), matcher.is_accepting()
        if self.bits.any():
            return None, ""
        if self.whole:
            return "stop", ""
        why = self.of.why(matcher, "no token can follow, since the model has none for some characters")
        return "error", f"regex={self.of.regex!r}: {why}"


def _grammar(regex: str, letters: Lettering) -> str:
    """The library's grammar of the texts that match, which never forces a token."""
    _check(regex)
    # Pairs of a backslash and what it is for, so that the second of two backslashes is none's begin.
    ours = re.sub(r"\\(.)", lambda pair: _PYTHONS.get(pair[1], pair[0]), regex, flags=re.DOTALL)
    term = f"/{letters.library.regex_to_lark(ours, '')}/"
    if letters.drops_space:  # bytes that become a match without their first space, or are one and have none there
        term = f'" " {term} | ({term} & ~/ (?s:.*)/)'
    return f'%llguidance {{"no_forcing": true}}\nstart: TEXT\nTEXT: {term}'


def _check(regex: str) -> None:
    """Raise where Python does, and where the library would read something else."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            re.compile(regex)
    except (re.error, RecursionError, OverflowError) as err:
        raise _wrong(regex, f"is no regular expression ({err})", "write \\ before what stands for itself") from err
    plain = re.sub(r"\\.", "__", regex, flags=re.DOTALL)
    classes = re.compile(r"\[\^?(\]?[^\]]*)\]")
    for found in classes.finditer(plain):
        if re.search(r"\[|&&|--|~~", found[1]):
            raise _wrong(regex, f"has {found[0]}, which would be sets in sets", "write \\ before [, &, - or ~")
    if re.search(r"[*+?}]\+", classes.sub("_", plain)):
        raise _wrong(regex, "has a possessive repetition", "leave out its +")


def _wrong(regex: str, reason: str, way: str) -> ValueError:
    return ValueError(f"regex={regex!r}: {reason}; {way}")


def _reason(problem: str) -> str:
    """The library's reason from its long answer."""
    for said in (r"^error: (.*)$", r"\(in regex\): (.*)$"):
        if found := re.search(said, problem, flags=re.MULTILINE):
            return found[1]
    return _first_line(problem)


def _first_line(said: object) -> str:
    return str(said).strip().split("\n")[0]
