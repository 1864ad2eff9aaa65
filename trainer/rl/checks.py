"""What can be wrong with a reinforcement learning run before anything starts: every rule that looks at its stage."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from data.config import DataConfig
from models.adapters.config import BitfitConfig, Ia3Config, LoraConfig
from models.config import ModelConfig
from parallel.config import EngineConfig, ParallelConfig
from trainer import adapters
from trainer.folders import folder_problem, model_in
from trainer.layout_rules import Layout, broken
from trainer.pictures import picture_config
from trainer.problems import Problem
from trainer.stages.grpo import GrpoConfig
from trainer.stages.policy_config import PolicyConfig
from trainer.stages.ppo import PpoConfig

if TYPE_CHECKING:
    from trainer.config import RunConfig

_ONE_ROW = DataConfig(sources=(), seq_len=1, micro_batch_rows=1, global_batch_rows=1)
"""The layout rules ask for a data section; the one for tp does not look at it."""


def problems(cfg: RunConfig, world: int) -> list[Problem]:
    """Everything wrong with the rollouts and models of a run; nothing for a stage that makes no rollouts."""
    if not isinstance(cfg.stage, PolicyConfig):
        return []
    rules = (_rewards, _lengths, _samples, _generator, _critic_adapter)
    return [problem for rule in rules for problem in rule(cfg, cfg.stage, world)] + _models(cfg, cfg.stage, world)


def any_rows(data: DataConfig, parallel: ParallelConfig, world: int) -> DataConfig:
    """The data section with a batch that every layout can share out: samples are packed into as many rows as they
    need, so `data.global_batch_rows` says nothing in these stages."""
    rows = max(data.micro_batch_rows, 1) * world * max(parallel.pp, 1)
    return dataclasses.replace(data, global_batch_rows=rows)


def tp_fault(model: ModelConfig, tp: int) -> str | None:
    """Why so many ranks cannot share a generator; None if they can."""
    layout = Layout(model, ParallelConfig(tp=tp), EngineConfig(), _ONE_ROW)
    return next((fault.reason for fault in broken(layout, tp) if fault.key == "parallel.tp"), None)


def critic_start(cfg: RunConfig, stage: PpoConfig) -> str | None:
    """The folder a critic starts from; None = fresh weights, as the policy's."""
    return stage.critic or cfg.rollout.reward_model or cfg.init_from


def critics_view(cfg: RunConfig, stage: PpoConfig, model: ModelConfig) -> RunConfig:
    """The run as if it trained the critic `model`. Its adapter is its own: fresh, whatever the policy's starts from."""
    adapter = cfg.adapter if stage.critic_adapter else None
    if isinstance(adapter, LoraConfig | Ia3Config):
        adapter = dataclasses.replace(adapter, start=None)
    return dataclasses.replace(cfg, init_from=critic_start(cfg, stage), model=model, adapter=adapter)


def _critic_adapter(cfg: RunConfig, stage: PolicyConfig, world: int) -> list[Problem]:
    if not isinstance(stage, PpoConfig) or not stage.critic_adapter:
        return []
    key, way = "stage.critic_adapter", "stage.critic_adapter=false"
    if cfg.adapter is None:
        return [Problem(key, True, "says the critic has the adapter of the section adapter, and there is none", way)]
    if not isinstance(cfg.adapter, LoraConfig | Ia3Config | BitfitConfig):
        return [Problem(key, True, f"a critic takes no adapter of kind {cfg.adapter.name}", way)]
    start = critic_start(cfg, stage)
    if start is None or start == cfg.init_from or folder_problem(start) is not None:
        return []
    model = dataclasses.replace(model_in(start), head="scalar")
    told = [] if adapters.problems(cfg) else adapters.problems(critics_view(cfg, stage, model))
    return [Problem(key, True, f"of the critic in {start}, {each.key} {each.reason}", way) for each in told]


def _rewards(cfg: RunConfig, stage: PolicyConfig, world: int) -> list[Problem]:
    if cfg.rollout.rewards or cfg.rollout.reward_model is not None:
        return []
    reason = f"stage.name={stage.name} learns from rewards, and nothing gives any"
    way = "'rollout.rewards=[{function: numeric_match}]' (docs/rl.md lists them), or rollout.reward_model=FOLDER"
    return [Problem("rollout.rewards", [], reason, way)]


def _lengths(cfg: RunConfig, stage: PolicyConfig, world: int) -> list[Problem]:
    wanted, rows = cfg.rollout.max_tokens, cfg.data.seq_len
    if wanted <= rows or min(cfg.rollout.max_prompt_tokens, cfg.rollout.max_new_tokens, rows) < 1:
        return []
    reason = (
        f"with rollout.max_prompt_tokens={cfg.rollout.max_prompt_tokens} a sample may have {wanted} tokens, and a row "
        f"has data.seq_len={rows}"
    )
    way = f"data.seq_len={wanted}"
    if rows > cfg.rollout.max_prompt_tokens:
        way += f" or rollout.max_new_tokens={rows - cfg.rollout.max_prompt_tokens}"
    return [Problem("rollout.max_new_tokens", cfg.rollout.max_new_tokens, reason, way)]


