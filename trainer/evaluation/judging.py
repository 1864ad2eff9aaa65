"""Whether a text is the answer that was wanted: taken out by a regular expression, made alike, compared."""

from __future__ import annotations

import re
import unicodedata
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, get_args

import regex

from data.formats import RowError

Rule = Literal["case", "whitespace", "punctuation", "numbers"]
RULES: tuple[Rule, ...] = get_args(Rule)
"""What may be made alike in both texts before they are compared:

case: upper and lower case;
whitespace: each run of white space becomes one space, none is left at the ends;
punctuation: quotes, brackets and marks such as * around the text, and . , ; : ! ? behind it;
numbers: a text that is a number is compared by value: 1,200.50 = 1200.5 = $1,200.50, 0.5 = 1/2, 3e2 = 300.
"""
Take = Literal["first", "last"]
"""Which of a regular expression's matches."""

_AROUND = "\"'`*_()[]{}«»“”„‘’‚「」『』"
_BEHIND = _AROUND + ".,;:!?…。、！？"
_DECIMAL = re.compile(r"([-+−]?)[$€£¥]?((?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)([eE][-+]?\d{1,3})?", re.ASCII)
_FRACTION = re.compile(r"([-+−]?)(\d+/0*[1-9]\d*)", re.ASCII)
_LONGEST = 200
"""Characters of a number."""
_SECONDS = 1.0
"""A regular expression that takes longer on one text runs away; some would for years."""


@dataclass(frozen=True)
class Verdict:
    """What was compared, and whether it is right."""

    extracted: str | None
    """The regular expression's first group, or all that it matched; the whole text without one; None = no match."""
    right: bool


def judge(text: str, answers: Collection[str], pattern: str | None, rules: Collection[Rule], take: Take) -> Verdict:
    """Right is a text that equals one of the answers. With a pattern, what it takes out of the text must; with a
    pattern and no answers, any match is right.

    Raises:
        RowError: the pattern runs away on this text.
    """
    found = text if pattern is None else extract(text, pattern, take)
    if found is None or not answers:
        return Verdict(found, found is not None)
    same = normalised(found, rules)
    return Verdict(found, any(normalised(answer, rules) == same for answer in answers))


def check_pattern(pattern: str) -> None:
    """That a text is a regular expression.

    Raises:
        RowError: it is not.
    """
    try:
        regex.compile(pattern)
    except (regex.error, OverflowError, RecursionError) as error:
        raise RowError(f"regex {pattern!r} is no regular expression: {error}") from error


def extract(text: str, pattern: str, take: Take) -> str | None:
    """The first or last match: its first group that took part, or all of it where there is none; None = no match.

    Raises:
        RowError: it takes too long.
    """
    try:
        matches = regex.compile(pattern).finditer(text, timeout=_SECONDS)
        found = next(matches, None) if take == "first" else next(iter(deque(matches, 1)), None)
    except TimeoutError as error:
        raise RowError(
            f"regex {pattern!r} runs away: more than {_SECONDS:g} s on an answer of {len(text)} characters; "
            "write it without repeats inside repeats"
        ) from error
    if found is None:
        return None
    return next((group for group in found.groups() if group is not None), found.group())


def normalised(text: str, rules: Collection[Rule]) -> str:
    """A text as it is compared; Unicode's composed form (NFC) in any case."""
    text = unicodedata.normalize("NFC", text)
    if "whitespace" in rules:
        text = " ".join(text.split())
    if "numbers" in rules:
        value = number(text) or ("punctuation" in rules and number(_bare(text))) or None
        if value is not None:
            return value
    if "punctuation" in rules:
        text = _bare(text)
    return text.casefold() if "case" in rules else text


def number(text: str) -> str | None:
    """A number written in one way, as a fraction in lowest terms; None for other texts."""
    text = text.strip()
    if len(text) > _LONGEST:
        return None
    if found := _FRACTION.fullmatch(text):
        sign, value = found[1], Fraction(found[2])
    elif found := _DECIMAL.fullmatch(text):
        sign, value = found[1], Fraction(found[2].replace(",", "") + (found[3] or ""))
    else:
        return None
    return str(-value if sign in ("-", "−") else value)


def _bare(text: str) -> str:
    return text.lstrip(_AROUND + " ").rstrip(_BEHIND + " ")
