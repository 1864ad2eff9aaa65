"""What the pools run for reinforcement learning: the policy's weights in the generator, and whole steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

import models
from data.batch import Document
from data.config import DataConfig
from data.prompts import Prompt
from models import ModelConfig
from models.adapters.config import AdapterConfig
from models.generation import Completion, Sight
from models.init import InitSource
from models.parts import ALL, PartsConfig
from models.routing import RouterBook
from parallel.config import EngineConfig, ParallelConfig
from parallel.groups import neighbours
from parallel.sharding import Place, shard_of
from tests import sight_cases
from tests.cases import NAMES, here, my_parts, whole
from trainer import checkpoint
from trainer.build import make_engine
from trainer.config import RunConfig, RunSection
from trainer.logging.config import LogConfig
from trainer.logging.log import NullLog
from trainer.loop import Progress
from trainer.optim import OptimConfig
from trainer.pictures import picture_config
from trainer.rl import loop
from trainer.rl.experience import Experience
from trainer.rl.loop import RlTrainer
from trainer.rl.run import Parts, make_trainer
from trainer.rl.weights import GeneratorWeights
from trainer.rollout.config import RolloutConfig
from trainer.rollout.types import Rollout, Writer
from trainer.stages.grpo import GrpoConfig
from trainer.stages.next_token import NextToken
from trainer.stages.policy_config import PolicyConfig
from trainer.stages.ppo import PpoConfig


def moved_weights(model: ModelConfig, layout: ParallelConfig, zero: Any, tp: int, drop: bool = False) -> dict[str, Any]:
    """Train two steps, fill the generator before and after: how many of its tensors differ from what was trained."""
    groups = here(layout)
    optim = OptimConfig(lr=1e-2, eps=1e-4)
    engine = make_engine(model, EngineConfig(zero=zero), optim, groups, InitSource(model, seed=3), layout)
    place = Place(tp=neighbours(groups, tp, 300))
    weights = GeneratorWeights(engine, models.build(model, place))
    stage, routers = NextToken(len(NAMES)), RouterBook(engine.chunks, len(NAMES))
    out: dict[str, Any] = {"shared": weights.shared, "differ": [], "names": 0}
    weights.fill()
    first = {name: param.detach().clone() for name, param in weights.model.named_parameters()}
    for step in range(2):
        batches = my_parts(step, groups, layout, 1)
        count, tokens = groups.sum([stage.count(batches), float(sum(len(batch.tokens_T) for batch in batches))])
        routers.begin(groups.data.size / tokens)
        engine.train_step(batches, stage.forward, count, 1e-2)
        routers.finish(groups.sum_tensor)
    if drop:
        weights.drop()
        out["dropped"] = sum(p.numel() for p in weights.model.parameters())
    weights.fill()
    trained = whole(engine, groups, "master")
    held = dict(weights.model.named_parameters()) | dict(weights.model.named_buffers())
    assert held.keys() == trained.keys()
    for name, tensor in held.items():
        if name in first:
            shard = shard_of(tensor)
            expected = shard.slice(trained[name].view(shard.whole_shape(tensor.shape)), place.cut)
            assert weights.shared or not torch.equal(first[name], expected), f"{name} was not trained"
        else:
            expected = trained[name].view(tensor.shape)
        if not torch.equal(tensor, expected):
            out["differ"].append(name)
    out["names"] = len(held)
    return out


# ---- whole steps -----------------------------------------------------------------------------------------------------

CHANNELS = ("even", "odd")


class SomePrompts:
    """Prompts of one to nine tokens, for ever."""

    channels: tuple[str, ...] = CHANNELS

    def __init__(self, vocab: int) -> None:
        self.vocab = vocab

    def prompts(self, position: int, count: int) -> list[Prompt]:
        return [self._prompt(number) for number in range(position, position + count)]

    def shown(self, prompts: Sequence[Prompt]) -> list[Document]:
        raise AssertionError("nothing is shown")

    @property
    def held_out(self) -> list[Prompt]:
        return [self._prompt(1000 + number) for number in range(3)]

    def _prompt(self, number: int) -> Prompt:
        random = np.random.default_rng([5, number])
        tokens = tuple(int(t) for t in random.integers(0, self.vocab, size=random.integers(1, 10)))
        return Prompt(number, number % 2, CHANNELS[number % 2], tokens, "", None, {})


class ShownPrompts(SomePrompts):
    """Two in five without a picture, the others with one or two; a prompt asks for its pictures once a step."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__(model.vocab_size)
        cfg = picture_config(model)
        assert cfg is not None
        self.cfg = cfg

    def _made(self, number: int) -> tuple[list[int], Sight | None]:
        sizes = sight_cases.SIZES[number % len(sight_cases.SIZES)]
        tokens, sight = sight_cases.shown(self.cfg, sizes, number % 7)
        return ([number % 50, *tokens], None) if sight is None else (tokens, sight)

    def _prompt(self, number: int) -> Prompt:
        tokens, sight = self._made(number)
        patches = 0 if sight is None else len(sight.pictures.patches_PX)
        return Prompt(number, number % 2, CHANNELS[number % 2], tuple(tokens), "", None, {}, number, patches)

    def shown(self, prompts: Sequence[Prompt]) -> list[Document]:
        found = []
        for prompt in prompts:
            tokens, sight = self._made(prompt.number)
            assert sight is not None and tuple(tokens) == prompt.tokens
            rotary = None if sight.rotary_3L is None else sight.rotary_3L.numpy()
            unlearnt = np.zeros(len(tokens), dtype=bool)
            shown = {"pictures": sight.pictures, "features": sight.features, "rotary_3L": rotary}
            found.append(Document(np.array(tokens), unlearnt, prompt.channel, **shown))
        return found