def _samples(cfg: RunConfig, stage: PolicyConfig, world: int) -> list[Problem]:
    rollout, found = cfg.rollout, []
    if isinstance(stage, GrpoConfig) and stage.compares and rollout.samples == 1:
        reason = f"stage.advantage={stage.advantage} compares the samples of a prompt, and one cannot be compared"
        way = "rollout.samples=8 or stage.advantage=reinforce_pp"
        found.append(Problem("rollout.samples", 1, reason, way))
    count = rollout.prompts_per_step * rollout.samples
    if min(rollout.prompts_per_step, rollout.samples, stage.mini_batches) >= 1 and count % stage.mini_batches:
        fits = max(n for n in range(1, stage.mini_batches) if count % n == 0)
        reason = (
            f"the {rollout.prompts_per_step} x {rollout.samples} samples of a step cannot be cut into so many parts"
        )
        found.append(Problem("stage.mini_batches", stage.mini_batches, reason, f"stage.mini_batches={fits}"))
    return found


def _generator(cfg: RunConfig, stage: PolicyConfig, world: int) -> list[Problem]:
    tp, found = cfg.rollout.tp, []
    if cfg.rollout.backend == "vllm":
        return _server(cfg)
    if tp is None or tp < 1 or cfg.model.size_problems():
        return found
    fault = f"does not divide the {world} processes" if world % tp else tp_fault(cfg.model, tp)
    if fault:
        good = [n for n in range(1, world + 1) if world % n == 0 and not tp_fault(cfg.model, n)]
        ways = ", ".join(f"rollout.tp={n}" for n in good) or "another number of processes"
        found.append(Problem("rollout.tp", tp, fault, f"{ways}, or rollout.tp=null"))
    return found


def _server(cfg: RunConfig) -> list[Problem]:
    """What a vLLM server cannot be given: pictures, and some adapters."""
    adapter, reason = cfg.adapter, None
    if cfg.model.vision is not None:
        reason = "a vLLM server is asked by tokens, and cannot be shown pictures that way (model.vision)"
    elif adapter is None:
        return []
    elif not isinstance(adapter, LoraConfig) or adapter.dora:
        kind = "dora" if isinstance(adapter, LoraConfig) else adapter.name
        reason = f"a vLLM server takes whole models and plain LoRA adapters, none of kind {kind}"
    elif adapter.base == "nf4":
        reason = "the server has the base's full weights, and the policy those in 4 bits"
    elif any(name.startswith("experts.") for name in adapter.targets):
        reason = "a vLLM server is given no adapters of experts"
    elif cfg.init_from is None:
        reason = "an adapter beside fresh random weights: no server has those"
    return [] if reason is None else [Problem("rollout.backend", "vllm", reason, "rollout.backend=loom")]


def _models(cfg: RunConfig, stage: PolicyConfig, world: int) -> list[Problem]:
    """The other models: there, of the right kind, with the policy's tokens, and legal in the layout."""
    asked: list[tuple[str, str | None, str]] = []
    if stage.needs_reference:
        asked.append(("stage.reference", stage.reference, "lm"))
    asked.append(("rollout.reward_model", cfg.rollout.reward_model, "scalar"))
    if isinstance(stage, PpoConfig):
        asked.append(("stage.critic", stage.critic, "any"))
    return [
        problem
        for key, folder, head in asked
        if folder is not None
        for problem in _model(cfg, key, folder, head, world)
    ]


def _model(cfg: RunConfig, key: str, folder: str, head: str, world: int) -> list[Problem]:
    wrong = folder_problem(folder)
    if wrong is not None:
        return [dataclasses.replace(wrong, key=key)]
    model, null = model_in(folder), f"{key}=null"
    if head == "lm" and model.head != "lm":
        return [
            Problem(key, folder, "is a reward model, which has no log-probabilities", f"a language model, or {null}")
        ]
    if head == "scalar" and model.head != "scalar":
        reason = "is a language model without a score head, so it gives no reward"
        return [
            Problem(key, folder, reason, "a run of stage=reward, or a sequence classification model with one label")
        ]
    if model.vocab_size != cfg.model.vocab_size:
        reason = (
            f"knows {model.vocab_size} tokens and the policy {cfg.model.vocab_size}: their tokens mean other things"
        )
        return [Problem(key, folder, reason, f"a model of the policy's family and tokenizer, or {null}")]
    if picture_config(model) != picture_config(cfg.model):
        reason = "makes something else of pictures than the policy does, so that tokens would stand for other features"
        return [Problem(key, folder, reason, f"a model with the policy's tower and model.vision.images, or {null}")]
    if model.max_seq_len < cfg.rollout.max_tokens:
        reason = f"reads {model.max_seq_len} tokens, and a sample may have {cfg.rollout.max_tokens}"
        return [Problem(key, folder, reason, f"rollout.max_new_tokens below that, or {null}")]
    layout = Layout(model, cfg.parallel, cfg.engine, any_rows(cfg.data, cfg.parallel, world))
    if cfg.parallel.problems() or model == cfg.model:
        return []
    faults = broken(layout, world)
    return [Problem(key, folder, f"{name}={value} {why}", "a layout for both models") for name, value, why in faults]
