"""The whole configuration of a run, and every check that needs more than one section.

Each section's dataclass lives beside the code that reads it and judges its own values (``problems()``); this file
composes them and judges how they go together. Nothing here starts a process group or allocates a weight.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from dataclasses import dataclass, field
from pathlib import Path

import torch

from data.config import DataConfig
from data.config import problems as data_problems
from models import problems as model_problems
from models.adapters.config import BitfitConfig, Ia3Config, LoraConfig
from models.adapters.virtual_config import PrefixConfig, PromptConfig
from models.config import ModelConfig
from parallel.config import EngineConfig, ParallelConfig
from trainer import adapters, chain, layouts, pair_rules, parts
from trainer.folders import folder_problem, model_in, nearby, other_model, tokenizer_problem
from trainer.layout_rules import Layout, broken
from trainer.logging.config import LogConfig
from trainer.optim import OptimConfig
from trainer.pictures import picture_config
from trainer.problems import Problem, format_problems, nearest
from trainer.rl import checks as rl_checks
from trainer.rollout.config import RolloutConfig
from trainer.sharing import sharing_fault
from trainer.stages import DpoConfig, NextTokenConfig, PolicyConfig, RewardConfig, StageConfig

__all__ = ["Machine", "Problem", "RunConfig", "RunSection", "check", "format_problems", "ignored"]


@dataclass(frozen=True)
class RunSection:
    """How long to train, where the run lives, and what is kept of it."""

    name: str | None = None
    """Folder of this run under run.dir; null = stage, model and time of the start."""
    dir: str = "runs"
    """Folder that holds the run folders."""
    seed: int = 0
    """Seed of fresh weights, sample order, held-out split and random channels."""
    steps: int | None = None
    """Optimizer steps to train; give this or run.epochs."""
    epochs: float | None = None
    """Passes over the training rows; give this or run.steps."""
    save_every: int = 0
    """Steps between checkpoints; 0 = only at the end."""
    keep_last: int = 2
    """Checkpoints kept; older ones are removed after a newer one is whole."""
    eval_every: int = 0
    """Steps between held-out evaluations; 0 = only before the first step and at the end. Needs held-out data."""
    resume: str = "auto"
    """auto = go on from the latest checkpoint of this run if there is one, never, or a checkpoint folder."""
    threads: int | None = None
    """Intra-op CPU threads of each process; null leaves torch's choice."""
    hang_timeout: float = 600.0
    """Seconds a process may wait for the others before the job ends with a message."""

    def problems(self) -> list[tuple[str, object, str, str]]:
        """Values wrong in themselves, as (key, value, reason, way out)."""
        name_good = self.name is None or (bool(self.name) and not set(self.name) & set("/\\") and self.name[0] != ".")
        rules = [
            (
                "name",
                name_good,
                "is one folder name: no slash, no leading dot",
                "run.name=my_run, with run.dir for the place",
            ),
            ("seed", self.seed >= 0, "cannot be negative", "run.seed=0"),
            ("steps", self.steps is None or self.steps > 0, "must be at least 1", "run.steps=1"),
            ("epochs", self.epochs is None or self.epochs > 0, "must be above 0", "run.epochs=1"),
            ("save_every", self.save_every >= 0, "cannot be negative", "run.save_every=0 saves only at the end"),
            ("keep_last", self.keep_last >= 1, "the latest checkpoint is always kept", "run.keep_last=1"),
            ("eval_every", self.eval_every >= 0, "cannot be negative", "run.eval_every=0 evaluates at start and end"),
            ("resume", bool(self.resume), "is empty", "run.resume=auto"),
            ("threads", self.threads is None or self.threads > 0, "must be at least 1", "run.threads=1"),
            ("hang_timeout", self.hang_timeout > 0, "must be above 0 seconds", "run.hang_timeout=600"),
        ]
        return [(f"run.{key}", getattr(self, key), why, way) for key, good, why, way in rules if not good]


