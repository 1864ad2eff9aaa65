"""The models of a reinforcement learning run: policy, generator, critic, reference and reward model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import psutil
import torch

import models
from convert.source import Source
from data.peers import Peers
from models.adapters.attach import attach
from models.adapters.config import LoraConfig
from models.config import ModelConfig
from models.generation import Generator, GeneratorConfig
from models.generation.text import Tokenizer
from models.init import InitSource
from models.parts import ALL
from models.routing import RouterBook
from parallel.engine import AUTOCAST, Engine
from parallel.frozen import Frozen
from parallel.groups import Groups, neighbours
from parallel.materialise import TensorSource
from parallel.sharding import Place
from trainer import adapters, folders
from trainer.build import make_engine, make_frozen, weights_of
from trainer.checkpoint import Checkpoint
from trainer.config import RunConfig
from trainer.folders import other_model
from trainer.itself import frozen_start, itself
from trainer.rl.checks import critic_start, critics_view, tp_fault
from trainer.rl.learner import Learner
from trainer.rl.packing import Packer
from trainer.rl.samples import Model
from trainer.rl.served import ServedAuthor, ServedWeights, server_of
from trainer.rl.weights import GeneratorWeights, TrainedItself, generates
from trainer.rollout.rounds import ROUND_S, Rounds
from trainer.rollout.vllm_writer import VllmWriter
from trainer.sharing import sharing_fault
from trainer.stages.policy import Policy
from trainer.stages.policy_config import PolicyConfig
from trainer.stages.ppo import Critic, PpoConfig

FREE_SHARE = 0.5
"""A generator's copy may take at most this share of the memory that is free before it is made."""


def make_policy(
    cfg: RunConfig, stage: PolicyConfig, groups: Groups, saved: Checkpoint | None, channels: int
) -> Learner:
    """The policy with its update, from its start or from where it goes on."""
    source, sizes = weights_of(cfg, saved), (cfg.parallel, cfg.data.seq_len)
    engine = make_engine(cfg.model, cfg.engine, cfg.optim, groups, source, *sizes, cfg.adapter, cfg.run.seed)
    update = Policy(stage, channels, cfg.rollout.max_new_tokens, cfg.rollout.temperature, groups.cp)
    routers = RouterBook(engine.chunks, channels)
    return Learner("train", engine, update, routers, cfg.optim, packer_of(cfg, groups), groups)


def make_critic(cfg: RunConfig, stage: PpoConfig, groups: Groups, source: TensorSource, channels: int) -> Learner:
    """The critic with its update."""
    # All of it learns, or its adapter.
    optim = dataclasses.replace(cfg.optim, lr=stage.critic_lr or cfg.optim.lr, parts=ALL)
    seen, sizes = critic_run(cfg, stage), (cfg.parallel, cfg.data.seq_len)
    engine = make_engine(seen.model, cfg.engine, optim, groups, source, *sizes, seen.adapter, cfg.run.seed)
    routers = RouterBook(engine.chunks, channels)
    return Learner("critic", engine, Critic(stage, channels), routers, optim, packer_of(cfg, groups), groups)


def contract(cfg: RunConfig, stage: PolicyConfig) -> str:
    """What the losses are, in words."""
    said = [Policy(stage, 1, cfg.rollout.max_new_tokens).contract]
    return "\n".join(said + ([Critic(stage, 1).contract] if isinstance(stage, PpoConfig) else []))


def packer_of(cfg: RunConfig, groups: Groups) -> Packer:
    """Micro-batches as the data section asks; answers have their prompt in common where every model allows it."""
    stage = cfg.stage
    assert isinstance(stage, PolicyConfig)
    named = (stage.reference, cfg.rollout.reward_model, stage.critic if isinstance(stage, PpoConfig) else None)
    models_asked = [cfg.model, *(folders.model_in(folder) for folder in named if folder is not None)]
    share = all(sharing_fault(model, cfg.parallel) is None for model in models_asked)
    return Packer(cfg.data.seq_len, cfg.data.micro_batch_rows, groups, cfg.parallel, share)


def critic_model(cfg: RunConfig, stage: PpoConfig) -> ModelConfig:
    """The critic's sizes: those of what it starts from."""
    start = critic_start(cfg, stage)
    model = cfg.model if start is None or start == cfg.init_from else folders.model_in(start)
    return dataclasses.replace(model, head="scalar")


def critic_run(cfg: RunConfig, stage: PpoConfig) -> RunConfig:
    """The run as if it trained the critic: its model, what that starts from, its adapter."""
    return critics_view(cfg, stage, critic_model(cfg, stage))


def critic_source(cfg: RunConfig, stage: PpoConfig, saved: Checkpoint | None) -> TensorSource:
    """The critic's weights, from where it goes on or from its start; where that has no score head, with a fresh one.

    Raises:
        ValueError: the tensors are not the model's, or it cannot go on from there.
    """
    seen = critic_run(cfg, stage)
    other = adapters.other_adapter(seen, saved.state.get("adapter")) if saved is not None else None
    if saved is not None and other is not None:
        raise ValueError(
            f"cannot resume the critic from {saved.folder}: {other}. Take another run.name, or run.resume=never to "
            "start this run again."
        )
    if saved is not None and seen.adapter is None:
        return saved
    start, model = seen.init_from, seen.model
    base = InitSource(model, cfg.run.seed) if start is None else _from_folder(start, model, cfg.run.seed)
    return base if seen.adapter is None else adapters.weights(seen, base, saved)


