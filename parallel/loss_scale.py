"""Dynamic loss scaling for fp16 (Micikevicius et al. 2018): grow while gradients are finite, halve when not."""

from __future__ import annotations


class LossScale:
    """The factor on the loss. Off (always 1) unless ``dynamic``."""

    def __init__(self, dynamic: bool, start: float = 2.0**16, growth_interval: int = 1000, smallest: float = 1.0):
        self.dynamic = dynamic
        self.value = start if dynamic else 1.0
        self.good_steps = 0
        self.growth_interval = growth_interval
        self.smallest = smallest

    def update(self, overflow: bool) -> None:
        """Account for one step.

        Raises:
            ValueError: gradients are not finite although the scale cannot be lowered further.
        """
        if not overflow:
            self.good_steps += 1
            if self.dynamic and self.good_steps % self.growth_interval == 0:
                self.value *= 2.0
            return
        if not self.dynamic or self.value <= self.smallest:
            raise ValueError(
                f"the gradient is not finite (loss scale {self.value:g}); the update was not applied. Lower optim.lr, "
                "set optim.clip, look for bad rows in the channel whose loss jumped, or use engine.precision=fp32."
            )
        self.value, self.good_steps = self.value / 2.0, 0

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"value": self.value, "good_steps": self.good_steps}

    def restore(self, state: dict[str, float]) -> None:
        """Take up a saved state; a run that now uses another precision keeps its own scale."""
        if self.dynamic and state["value"] > 1.0:
            self.value, self.good_steps = float(state["value"]), int(state["good_steps"])
