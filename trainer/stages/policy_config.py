"""The settings of a policy's update, which GRPO and PPO share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trainer.rl.kl import Estimator
from trainer.rl.mismatch import Correction, Level
from trainer.rl.policy_loss import Aggregation, Clip, Loss, Ratio

Problem = tuple[str, object, str, str]
"""(key, value, reason, way out)"""


@dataclass(frozen=True)
class PolicyConfig:
    """How a policy learns from its own samples."""

    name: str
    """Which training stage to run."""
    loss: Loss = "clipped"
    """clipped = PPO's surrogate; cispo = the clipped ratio as a mere weight of the log-probability."""
    ratio: Ratio = "token"
    """Ratio policy / old policy that is clipped: of each token, of the whole sequence (GSPO), or sequence_token: the
    sequence's, with each token's own gradient (GSPO-token)."""
    clip_low: float = 0.2
    """The ratio is held above 1 - clip_low; 1 = no lower bound."""
    clip_high: float = 0.2
    """The ratio is held below 1 + clip_high; more than clip_low leaves room for unlikely tokens (clip-higher)."""
    dual_clip: float | None = None
    """Largest ratio that counts where the advantage is negative, such as 3; null = no such bound."""
    aggregation: Aggregation = "sequence_mean"
    """How tokens become one loss: the mean over samples of each one's mean (GRPO), the mean over all tokens (DAPO), or
    the sum over tokens / (samples x rollout.max_new_tokens) (Dr. GRPO)."""
    kl: Literal["none", "loss", "reward"] = "none"
    """Where the divergence from the reference is held down: nowhere, in the loss, or in the reward."""
    kl_estimator: Estimator = "k3"
    """Estimator of the divergence. In the loss k2 has the right gradient on average, k3 that of KL(reference ||
    policy); in the reward k1 has the right one."""
    kl_coef: float = 0.04
    """Weight of the divergence (beta)."""
    kl_importance: bool = False
    """Multiply the divergence in the loss by policy / old policy: every estimator then has the right gradient, also in
    later updates for the same rollout."""
    reference: str | None = None
    """What the divergence is measured from: a folder as in init_from; null = what the run starts from, as in
    the stage dpo."""
    entropy_coef: float = 0.0
    """Weight of the mean entropy, which is added to what is made large."""
    epochs: int = 1
    """Passes over the samples of a rollout."""
    mini_batches: int = 1
    """Updates for each pass: the samples are cut into so many parts."""
    overlong: Literal["none", "filter", "penalty"] = "none"
    """Samples cut off at rollout.max_new_tokens: learnt like others, not learnt from, or punished softly."""
    overlong_buffer: float = 0.2
    """overlong=penalty: the last share of rollout.max_new_tokens in which the punishment grows."""
    overlong_coef: float = 1.0
    """overlong=penalty: punishment of a sample that fills rollout.max_new_tokens."""
    mismatch: Correction = "none"
    """Importance weights trainer / generator for tokens whose probability differs between the two: none, truncate (held
    in mismatch_min .. mismatch_max) or mask (0 outside). The mismatch is measured in any case."""
    mismatch_level: Level = "token"
    """Weights of tokens, or of whole sequences."""
    mismatch_min: float = 0.0
    """Lower bound of the weights."""
    mismatch_max: float = 2.0
    """Upper bound of the weights."""

    @property
    def learns_from(self) -> Literal["prompts"]:
        """The kind of data."""
        return "prompts"

    @property
    def needs_reference(self) -> bool:
        """Whether log-probabilities of the reference are wanted."""
        return self.kl != "none"

    @property
    def moves(self) -> bool:
        """Whether there are several updates for each rollout: then the policy's log-probabilities at it are kept."""
        return self.epochs * self.mini_batches > 1

    @property
    def clip(self) -> Clip:
        """The bounds of the ratio."""
        return Clip(self.clip_low, self.clip_high, self.dual_clip)

    def problems(self) -> list[Problem]:
        """Values wrong in themselves, as (key, value, reason, way out)."""
        dual = self.dual_clip
        rules = [
            ("clip_low", 0 < self.clip_low <= 1, "lies above 0, at most 1", "stage.clip_low=0.2"),
            ("clip_high", 0 < self.clip_high < float("inf"), "must be above 0", "stage.clip_high=0.2"),
            (
                "dual_clip",
                dual is None or 1 + self.clip_high < dual < float("inf"),
                f"must be above 1 + stage.clip_high = {1 + self.clip_high:g}: it bounds what that leaves free",
                "stage.dual_clip=3 or stage.dual_clip=null",
            ),
            ("kl_coef", 0 <= self.kl_coef < float("inf"), "cannot be negative", "stage.kl=none"),
            (
                "kl_estimator",
                not (self.kl == "loss" and self.kl_estimator == "k1" and not self.kl_importance),
                "as a loss k1 pulls nowhere on average: its gradient is 0 in expectation",
                "stage.kl_estimator=k2 or stage.kl=reward",
            ),
            ("entropy_coef", 0 <= self.entropy_coef < float("inf"), "cannot be negative", "stage.entropy_coef=0"),
            ("epochs", self.epochs >= 1, "must be at least 1", "stage.epochs=1"),
            ("mini_batches", self.mini_batches >= 1, "must be at least 1", "stage.mini_batches=1"),
            ("overlong_buffer", 0 < self.overlong_buffer <= 1, "is a share, above 0", "stage.overlong_buffer=0.2"),
            ("overlong_coef", 0 < self.overlong_coef < float("inf"), "must be above 0", "stage.overlong=none"),
            ("mismatch_min", 0 <= self.mismatch_min <= 1, "lies in 0 .. 1", "stage.mismatch_min=0"),
            ("mismatch_max", 1 <= self.mismatch_max < float("inf"), "must be at least 1", "stage.mismatch_max=2"),
        ]
        return [(f"stage.{key}", getattr(self, key), why, way) for key, good, why, way in rules if not good]

    def ignored(self) -> list[str]:
        """Settings that were given but change nothing, one sentence each."""
        needs = {
            "kl": ("none", ("kl_estimator", "kl_coef", "kl_importance", "reference")),
            "mismatch": ("none", ("mismatch_level", "mismatch_min", "mismatch_max")),
        }
        said = [
            f"stage.{key} is ignored: stage.{switch}={off}"
            for switch, (off, keys) in needs.items()
            for key in keys
            if getattr(self, switch) == off and self.given(key)
        ]
        for key in ("overlong_buffer", "overlong_coef"):
            if self.overlong != "penalty" and self.given(key):
                said.append(f"stage.{key} is ignored: stage.overlong={self.overlong}")
        if self.kl == "reward" and self.kl_importance:
            said.append("stage.kl_importance is ignored: stage.kl=reward has no gradient")
        if self.loss == "cispo" and self.dual_clip is not None:
            said.append("stage.dual_clip is ignored: stage.loss=cispo bounds the ratio for every advantage")
        if self.loss == "cispo" and self.ratio == "sequence_token":
            said.append(
                "stage.ratio=sequence_token is the same as sequence: stage.loss=cispo has no gradient of the ratio"
            )
        return said

    def given(self, key: str) -> bool:
        """Whether a setting differs from its default."""
        return getattr(self, key) != getattr(type(self), key)
