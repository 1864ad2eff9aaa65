"""Megatron's arguments as another program left them: read with Megatron's defaults, every problem noted."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

HELP = "convert it with the tool it was written by, or train a model of one of the families here"


@dataclass(frozen=True)
class Given:
    """The values, and what is wrong with them; `check` tells all of it at once."""

    values: Mapping[str, Any]
    problems: list[str] = field(default_factory=list)

    def get(self, *keys: str, default: Any = None) -> Any:
        """The first of these keys (one name and its other spellings) that has a value."""
        return next((self.values[key] for key in keys if self.values.get(key) is not None), default)

    def named(self, *keys: str) -> str:
        """Which of these keys has a value, or the first."""
        return next((key for key in keys if self.values.get(key) is not None), keys[0])

    def count(self, *keys: str, default: int | None = None, least: int = 1) -> int:
        """A whole number of at least `least`; without a default it must be there."""
        value = self.get(*keys, default=default)
        if value is None:
            self.refuse(keys[0], None, "is missing", "give the checkpoint as Megatron saved it, with its args")
        elif type(value) is not int or value < least:
            reason = f"must be a whole number of at least {least}"
            self.refuse(self.named(*keys), value, reason, "check the args the checkpoint was saved with")
        else:
            return value
        return least

    def number(self, *keys: str, default: float) -> float:
        """A number."""
        value = self.get(*keys, default=default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            reason = "must be a number"
            self.refuse(self.named(*keys), value, reason, "check the args the checkpoint was saved with")
            return default
        return float(value)

    def refuse(self, key: str, value: object, reason: str, way_out: str = HELP) -> None:
        """Note a problem."""
        self.problems.append(f"{key}={value!r}: {reason}; {way_out}")

    def check(self) -> None:
        """Tell every problem.

        Raises:
            ValueError: there is one.
        """
        if self.problems:
            count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
            lines = "\n".join(f"  {problem}" for problem in self.problems)
            raise ValueError(f"The args of the Megatron checkpoint have {count}:\n{lines}")
