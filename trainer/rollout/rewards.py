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
        return self.added(rollouts, self.judged(rollouts))

    def judged(self, rollouts: Sequence[Rollout]) -> list[dict[str, Outcome]]:
        """What each function said of each rollout, by the part's name. Each needs to be asked on one rank only."""
        found: list[dict[str, Outcome]] = [{} for _ in rollouts]
        slow: list[tuple[int, str, Job]] = []
        for index, rollout in enumerate(rollouts):
            for function in self.functions:
                if function.weight_in(rollout.prompt.channel_name) is None:
                    continue
                given = (rollout.written if function.of == "all" else rollout.text, rollout.prompt)
                if rollout.finish == "error":
                    found[index][function.part] = Outcome(0.0)
                elif function.slow:
                    slow.append((index, function.part, Job(_call(function), given, function.timeout)))
                else:
                    found[index][function.part] = attempt(_call(function), given)
        outcomes = self.crew.run([job for _, _, job in slow]) if slow else []
        for (index, part, _), outcome in zip(slow, outcomes, strict=True):
            found[index][part] = outcome
        return found

    def added(self, rollouts: Sequence[Rollout], judged: Sequence[Mapping[str, Outcome]]) -> list[Rollout]:
        """The rollouts with what the functions said of them; what failed is 0 and told of once."""
        done = []
        for rollout, outcomes in zip(rollouts, judged, strict=True):
            numbers = {part: _number(outcome) for part, outcome in outcomes.items()}
            errors = {part: error for part, (_, error) in numbers.items() if error}
            for part, error in errors.items():
                self._tell_once(part, error, outcomes[part].trace)
            parts = {each.part: numbers[each.part][0] for each in self.functions if each.part in numbers}
            done.append(with_parts(rollout, parts, self.cfg, errors))
        return done

    def _tell_once(self, part: str, error: str, trace: str) -> None:
        if part in self._told:
            return
        self._told.add(part)
        shown = f"\n{trace.rstrip()}" if trace else ""
        self.tell(f"reward {part}: {error}. This sample gets 0 from it; more of the kind are counted{shown}")


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