@dataclass(frozen=True)
class RunConfig:
    """One run: every section, as composed by Hydra and typed by ``trainer.door.load``."""

    model: ModelConfig
    """Sizes of the model (conf/model)."""
    stage: StageConfig
    """What is trained for (conf/stage)."""
    data: DataConfig
    """Sources, tokens and batches (conf/data)."""
    parallel: ParallelConfig
    """How model and tokens are laid over the processes (conf/parallel)."""
    engine: EngineConfig
    """How a step is carried out (conf/engine)."""
    optim: OptimConfig
    """Optimizer and schedule (conf/optim)."""
    log: LogConfig
    """Where the numbers go (conf/log)."""
    run: RunSection
    """Length, place and seed of the run (conf/run)."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """Prompts, texts and rewards of reinforcement learning (conf/rollout)."""
    adapter: LoraConfig | Ia3Config | BitfitConfig | PromptConfig | PrefixConfig | None = None
    """Train a few parameters beside a model that stays as it is (conf/adapter); null trains all of it."""
    init_from: str | None = None
    """Weights to start from: a Hugging Face folder, a Megatron checkpoint of any layout, or a run of Loom; null draws
    fresh weights from run.seed."""
    init_parts: parts.InitPartsConfig = field(default_factory=parts.InitPartsConfig)
    """Parts of a model that sees to start from, each from a folder of its own; in place of init_from."""


@dataclass(frozen=True)
class Machine:
    """What this process finds around it, as far as the checks need it."""

    gpu: bool
    flash_attn: bool

    @staticmethod
    def here() -> Machine:
        """The machine of this process; allocates nothing on a device."""
        return Machine(torch.cuda.is_available(), importlib.util.find_spec("flash_attn") is not None)


def check(cfg: RunConfig, world_size: int, machine: Machine | None = None) -> list[Problem]:
    """Every problem of the configuration at once; empty when the run may start.

    ``world_size`` is the number of processes the launcher started. Reads only the file system; cheap enough for
    every rank.
    """
    machine = machine or Machine.here()
    rules = (_layout, _batch, _length, _training_length, _schedule, _stage, _start, _reference, _tokenizer, _resume)
    crossing = [problem for rule in rules for problem in rule(cfg, world_size)] + _engine(cfg, machine)
    crossing += (
        adapters.problems(cfg)
        + parts.problems(cfg)
        + pair_rules.problems(cfg)
        + rl_checks.problems(cfg, world_size)
        + chain.problems(chain.link_of(cfg))
    )
    told = {problem.key for problem in crossing}  # a rule over several sections says more than the section alone
    return [problem for problem in own_problems(cfg) if problem.key not in told] + crossing


def own_problems(cfg: RunConfig) -> list[Problem]:
    """What each section says of its own values."""
    rows = [(f"model.{key}", value, reason, way) for key, value, reason, way in model_problems(cfg.model)]
    rows += data_problems(cfg.data)
    if cfg.adapter is not None:
        rows += [(f"adapter.{key}", value, reason, way) for key, value, reason, way in cfg.adapter.problems()]
    for section in (cfg.stage, cfg.parallel, cfg.engine, cfg.optim, cfg.log, cfg.run, cfg.rollout):
        rows += section.problems()
    return [Problem(*row) for row in rows]


def _layout(cfg: RunConfig, world_size: int) -> list[Problem]:
    layout = _layout_of(cfg)
    if isinstance(cfg.stage, PolicyConfig):
        layout = dataclasses.replace(layout, data=rl_checks.any_rows(cfg.data, cfg.parallel, world_size))
    return layouts.problems(layout, world_size)


def _layout_of(cfg: RunConfig) -> Layout:
    return Layout(cfg.model, cfg.parallel, cfg.engine, cfg.data)


def _batch(cfg: RunConfig, world_size: int) -> list[Problem]:
    rows, micro = cfg.data.global_batch_rows, cfg.data.micro_batch_rows
    if cfg.parallel.problems() or isinstance(cfg.stage, PolicyConfig):
        return []
    dp = _layout_of(cfg).dp(world_size)
    if rows < 1 or micro < 1 or dp == 0 or rows % (micro * dp) == 0:
        return []
    unit = micro * dp
    below, above = rows // unit * unit, -(-rows // unit) * unit
    ways = [f"data.global_batch_rows={n}" for n in (below, above) if n > 0]
    if rows % dp == 0:
        per_rank = rows // dp
        ways.append(f"data.micro_batch_rows={max(m for m in range(1, min(micro, per_rank) + 1) if per_rank % m == 0)}")
    reason = (
        f"is not a multiple of data.micro_batch_rows x data parallel = {micro} x {dp} = {unit}, "
        "so the rows of one step cannot be shared out evenly"
    )
    return [Problem("data.global_batch_rows", rows, reason, " or ".join(ways))]


def _length(cfg: RunConfig, world_size: int) -> list[Problem]:
    wanted, most = cfg.data.seq_len, cfg.model.max_seq_len
    if wanted <= most or most < 1:
        return []
    reason = f"is longer than the model's positions reach: model.max_seq_len={most}"
    if cfg.model.compares:  # they are learnt, so weights that were trained have no more
        more = "" if cfg.init_from is not None else f" or model.max_seq_len={wanted}"
        return [Problem("data.seq_len", wanted, reason, f"data.seq_len={most}{more}")]
    longer = f"model.max_seq_len={wanted}"
    if cfg.init_from is not None:
        trained = cfg.model.rope.original_max_seq_len or most
        factor = -(-wanted // trained)
        longer += f" model.rope.scaling=yarn model.rope.factor={factor} model.rope.original_max_seq_len={trained}"
    return [Problem("data.seq_len", wanted, reason, f"data.seq_len={most}, or stretch the model: {longer}")]


def _training_length(cfg: RunConfig, world_size: int) -> list[Problem]:
    if (cfg.run.steps is None) != (cfg.run.epochs is None):
        return []
    if cfg.run.steps is None:
        reason = "neither run.steps nor run.epochs says how long to train"
        return [Problem("run.steps", None, reason, "run.steps=100 or run.epochs=1")]
    reason = f"run.epochs={cfg.run.epochs:g} is given too, and only one of them can say when to stop"
    return [Problem("run.steps", cfg.run.steps, reason, "run.epochs=null or run.steps=null")]


def _schedule(cfg: RunConfig, world_size: int) -> list[Problem]:
    optim, steps, found = cfg.optim, cfg.run.steps, []
    if optim.schedule == "wsd" and optim.decay_steps == 0:
        tail = max(1, (steps or 1000) // 10)
        reason = "optim.schedule=wsd ends in a decay and needs its length"
        found.append(Problem("optim.decay_steps", 0, reason, f"optim.decay_steps={tail}"))
    if steps is None or steps < 1:
        return found
    if optim.warmup_steps >= steps:
        reason = f"the warm-up fills the whole run of run.steps={steps}, so the rate never leaves it"
        found.append(Problem("optim.warmup_steps", optim.warmup_steps, reason, f"optim.warmup_steps={steps // 10}"))
    elif optim.schedule == "wsd" and optim.warmup_steps + optim.decay_steps > steps:
        reason = f"with optim.warmup_steps={optim.warmup_steps} it is longer than run.steps={steps}"
        way = f"optim.decay_steps={steps - optim.warmup_steps}"
        found.append(Problem("optim.decay_steps", optim.decay_steps, reason, way))
    return found


def _stage(cfg: RunConfig, world_size: int) -> list[Problem]:
    stage, head, found = cfg.stage, cfg.model.head, []
    if isinstance(stage, NextTokenConfig) and stage.name == "pretrain" and stage.loss_on == "assistant":
        reason = "pretraining reads plain text, in which no token belongs to an assistant"
        way = "stage.loss_on=all, or stage=sft for conversations"
        found.append(Problem("stage.loss_on", "assistant", reason, way))
    if (head == "scalar") != isinstance(stage, RewardConfig):
        gives = "gives a score instead of the next token" if head == "scalar" else "gives no score"
        other = "lm" if head == "scalar" else "scalar"
        reason = f"stage.name={stage.name} cannot train a model that {gives}"
        found.append(Problem("model.head", head, reason, f"model.head={other}"))
    if shares_prompts(stage) and (fault := sharing_fault(cfg.model, cfg.parallel)):
        key, value, why, way = fault
        reason = f"the answers of a pair cannot have their prompt in common: {key}={value} {why}"
        found.append(Problem("stage.share_prompt", True, reason, f"stage.share_prompt=false or {way}"))
    return found


def shares_prompts(stage: StageConfig) -> bool:
    """Whether both answers of a pair shall have their prompt in common."""
    return isinstance(stage, (DpoConfig, RewardConfig)) and stage.share_prompt and stage.learns_from == "preference"


def _reference(cfg: RunConfig, world_size: int) -> list[Problem]:
    stage = cfg.stage
    if not isinstance(stage, DpoConfig) or stage.reference is None or not stage.needs_reference:
        return []
    wrong = folder_problem(stage.reference)
    if wrong is not None:
        return [dataclasses.replace(wrong, key="stage.reference")]
    if model_in(stage.reference).head != "lm":
        reason = "is a reward model, which has no log-probabilities"
        return [Problem("stage.reference", stage.reference, reason, "the folder of a language model")]
    if reference_model(cfg) is cfg.model:
        return []
    if picture_config(reference_model(cfg)) != picture_config(cfg.model):
        reason = "makes something else of pictures than the policy does, so that tokens would stand for other features"
        return [Problem("stage.reference", stage.reference, reason, "a model with the policy's tower and images")]
    faults = broken(dataclasses.replace(_layout_of(cfg), model=reference_model(cfg)), world_size)
    way = "stage.reference=null, or a model of the same sizes"
    return [Problem("stage.reference", stage.reference, f"{key}={value} {why}", way) for key, value, why in faults]


def reference_model(cfg: RunConfig) -> ModelConfig:
    """The model that the policy is compared with: the run's own, unless the reference's folder holds another one."""
    folder = cfg.stage.reference if isinstance(cfg.stage, DpoConfig) else None
    return cfg.model if folder is None or other_model(folder, cfg.model) is None else model_in(folder)


def _start(cfg: RunConfig, world_size: int) -> list[Problem]:
    if cfg.init_from is None:
        return []
    return [p for p in (folder_problem(cfg.init_from) or other_model(cfg.init_from, cfg.model),) if p]


def _tokenizer(cfg: RunConfig, world_size: int) -> list[Problem]:
    key = "init_parts.decoder" if cfg.init_from is None and cfg.init_parts.decoder is not None else "init_from"
    start = cfg.init_from or cfg.init_parts.decoder
    return [p for p in (tokenizer_problem(cfg.data.tokenizer, start, key),) if p]


def _resume(cfg: RunConfig, world_size: int) -> list[Problem]:
    path = cfg.run.resume
    if path in ("auto", "never") or not path or Path(path).is_dir():
        return []
    words = nearest(path, ("auto", "never"))
    way = f"run.resume={words[0]}" if words else nearby(Path(path)) or "run.resume=auto, never or a checkpoint folder"
    return [Problem("run.resume", path, "there is no such checkpoint folder", way)]


def _engine(cfg: RunConfig, machine: Machine) -> list[Problem]:
    if cfg.engine.attention != "flash_attn":
        return []
    lacks = []
    if not machine.gpu:
        lacks.append("a GPU")
    if not machine.flash_attn:
        lacks.append("the flash-attn package")
    if cfg.engine.precision == "fp32":
        lacks.append("engine.precision=bf16 or fp16")
    if not lacks:
        return []
    reason = f"flash attention needs {', '.join(lacks)}"
    return [Problem("engine.attention", "flash_attn", reason, "engine.attention=sdpa")]


def ignored(cfg: RunConfig, machine: Machine | None = None) -> list[str]:
    """Settings that were given but change nothing in this run, or cost much here; one sentence each, to warn with.

    A setting counts as given when it differs from its dataclass default.
    """
    machine = machine or Machine.here()
    optim, run, data, steps = cfg.optim, cfg.run, cfg.data, cfg.run.steps
    has_eval = bool(data.eval_sources) or data.eval_fraction > 0
    rows = [
        *_ignored_layout(cfg.parallel),
        (
            optim.decay_steps != 0 and optim.schedule != "wsd",
            f"optim.decay_steps={optim.decay_steps} is ignored: only optim.schedule=wsd has a separate decay",
        ),
        (
            _given(optim, "min_lr_ratio") and optim.schedule == "constant",
            f"optim.min_lr_ratio={optim.min_lr_ratio:g} is ignored: optim.schedule=constant never falls",
        ),
        (
            _given(run, "keep_last") and run.save_every == 0,
            f"run.keep_last={run.keep_last} is ignored: with run.save_every=0 one checkpoint is written, at the end",
        ),
        (
            run.eval_every > 0 and not has_eval,
            f"run.eval_every={run.eval_every} is ignored: no data is held out (data.eval_fraction, data.eval_sources)",
        ),
        (
            steps is not None and run.save_every > steps,
            f"run.save_every={run.save_every} is never reached in run.steps={steps}; "
            "the checkpoint is written at the end",
        ),
        (
            steps is not None and has_eval and run.eval_every > steps,
            f"run.eval_every={run.eval_every} is never reached in run.steps={steps}; evaluation runs at the end",
        ),
        (
            data.chat_template is not None and cfg.stage.name == "pretrain",
            "data.chat_template is ignored: stage.name=pretrain applies no template to text",
        ),
        (
            data.random_channels > 0 and any(s.channel or s.channel_field for s in data.sources),
            "the channels named in data.sources are ignored: "
            f"data.random_channels={data.random_channels} draws them at random",
        ),
        (
            cfg.log.wandb == "disabled" and (_given(cfg.log, "project") or _given(cfg.log, "entity")),
            "log.project and log.entity are ignored: log.wandb=disabled",
        ),
        (
            cfg.engine.precision != "fp32" and not machine.gpu,
            f"engine.precision={cfg.engine.precision} on a CPU is correct but slow "
            "(6 to 16 times slower than fp32 where this was measured); engine.precision=fp32 is the fast choice here",
        ),
    ]
    own = cfg.stage.ignored() if isinstance(cfg.stage, (DpoConfig, PolicyConfig)) else []
    own += cfg.rollout.ignored(cfg.stage.name, isinstance(cfg.stage, PolicyConfig))
    return own + adapters.ignored(cfg) + [text for applies, text in rows if applies]


def _ignored_layout(parallel: ParallelConfig) -> list[tuple[bool, str]]:
    """Settings of an axis that has one rank only."""
    needs = {"sequence_parallel": "tp", "schedule": "pp", "vpp": "pp", "stage_layers": "pp", "context": "cp"}
    rows = []
    for name, axis in needs.items():
        value = getattr(parallel, name)
        shown = "true" if value is True else list(value) if isinstance(value, tuple) else value
        text = f"parallel.{name}={shown} is ignored: parallel.{axis}=1"
        rows.append((_given(parallel, name) and getattr(parallel, axis) == 1, text))
    return rows


def _given(section: object, name: str) -> bool:
    """Whether a field differs from its dataclass default."""
    return getattr(section, name) != getattr(type(section), name)  # a dataclass default is a class attribute
