"""The `rollout` section of the config: what is asked, how it is answered, and what an answer is worth."""

from __future__ import annotations

import difflib
import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Literal

from models.generation import SamplingConfig
from trainer.rollout.functions import problem, split
from trainer.rollout.reward_functions import FUNCTIONS, PACKAGES, SLOW
from trainer.rollout.task_functions import TASKS

REWARD_MODEL = "reward_model"
"""The part of the reward that a model gives."""
TASK = "task"
"""The part of the reward that the task gives."""
OTHERS = (REWARD_MODEL, TASK)

Problem = tuple[str, object, str, str]
"""(key, value, reason, way out)"""


@dataclass(frozen=True)
class RewardFunctionConfig:
    """A part of the reward: a function of the text that the policy wrote, and what it counts."""

    function: str
    """A name (docs/rl.md lists them), `path/to/file.py:function` of your own, or `reward_model` or `task` where only
    the weight of that part is to be said."""
    name: str | None = None
    """What the part is called in metrics and records; null = the function's name."""
    weight: float = 1.0
    """The part counts so many times in the reward; 0 = it is only measured."""
    channels: dict[str, float] = field(default_factory=dict)
    """Other weights, by channel."""
    only: tuple[str, ...] = ()
    """Channels in which there is this part; [] = all. In the others the function is not called."""
    arguments: dict[str, bool | int | float | str] = field(default_factory=dict)
    """What the function is given by name."""
    of: Literal["last", "all"] = "last"
    """What is judged: the last thing the policy wrote, or all its turns, a line break between them."""
    timeout: float = 5.0
    """Seconds for one text; one that takes longer is worth 0. Only what runs in a process of its own can be stopped:
    your own functions, math_verify and reasoning_gym. The others cannot take long."""

    @property
    def part(self) -> str:
        """Its name in metrics and records."""
        return self.function if self.function in OTHERS else self.name or split(self.function)[1]

    @property
    def slow(self) -> bool:
        """Whether it runs in a process of its own."""
        return self.function in SLOW or split(self.function)[0] is not None

    def weight_in(self, channel: str) -> float | None:
        """What it counts for a prompt of this channel; None = it has no such part."""
        return None if self.only and channel not in self.only else self.channels.get(channel, self.weight)