class SomeAsks:
    """The share of even tokens is the reward; every sixth sample stands beside a tool's two tokens."""

    def __init__(self, cfg: RolloutConfig) -> None:
        self.cfg = cfg

    def collect(self, prompts: Sequence[Prompt], writer: Writer, step: int, evaluation: bool = False) -> list[Rollout]:
        samples = self.cfg.eval_samples if evaluation else self.cfg.samples
        seeds = [1000 * step + each.number for each in prompts]
        sampling = self.cfg.sampling(evaluation)
        texts = writer.write([each.tokens for each in prompts], samples, sampling, seeds, prompts)
        return [_judged(prompt, each) for prompt, some in zip(prompts, texts, strict=True) for each in some]


def _judged(prompt: Prompt, text: Completion) -> Rollout:
    new, log_probs = text.tokens, text.log_probs
    assert log_probs is not None and text.finish != "error"
    before = len(prompt.tokens)
    learn, given = [True] * len(new), list(log_probs)
    if prompt.number % 6 == 0 and len(new) > 4:  # as if a tool had written two of them
        learn[1:3], given[1:3] = [False, False], [0.0, 0.0]
    reward = sum(token % 2 == 0 for token in new) / len(new)
    return Rollout(
        prompt,
        text.sample,
        (*prompt.tokens, *new),
        (*[False] * before, *learn),
        (*[0.0] * before, *given),
        "",
        "stop" if text.finish == "stop" else "length",
        (),
        {"even": reward},
        reward,
    )


def rl_config(
    stage: PpoConfig | GrpoConfig,
    model: ModelConfig,
    layout: ParallelConfig,
    zero: Any,
    steps: int,
    adapter: AdapterConfig | None = None,
    parts: PartsConfig = ALL,
    **rollout: Any,
) -> RunConfig:
    """A run of the fakes."""
    seq_len = 48 if model.vision is None else 160
    data = DataConfig(sources=(), seq_len=seq_len, micro_batch_rows=1, global_batch_rows=8)
    asked: dict[str, Any] = {
        "prompts_per_step": 4,
        "samples": 4,
        "max_prompt_tokens": seq_len - 38,
        "max_new_tokens": 20,
    } | rollout
    # A large eps keeps Adam from blowing the rounding noise of vanishing gradients up to a whole step; towers have
    # biases that begin at 0, so that after two steps this noise is all there is to them.
    eps = 1e-3 if model.vision is None else 1e-2
    optim = OptimConfig(lr=3e-3, eps=eps, schedule="constant", parts=parts)
    run = RunSection(steps=steps, seed=3)
    engine = EngineConfig(zero=zero)
    sections = (data, layout, engine, optim, LogConfig(), run, RolloutConfig(**asked))
    return RunConfig(model, stage, *sections, adapter=adapter)


def trainer_of(cfg: RunConfig, saved_in: Path | None = None, save_to: Path | None = None) -> tuple[RlTrainer, Progress]:
    """The trainer of a run of the fakes."""
    groups, stage = here(cfg.parallel), cfg.stage
    assert isinstance(stage, PolicyConfig) and cfg.run.steps is not None
    prompts = SomePrompts(cfg.model.vocab_size) if cfg.model.vision is None else ShownPrompts(cfg.model)
    asks = SomeAsks(cfg.rollout)
    parts = Parts(cfg, stage, groups, prompts, asks, None, (0,), NullLog(), save_to or Path(), "")
    saved = checkpoint.Checkpoint(saved_in) if saved_in else None
    return make_trainer(parts, saved, cfg.run.steps)


def rl_steps(
    stage: PpoConfig | GrpoConfig,
    model: ModelConfig,
    layout: ParallelConfig,
    zero: Any = 1,
    steps: int = 2,
    save_to: str | None = None,
    resume_from: str | None = None,
    **rollout: Any,
) -> dict[str, Any]:
    """Some steps: the texts and advantages of each, all metrics, the first update's gradients, the weights after."""
    cfg = rl_config(stage, model, layout, zero, steps, **rollout)
    trainer, progress = trainer_of(cfg, Path(resume_from) if resume_from else None, Path(save_to) if save_to else None)
    learners = {"policy": trainer.policy} | ({"critic": trainer.critic} if trainer.critic is not None else {})
    out: dict[str, Any] = {"metrics": [], "texts": [], "facts": [], "grads": {}, "weights": {}}
    experience = loop.experience

    def watched(*args: Any) -> Experience:
        found = experience(*args)
        out["texts"].append([each.tokens for each in found.samples.rollouts])
        out["facts"].append({**found.policy_L, **found.critic_L})
        return found

    while progress.step < steps:
        with mock.patch.object(loop, "experience", watched):
            out["metrics"].append(trainer.step(progress))
        if not out["grads"] and stage.epochs * stage.mini_batches == 1:
            # AdamW's first moment after one step is (1 - beta1) times the gradient.
            out["grads"] = {
                name: {n: m / 0.1 for n, m in whole(each.engine, trainer.groups, "exp_avg").items()}
                for name, each in learners.items()
            }
    out["weights"] = {name: whole(each.engine, trainer.groups, "master") for name, each in learners.items()}
    if save_to:
        trainer.save(progress)
    out["progress"] = (progress.step, progress.position)
    return out
