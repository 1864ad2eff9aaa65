"""One problem of a configuration, and how several are told in one calm message."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """A setting that cannot work: which, what it was, why not, and what would.

    ``way_out`` may be several ways, one a line. Neighbours with the same ways have one way out together.
    """

    key: str
    value: object
    reason: str
    way_out: str


def format_problems(problems: Sequence[Problem]) -> str:
    """All problems as one message, in the order they were found.

    >>> print(format_problems([Problem("engine.zero", 4, "ZeRO has stages 0 to 3", "engine.zero=3")]))
    The configuration has 1 problem; nothing was started.
      engine.zero = 4
          ZeRO has stages 0 to 3
          try: engine.zero=3
    """
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    lines = [f"The configuration has {count}; nothing was started."]
    for problem, after in zip(problems, [*problems[1:], None], strict=True):
        lines.append(f"  {problem.key} = {_show(problem.value)}")
        lines.append(f"      {problem.reason}")
        if after is None or after.way_out != problem.way_out or "\n" not in problem.way_out:
            lines += _ways(problem.way_out)
    return "\n".join(lines)


def _ways(way_out: str) -> list[str]:
    """The ways out, one a line."""
    first, *others = way_out.split("\n")
    lead = "" if first.startswith("did you mean") else "try: "
    return [f"      {lead}{first}", *(f"       or: {way}" for way in others)]


def nearest(word: str, choices: Iterable[str], limit: int = 3) -> list[str]:
    """The choices spelled most like ``word``, best first; letter case does not count. Empty when none is close."""
    by_lower: dict[str, list[str]] = {}
    for choice in choices:
        by_lower.setdefault(choice.lower(), []).append(choice)
    close = difflib.get_close_matches(word.lower(), by_lower, n=limit, cutoff=0.6)
    return [choice for lower in close for choice in by_lower[lower]][:limit]


def _show(value: object) -> str:
    """A value as the user would have written it, cut when long."""
    if value is None or isinstance(value, bool):
        text = "null" if value is None else str(value).lower()
    else:
        text = value if isinstance(value, str) and value else repr(value)
    return text if len(text) <= 160 else text[:157] + "..."
