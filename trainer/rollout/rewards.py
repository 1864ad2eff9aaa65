"""What texts are worth: every part of the reward for every sample, and their weighted sum.

A part that fails on a sample (it raises, takes too long, gives no finite number) is worth 0 there and its reason is
kept; no function of the user's can end a run or hold it up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from trainer.rollout.config import OTHERS, RewardFunctionConfig, RolloutConfig
from trainer.rollout.crew import Crew, Job
from trainer.rollout.types import Rollout
from trainer.rollout.worker import Call, Outcome, attempt

Tell = Callable[[str], None]


class Rewards:
    """The rule functions of a config.

    Args:
        crew: processes for functions that may hang; only used if there are such.
        tell: takes the first error of each part, to be shown to the user.
    """

    def __init__(self, cfg: RolloutConfig, crew: Crew, tell: Tell) -> None:
        self.cfg, self.crew, self.tell = cfg, crew, tell
        self.functions = [each for each in cfg.rewards if each.function not in OTHERS]
        self._told: set[str] = set()

    def check(self) -> None:
        """Load the functions that run in processes of their own.

        Raises:
            ValueError: a file that cannot be imported; all of them in one message.
        """
        slow = [(index, each) for index, each in enumerate(self.cfg.rewards) if each in self.functions and each.slow]
        outcomes = self.crew.load([_call(each) for _, each in slow])
        lines = [
            f"rollout.rewards[{index}].function={each.function} cannot be loaded: {outcome.error}"
            for (index, each), outcome in zip(slow, outcomes, strict=True)
            if outcome.error
        ]
        if lines:
            raise ValueError("\n".join(lines))

    def score(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """The rollouts with these parts added to what rewards they have, and the sum of all parts."""
        parts: list[dict[str, float]] = [{} for _ in rollouts]
        errors: list[dict[str, str]] = [{} for _ in rollouts]
        jobs: list[tuple[int, RewardFunctionConfig]] = []
        for index, rollout in enumerate(rollouts):
            for function in self.functions:
                if function.weight_in(rollout.prompt.channel_name) is None:
                    continue
                if rollout.finish == "error":
                    parts[index][function.part] = 0.0
                else:
                    jobs.append((index, function))
        for (index, function), outcome in zip(jobs, self._outcomes(rollouts, jobs), strict=True):
            value, error = _number(outcome)
            parts[index][function.part] = value
            if error:
                errors[index][function.part] = error
                self._tell_once(function, outcome, error)
        return [
            with_parts(rollout, each, self.cfg, wrong)
            for rollout, each, wrong in zip(rollouts, parts, errors, strict=True)
        ]

    def _outcomes(self, rollouts: Sequence[Rollout], jobs: Sequence[tuple[int, RewardFunctionConfig]]) -> list[Outcome]:
        """What each function said; the quick ones are called here."""
        found: dict[int, Outcome] = {}
        slow: list[Job] = []
        for number, (index, function) in enumerate(jobs):
            rollout = rollouts[index]
            given = (rollout.written if function.of == "all" else rollout.text, rollout.prompt)
            if function.slow:
                slow.append(Job(_call(function), given, function.timeout))
            else:
                found[number] = attempt(_call(function), given)
        others = iter(self.crew.run(slow) if slow else ())
        return [found[number] if number in found else next(others) for number in range(len(jobs))]

    def _tell_once(self, function: RewardFunctionConfig, outcome: Outcome, error: str) -> None:
        if function.part in self._told:
            return
        self._told.add(function.part)
        trace = f"\n{outcome.trace.rstrip()}" if function.slow and outcome.trace else ""
        self.tell(
            f"reward {function.part}: {error}. This sample gets 0 from it; more of the kind are counted "
            f"(rollout/errors/{function.part}) and kept with the records{trace}"
        )


def with_parts(
    rollout: Rollout, parts: Mapping[str, float], cfg: RolloutConfig, errors: Mapping[str, str] | None = None
) -> Rollout:
    """A rollout with more parts of the reward, and the weighted sum of all it has.

    A part that is not finite (a reward model's score may be so) is 0 and an error.
    """
    good = {name: value if math.isfinite(value) else 0.0 for name, value in parts.items()}
    wrong = {name: f"it is {value}, not a finite number" for name, value in parts.items() if not math.isfinite(value)}
    rewards = {**rollout.rewards, **good}
    weights = cfg.weights(rollout.prompt.channel_name)
    reward = math.fsum(weights[name] * value for name, value in rewards.items() if name in weights)
    return replace(rollout, rewards=rewards, reward=reward, errors={**rollout.errors, **wrong, **(errors or {})})


def _call(function: RewardFunctionConfig) -> Call:
    return Call.of(function.function, function.arguments)


def _number(outcome: Outcome) -> tuple[float, str]:
    """The value as a finite number; 0 and the reason where it is none."""
    if outcome.error:
        return 0.0, outcome.error
    if not isinstance(outcome.value, float):
        return 0.0, f"it returned {str(outcome.value)[:40]!r}, not a number"
    if not math.isfinite(outcome.value):
        return 0.0, f"it returned {outcome.value}, not a finite number"
    return outcome.value, ""
