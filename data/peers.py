"""How `data` hears of the other ranks without importing torch.distributed: a gather that comes in from outside."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

Result = TypeVar("Result")


@dataclass(frozen=True)
class Peers:
    """This rank among `world` ranks; `all_gather` gives every rank the list of all ranks' objects, in rank order."""

    rank: int
    world: int
    all_gather: Callable[[Any], list[Any]]

    @staticmethod
    def alone() -> Peers:
        """One process, nobody to ask."""
        return Peers(0, 1, lambda obj: [obj])

    def run(self, work: Callable[[], Result]) -> list[Result]:
        """Do `work` on every rank and return all results in rank order.

        An error on one rank never leaves the others waiting: everyone hears of it in the gather and raises.

        Raises:
            ValueError: some rank's `work` raised ValueError (the user's mistake); the message is that rank's.
            RuntimeError: some other rank's `work` raised anything else; this rank's own error is raised as it is.
        """
        error: Exception | None = None
        result: Result | None = None
        try:
            result = work()
        except Exception as err:  # re-raised below, after the other ranks have been told
            error = err
        told = None if error is None else (isinstance(error, ValueError), type(error).__name__, str(error))
        answers = self.all_gather((told, result))
        failed = [(rank, told) for rank, (told, _) in enumerate(answers) if told is not None]
        if not failed:
            return [result for _, result in answers]
        if error is not None:
            raise error
        rank, (users_mistake, name, message) = failed[0]
        raise ValueError(message) if users_mistake else RuntimeError(f"rank {rank} failed: {name}: {message}")

    def from_first(self, work: Callable[[], Result]) -> Result:
        """Do `work` on rank 0 only and give its result (or its error) to every rank."""
        return cast(Result, self.run(lambda: work() if self.rank == 0 else None)[0])
