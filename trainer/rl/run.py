"""The order of a reinforcement learning run, on one page: prompts, models, generator, restore, train."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.peers import Peers
from data.prompts import PromptData, read
from data.tokenizer import add_special, load_tokenizer
from parallel.groups import Groups
from trainer import checkpoint, folders, provenance
from trainer.config import RunConfig
from trainer.door import to_yaml
from trainer.inference.loading import renderer_of, stop_tokens_of
from trainer.introduction import introduce, open_log
from trainer.itself import start_in_words
from trainer.logging.log import Log
from trainer.loop import Progress
from trainer.pictures import picture_config
from trainer.reading import behind_the_gate
from trainer.resuming import save, to_resume
from trainer.rl import build, served
from trainer.rl.collecting import Asks, Collector, Prompts
from trainer.rl.loop import RlTrainer
from trainer.rl.samples import Scorer
from trainer.rl.sights import Sights
from trainer.rl.writer import Author
from trainer.rollout.records import Records
from trainer.rollout.rollout import Rollouter
from trainer.stages.policy_config import PolicyConfig
from trainer.stages.ppo import PpoConfig

CRITIC = "critic"
"""Folder of the critic's checkpoints in the run folder, a run's folder in itself."""


@dataclass(frozen=True)
class Parts:
    """What a trainer is made of, besides its models."""

    cfg: RunConfig
    stage: PolicyConfig
    groups: Groups
    prompts: Prompts
    asks: Asks
    tokenizer: Any
    stop_tokens: tuple[int, ...]
    log: Log
    run_dir: Path
    fingerprint: str
    """Of the prompts."""
    records: Records | None = None


def train_in(run_dir: Path, cfg: RunConfig, groups: Groups, started: float) -> None:
    """Train in the run folder as the config says; ``started`` is the time of the start (monotonic)."""
    assert isinstance(cfg.stage, PolicyConfig)
    saved = to_resume(cfg, run_dir)
    prompts = _read_prompts(cfg, groups, run_dir)
    cfg.rollout.check_channels(prompts.channels)
    per_step = cfg.rollout.prompts_per_step
    total_steps = cfg.run.steps or math.ceil((cfg.run.epochs or 0) * prompts.prompts_per_epoch / per_step)
    step = saved.state["step"] if saved else 0
    contract = build.contract(cfg, cfg.stage)
    with open_log(cfg, groups, run_dir, total_steps, step) as log:
        if groups.is_main:
            provenance.write(run_dir, to_yaml(cfg), contract, groups.world)
            batch = (
                f"a step = {per_step} prompts x {cfg.rollout.samples} samples, "
                f"{cfg.stage.epochs} pass(es) of {cfg.stage.mini_batches} update(s)"
            )
            introduce(cfg, log, groups, run_dir, prompts.report, contract, saved, prompts.fingerprint, batch)
        if step >= total_steps:
            log.close(f"nothing to do: step {step} of {total_steps} is done. Raise run.steps to go on.")
            return
        with _asking(cfg, groups, log) as (asks, tokenizer, stop_tokens):
            fingerprint = prompts.fingerprint
            records = (
                Records(run_dir, tokenizer, cfg.rollout.save_tokens) if groups.is_main and cfg.rollout.save else None
            )
            parts = Parts(
                cfg, cfg.stage, groups, prompts, asks, tokenizer, stop_tokens, log, run_dir, fingerprint, records
            )
            trainer, progress = make_trainer(parts, saved, total_steps)
            for line in described(trainer):
                log.note(line)
            log.note(f"ready after {time.monotonic() - started:.1f} s; training from step {step} to {total_steps}")
            trainer.run(progress)
        log.close(f"done: {progress.step} steps. Checkpoint and metrics in {run_dir}")


@contextmanager
def _asking(cfg: RunConfig, groups: Groups, log: Log) -> Iterator[tuple[Asks, Any, tuple[int, ...]]]:
    """What makes rollouts, with the tokenizer and the tokens that end a text."""
    assert cfg.data.tokenizer is not None, "a run without a tokenizer is refused before the start"
    tokenizer = load_tokenizer(cfg.data.tokenizer, "data.tokenizer")
    if cfg.model.vision is not None:
        add_special(tokenizer, cfg.model.vision.images.token)
    render = renderer_of(tokenizer, cfg.data.tokenizer, cfg.data.chat_template)
    ends = stop_tokens_of(tokenizer, Path(cfg.data.tokenizer), render)
    peers = Peers(groups.rank, groups.world, groups.all_gather)
    asks = Rollouter(cfg.rollout, tokenizer, render, cfg.run.seed, peers, log.note, build.round_s(cfg))
    try:
        asks.check()
        if cfg.rollout.backend == "vllm":
            peers.from_first(lambda: served.check(cfg, served.server_of(cfg)))
        yield asks, tokenizer, tuple(token for token in ends if 0 <= token < cfg.model.vocab_size)
    finally:
        asks.close()


def make_trainer(parts: Parts, saved: checkpoint.Checkpoint | None, total_steps: int) -> tuple[RlTrainer, Progress]:
    """All models, restored where there is something to go on from, and where the run stands."""
    cfg, stage, groups, channels = parts.cfg, parts.stage, parts.groups, len(parts.prompts.channels)
    progress = Progress(saved.state["step"], saved.state["position"]) if saved else Progress()
    policy = build.make_policy(cfg, stage, groups, saved, channels)
    critic = None
    if saved:
        restored(policy, saved, groups)
    if isinstance(stage, PpoConfig):
        theirs = _critic_checkpoint(saved) if saved else None
        critic = build.make_critic(cfg, stage, groups, build.critic_source(cfg, stage, theirs), channels)
        if theirs:
            restored(critic, theirs, groups)
    reference = build.make_reference(cfg, stage, groups, policy.engine)
    reward_model = build.make_reward_model(cfg, groups)
    folders.forget()  # of a large model the headers alone are large
    sights = None if cfg.model.vision is None else Sights(parts.prompts.shown)
    if cfg.rollout.backend == "vllm":
        words = (parts.run_dir, parts.tokenizer, parts.stop_tokens)
        weights, author = build.make_served(cfg, policy.engine, groups, *words)
    else:
        weights = build.make_weights(cfg, policy.engine, groups, 2 * cfg.run.hang_timeout + 60)
        author = Author(build.make_generator(cfg, weights, parts.tokenizer, parts.stop_tokens), groups, sights=sights)
    scorer = Scorer(build.packer_of(cfg, groups), groups)
    asked = (stage, cfg.rollout, parts.prompts, parts.asks)
    collector = Collector(*asked, author, weights, scorer, reward_model, cfg.rollout.offload, sights)

    def save_now(progress: Progress) -> None:
        if critic is not None:
            # First, and one more of them: whatever ends the run between the two, the policy's latest has its critic.
            seen = build.critic_run(cfg, stage) if isinstance(stage, PpoConfig) else cfg
            kept = cfg.run.keep_last + 1
            common = (groups, parts.fingerprint, progress, kept)
            save(seen, seen.model, parts.run_dir / CRITIC, critic.engine, critic.routers, *common)
        common = (groups, parts.fingerprint, progress)
        folder = save(cfg, cfg.model, parts.run_dir, policy.engine, policy.routers, *common)
        parts.log.note(f"saved {folder}")

    trainer = RlTrainer(
        cfg,
        stage,
        groups,
        policy,
        critic,
        reference,
        collector,
        scorer,
        parts.log,
        save_now,
        total_steps,
        parts.records,
    )
    return trainer, progress


def restored(learner: Any, saved: checkpoint.Checkpoint, groups: Groups) -> None:
    """Optimizer and routers of a learner whose weights came from the checkpoint already."""
    checkpoint.restore(saved, learner.engine, groups)
    learner.routers.restore(*saved.state["routers"])


def _critic_checkpoint(saved: checkpoint.Checkpoint) -> checkpoint.Checkpoint:
    """The critic that belongs to a policy's checkpoint.

    Raises:
        ValueError: it is not there.
    """
    folder = saved.folder.parents[1] / CRITIC / saved.folder.parent.name / saved.folder.name
    try:
        return checkpoint.Checkpoint(folder)
    except ValueError as error:
        raise ValueError(
            f"cannot resume from {saved.folder}: its critic is not in {folder} ({error}). Take a checkpoint of a "
            "stage=ppo run with its critic folder beside it, or run.resume=never with init_from for a fresh critic."
        ) from error


def described(trainer: RlTrainer) -> list[str]:
    """Which models there are and where the generator's weights come from."""
    weights = trainer.collector.weights
    if isinstance(weights, served.ServedWeights):
        what = "weights" if trainer.cfg.adapter is None else "adapter"
        writes = f"the vLLM server at {weights.server.url}, given the {what} in {weights.folder} before every rollout"
    else:
        tp = weights.model.place.tp.size
        how = (
            "reads the trained weights" if weights.shared else "has a copy of the weights, filled before every rollout"
        )
        writes = f"{trainer.groups.world // tp} x tp {tp}, {how}"
    others = {
        "critic": trainer.critic,
        "reference": trainer.reference,
        "reward model": trainer.collector.reward_model,
    }
    names = [name for name, model in others.items() if model is not None]
    said = [f"generator: {writes}" + (f"; besides the policy: {', '.join(names)}" if names else "")]
    if trainer.reference is not None:
        said.append(f"reference: {trainer.stage.reference or start_in_words(trainer.cfg)}")
    return said


def _read_prompts(cfg: RunConfig, groups: Groups, run_dir: Path) -> PromptData:
    def prompts(peers: Peers) -> PromptData:
        longest, seen = cfg.rollout.max_prompt_tokens, picture_config(cfg.model)
        common: dict[str, Any] = {"seed": cfg.run.seed, "peers": peers, "pictures": seen}
        return read(cfg.data, tokenizer_folder=None, max_prompt_tokens=longest, **common)

    return behind_the_gate(prompts, cfg, groups, run_dir)