@dataclass(frozen=True)
class RolloutConfig:
    """Prompts, the texts that the policy writes to them, and their rewards; read by stages that learn from their own
    texts (ppo, grpo)."""

    prompts_per_step: int = 16
    """Prompts of one step, over all processes."""
    samples: int = 8
    """Texts for each prompt: the group that group advantages compare."""
    max_prompt_tokens: int = 256
    """A longer prompt is left out before the start, and counted."""
    max_new_tokens: int = 256
    """Most tokens behind the prompt: all turns together, what a task puts in included."""
    temperature: float = 1.0
    """Of the policy while it writes."""
    top_p: float = 1.0
    """Only the fewest tokens that together have this probability. Below 1, as with top_k and min_p, tokens are drawn
    from another distribution than the one that is trained; mismatch metrics then show the difference."""
    top_k: int = 0
    """Only the k most probable tokens; 0 = all."""
    min_p: float = 0.0
    """Only tokens with at least this share of the most probable token's probability."""
    stop: tuple[str, ...] = ()
    """End a text wherever they come in it, besides the stop tokens."""
    eval_samples: int = 1
    """Texts for each held-out prompt."""
    eval_temperature: float = 0.0
    """Of the policy on held-out prompts; 0 = the most probable token."""
    rewards: tuple[RewardFunctionConfig, ...] = ()
    """The parts of the reward; it is their weighted sum."""
    reward_model: str | None = None
    """A folder or run with a scalar head (stage=reward) whose score is a part of the reward."""
    task: str | None = None
    """Who answers the policy, so that it goes on: calculator, or `path/to/file.py:function` of your own; null = nobody,
    one text a sample."""
    task_arguments: dict[str, bool | int | float | str] = field(default_factory=dict)
    """What the task is given by name."""
    task_role: Literal["tool", "user"] = "tool"
    """Whose turn the task's answers are in the chat template."""
    task_timeout: float = 10.0
    """Seconds for one answer of the task; a sample for which it takes longer ends there."""
    max_turns: int = 4
    """Most texts of the policy in one sample, with a task."""
    workers: int = 2
    """Processes beside each training process for functions that may hang or crash; they start when there are such."""
    backend: Literal["loom", "vllm"] = "loom"
    """What writes: Loom's generator, or a vLLM server (docs/rl.md says how one is started)."""
    url: str | None = None
    """Where the vLLM server is, such as http://localhost:8000."""
    weights_dir: str | None = None
    """Folder by which the trained weights reach the vLLM server before each rollout: it sees it under the same path,
    and there is room for the model twice; null = `policy` in the run folder."""
    tp: int | None = None
    """Tensor-parallel ranks of the generator; null = training's where the trained weights can be read as they are, else
    as few as have room for a copy."""
    max_rows: int = 64
    """Texts that are written together in one generator. Changes speed and memory only."""
    max_cached_tokens: int = 32768
    """Places for tokens in a generator's cache. Changes speed and memory only."""
    offload: bool = False
    """Between rollouts the generator's copy of the weights (where it has one) is given back, and on a GPU a reference
    or reward model lies in host memory while it is not asked."""
    save: bool = True
    """Write every step's texts with their rewards to rollouts/ in the run folder; scripts/show_rollouts.py shows
    them."""
    save_tokens: bool = False
    """And every token with its log-probability, about ten times as much."""

    @property
    def max_tokens(self) -> int:
        """Most tokens of a prompt with all that follows."""
        return self.max_prompt_tokens + self.max_new_tokens

    def sampling(self, evaluation: bool = False) -> SamplingConfig:
        """How the policy's tokens are chosen; log-probabilities are kept."""
        drawn = SamplingConfig(
            max_new_tokens=self.max_new_tokens,
            temperature=self.eval_temperature if evaluation else self.temperature,
            stop=self.stop,
            log_probs=True,
        )
        if drawn.temperature == 0:
            return drawn
        return replace(drawn, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p)

    def weights(self, channel: str) -> dict[str, float]:
        """What each part of the reward counts for a prompt of this channel."""
        found = {each.part: weight for each in self.rewards if (weight := each.weight_in(channel)) is not None}
        named = {each.function for each in self.rewards}
        if self.reward_model is not None and REWARD_MODEL not in named:
            found[REWARD_MODEL] = 1.0
        return found

    def check_channels(self, channels: Sequence[str]) -> None:
        """Whether the channels that rewards name are there; known when the data are.

        Raises:
            ValueError: one is not.
        """
        for index, reward in enumerate(self.rewards):
            for key, named in (("only", reward.only), ("channels", reward.channels)):
                for name in named:
                    if name not in channels:
                        close = difflib.get_close_matches(name, channels, 1)
                        way = f"did you mean {close[0]}?" if close else f"there are {', '.join(channels)}"
                        raise ValueError(f"rollout.rewards[{index}].{key}: the prompts have no channel {name}; {way}")

    def ignored(self, stage: str, used: bool) -> list[str]:
        """Settings that were given but change nothing, one sentence each; `used` says whether the stage makes
        rollouts."""
        usual = RolloutConfig()
        given = [each.name for each in fields(self) if getattr(self, each.name) != getattr(usual, each.name)]
        if not used:
            return [f"rollout.{name} is ignored: stage.name={stage} writes no texts" for name in given]
        of_task = ("task_arguments", "task_role", "task_timeout", "max_turns")
        found = [f"rollout.{name} is ignored: rollout.task=null" for name in of_task if name in given and not self.task]
        of_backend = ("url", "weights_dir") if self.backend != "vllm" else ("tp", "max_rows", "max_cached_tokens")
        found += [f"rollout.{n} is ignored: rollout.backend={self.backend}" for n in of_backend if n in given]
        if "save_tokens" in given and not self.save:
            found.append("rollout.save_tokens is ignored: rollout.save=false")
        return found

    def problems(self) -> list[Problem]:
        """Values wrong in themselves, as (key, value, reason, way out)."""
        found = [*_numbers(self), *_sampling_problems(self)]
        for index, reward in enumerate(self.rewards):
            found += _reward_problems(f"rollout.rewards[{index}]", reward, self)
        parts = [reward.part for reward in self.rewards]
        for part in sorted({part for part in parts if parts.count(part) > 1}):
            reason = f"two parts of the reward are called {part}"
            found.append(
                ("rollout.rewards", parts, reason, "give one of them another name: {function: ..., name: ...}")
            )
        if self.task is not None and (wrong := problem(self.task, TASKS, self.task_arguments, 2)):
            found.append(("rollout.task", self.task, *wrong))
        nothing = not any(weight for reward in self.rewards for weight in (reward.weight, *reward.channels.values()))
        if self.rewards and nothing and (self.reward_model is None or REWARD_MODEL in parts):
            reason = "every part of the reward has weight 0: all texts are worth the same"
            found.append(("rollout.rewards", parts, reason, "a weight above 0 for one of them"))
        if self.backend == "vllm" and self.url is None:
            reason = "rollout.backend=vllm needs the address of a server"
            found.append(("rollout.url", None, reason, "rollout.url=http://localhost:8000"))
        return found


