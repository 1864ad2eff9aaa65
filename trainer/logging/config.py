"""The log section: where the numbers of a run go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# Characters wandb refuses in a project name, and its longest name.
_PROJECT_FORBIDDEN = "/\\#?%:"
_PROJECT_LONGEST = 128


@dataclass(frozen=True)
class LogConfig:
    """``metrics.jsonl`` and ``log.txt`` in the run folder are always written; the boards are chosen here."""

    every: int = 1
    """Optimizer steps between two logged steps; metrics are gathered over all ranks only then."""
    wandb: Literal["disabled", "offline", "online"] = "offline"
    """Weights & Biases: nothing, a folder to upload later with ``wandb sync``, or live."""
    project: str = "loom"
    """wandb project."""
    entity: str | None = None
    """wandb user or team; None leaves the choice to the login."""
    tensorboard: bool = True
    """Write TensorBoard event files to ``<run folder>/tensorboard``."""

    def problems(self) -> list[tuple[str, object, str, str]]:
        """Values wrong in themselves, as (key, value, reason, way out)."""
        found: list[tuple[str, object, str, str]] = []
        if self.every < 1:
            found.append(("log.every", self.every, "counts steps and is at least 1", "log.every=1"))
        if self.wandb not in ("disabled", "offline", "online"):
            found.append(("log.wandb", self.wandb, "is disabled, offline or online", "log.wandb=offline"))
        if not self.project.strip():
            found.append(("log.project", self.project, "a wandb project has a name", "log.project=loom"))
        elif len(self.project) > _PROJECT_LONGEST or any(char in _PROJECT_FORBIDDEN for char in self.project):
            reason = f"wandb allows at most {_PROJECT_LONGEST} characters and none of {_PROJECT_FORBIDDEN}"
            found.append(("log.project", self.project, reason, "log.project=loom"))
        if self.entity is not None and not self.entity.strip():
            found.append(("log.entity", self.entity, "an empty name is no user or team", "log.entity=null"))
        return found