def make_reference(cfg: RunConfig, stage: PolicyConfig, groups: Groups, policy: Engine) -> Model | None:
    """What the policy's divergence is measured from; None where it is not wanted."""
    if not stage.needs_reference:
        return None
    if stage.reference is None:
        return itself(cfg, policy) or frozen_start(cfg, groups, cfg.rollout.offload)
    same = other_model(stage.reference, cfg.model) is None
    model = cfg.model if same else folders.model_in(stage.reference)
    return _frozen(cfg, model, groups, _from_folder(stage.reference, model))


def make_reward_model(cfg: RunConfig, groups: Groups) -> Frozen | None:
    """The model that gives a part of the reward; None where there is none."""
    if cfg.rollout.reward_model is None:
        return None
    model = folders.model_in(cfg.rollout.reward_model)
    return _frozen(cfg, model, groups, _from_folder(cfg.rollout.reward_model, model))


def _frozen(cfg: RunConfig, model: ModelConfig, groups: Groups, source: TensorSource) -> Frozen:
    return make_frozen(model, cfg.engine, groups, source, cfg.parallel, cfg.data.seq_len, cfg.rollout.offload)


def _from_folder(folder: str, model: ModelConfig, seed: int = 0) -> Source:
    source = Source(folders.opened(folder), model, seed)
    source.check()
    return source


# ---- the generator ------------------------------------------------------------------------------------------------


def make_weights(cfg: RunConfig, engine: Engine, groups: Groups, timeout_s: float) -> GeneratorWeights | TrainedItself:
    """The policy for generation, filled. In low precision the generator has weights of that type; of a base in 4 bits
    it has a copy in full."""
    tp = cfg.rollout.tp or generator_tp(cfg, engine, groups)
    if generates(engine, tp):
        return TrainedItself(engine)
    model = models.build(cfg.model, Place(tp=neighbours(groups, tp, timeout_s)))
    if cfg.adapter is not None:
        lora = isinstance(cfg.adapter, LoraConfig)
        attach(model, dataclasses.replace(cfg.adapter, base="fp32") if lora else cfg.adapter)
    weights = GeneratorWeights(engine, model, AUTOCAST.get(cfg.engine.precision, torch.float32))
    weights.fill()
    return weights


def make_generator(
    cfg: RunConfig, weights: GeneratorWeights | TrainedItself, tokenizer: Tokenizer | None, stop_tokens: tuple[int, ...]
) -> Generator:
    """The generator that reads these weights."""
    limits = GeneratorConfig(max_rows=cfg.rollout.max_rows, max_cached_tokens=cfg.rollout.max_cached_tokens)
    return Generator(weights.model, tokenizer, limits, stop_tokens)


def make_served(
    cfg: RunConfig, engine: Engine, groups: Groups, run_dir: Path, tokenizer: Tokenizer, stop_tokens: tuple[int, ...]
) -> tuple[ServedWeights, ServedAuthor]:
    """The policy as a vLLM server has it."""
    server, named = server_of(cfg), cfg.rollout.weights_dir
    rounds = Rounds(Peers(groups.rank, groups.world, groups.all_gather), round_s(cfg))
    folder = run_dir / "policy" if named is None else Path(named) / run_dir.name
    weights = ServedWeights(cfg, engine, server, rounds, folder)
    return weights, ServedAuthor(VllmWriter(server, tokenizer, stop_tokens, rounds))


def round_s(cfg: RunConfig) -> float:
    """Seconds between two rounds, well below what a rank may wait."""
    return min(ROUND_S, cfg.run.hang_timeout / 4)


def generator_tp(cfg: RunConfig, engine: Engine, groups: Groups) -> int:
    """Training's tp where the trained weights can be read as they are; else as few ranks as have room for a copy."""
    if groups.pp.size == groups.ep.size == 1 and cfg.engine.zero != 3 and cfg.engine.precision == "fp32":
        return groups.tp.size
    width = AUTOCAST.get(cfg.engine.precision, torch.float32).itemsize
    bytes_ = width * sum(p.numel() for p in models.build(cfg.model).parameters())
    room = min(groups.all_gather(_free_bytes(groups)))
    sizes = [n for n in range(1, groups.world + 1) if groups.world % n == 0 and not tp_fault(cfg.model, n)]
    return next((n for n in sizes if bytes_ / n <= FREE_SHARE * room), sizes[-1])


def _free_bytes(groups: Groups) -> float:
    """Memory one rank may count on."""
    if groups.device.type == "cuda":
        return float(torch.cuda.mem_get_info(groups.device)[0])
    return psutil.virtual_memory().available / groups.world