def _numbers(cfg: RolloutConfig) -> list[Problem]:
    least = {
        "prompts_per_step": 1, "samples": 1, "max_prompt_tokens": 1, "max_new_tokens": 1, "eval_samples": 1,
        "max_turns": 1, "workers": 1, "max_rows": 1, "max_cached_tokens": 1,
    }  # fmt: skip
    rows: list[Problem] = [
        (f"rollout.{key}", getattr(cfg, key), f"must be at least {low}", f"rollout.{key}={getattr(RolloutConfig, key)}")
        for key, low in least.items()
        if getattr(cfg, key) < low
    ]
    if cfg.tp is not None and cfg.tp < 1:
        rows.append(
            ("rollout.tp", cfg.tp, "must be at least 1", "rollout.tp=null for as few ranks as hold the weights")
        )
    if not cfg.task_timeout > 0:
        rows.append(("rollout.task_timeout", cfg.task_timeout, "must be above 0 seconds", "rollout.task_timeout=10"))
    if 1 <= cfg.max_cached_tokens < cfg.max_tokens:
        reason = f"has no room for one prompt and its text: rollout.max_prompt_tokens + max_new_tokens={cfg.max_tokens}"
        way = f"rollout.max_cached_tokens={cfg.max_tokens} or more"
        rows.append(("rollout.max_cached_tokens", cfg.max_cached_tokens, reason, way))
    return rows


def _sampling_problems(cfg: RolloutConfig) -> list[Problem]:
    if cfg.temperature == 0:
        reason = "greedy texts of one prompt are all alike: there is nothing to compare"
        return [("rollout.temperature", cfg.temperature, reason, "rollout.temperature=1.0")]
    found = cfg.sampling().problems() if cfg.max_new_tokens >= 1 else []
    rows = [(f"rollout.{key}", value, reason, f"rollout.{way}") for key, value, reason, way in found]
    if not 0 <= cfg.eval_temperature < math.inf:
        rows.append(
            ("rollout.eval_temperature", cfg.eval_temperature, "must not be below 0", "rollout.eval_temperature=0")
        )
    if cfg.eval_temperature == 0 and cfg.eval_samples > 1:
        reason = "the most probable text (rollout.eval_temperature=0) is the same every time"
        rows.append(("rollout.eval_samples", cfg.eval_samples, reason, "rollout.eval_samples=1, or a temperature"))
    return rows


def _reward_problems(key: str, reward: RewardFunctionConfig, cfg: RolloutConfig) -> list[Problem]:
    found: list[Problem] = []
    if reward.function == REWARD_MODEL:
        if cfg.reward_model is None:
            found.append((f"{key}.function", REWARD_MODEL, "there is no reward model", "rollout.reward_model=FOLDER"))
    elif reward.function == TASK:
        if cfg.task is None:
            found.append((f"{key}.function", TASK, "there is no task", "rollout.task=calculator or a file's function"))
    elif wrong := problem(reward.function, FUNCTIONS, reward.arguments, 2):
        found.append((f"{key}.function", reward.function, *wrong))
    elif reward.part in OTHERS:
        found.append((f"{key}.name", reward.part, "is the name of another part of the reward", f"{key}.name=OTHER"))
    package = PACKAGES.get(reward.function)
    if package is not None and importlib.util.find_spec(package[0]) is None:
        found.append(
            (f"{key}.function", reward.function, f"needs a package that is not here: {package[0]}", package[1])
        )
    if not reward.timeout > 0:
        found.append((f"{key}.timeout", reward.timeout, "must be above 0 seconds", f"{key}.timeout=5"))
    for channel, weight in {"": reward.weight, **reward.channels}.items():
        if not math.isfinite(weight):
            where = f"{key}.channels.{channel}" if channel else f"{key}.weight"
            found.append((where, weight, "is no number of use", f"{where}=1.0"))
    return found
