"""GRPO and its kin: several samples of a prompt are compared with each other, so no critic is needed.

DAPO, Dr. GRPO, GSPO, RLOO, REINFORCE++ and CISPO are settings of it (conf/stage).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trainer.rl.advantages import Scale
from trainer.stages.policy_config import PolicyConfig, Problem


@dataclass(frozen=True)
class GrpoConfig(PolicyConfig):
    """Group-relative policy optimisation."""

    name: Literal["grpo"] = "grpo"
    """Which training stage to run."""
    advantage: Literal["grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline"] = "grpo"
    """What a reward is compared with: the mean of its group, the mean of the others of it, all tokens of the batch
    (REINFORCE++), or first the one and then the other."""
    scale: Scale = "group"
    """What the distance to the mean is divided by: the group's standard deviation, that of the batch, or nothing (Dr.
    GRPO)."""
    dynamic_sampling: bool = False
    """Draw new prompts in place of groups whose rewards are all equal (DAPO)."""
    sampling_rounds: int = 3
    """dynamic_sampling: rollouts tried at most for one step; what is missing then stays away."""

    @property
    def compares(self) -> bool:
        """Whether a prompt needs several samples."""
        return self.advantage != "reinforce_pp"

    def problems(self) -> list[Problem]:
        """Values wrong in themselves, as (key, value, reason, way out)."""
        found = super().problems()
        if self.sampling_rounds < 1:
            way = "stage.sampling_rounds=3"
            found.append(("stage.sampling_rounds", self.sampling_rounds, "must be at least 1", way))
        if self.dynamic_sampling and not self.compares:
            reason = "stage.advantage=reinforce_pp compares no samples of a prompt, so none is without signal"
            found.append(("stage.dynamic_sampling", True, reason, "stage.dynamic_sampling=false"))
        return found

    def ignored(self) -> list[str]:
        """Settings that were given but change nothing, one sentence each."""
        said = super().ignored()
        if self.advantage.startswith("reinforce_pp") and self.given("scale"):
            said.append(
                f"stage.scale is ignored: stage.advantage={self.advantage} is scaled over the tokens of the batch"
            )
        if not self.dynamic_sampling and self.given("sampling_rounds"):
            said.append("stage.sampling_rounds is ignored: stage.dynamic_sampling=false")
        return said
