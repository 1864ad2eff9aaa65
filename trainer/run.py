"""The order of a run, on one page: check, join, read data, build, restore, train."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

import data.pipeline
from data.batch import MicroBatch
from data.gate import GateError
from data.peers import Peers
from data.pipeline import TrainingData
from models.config import ModelConfig
from models.flops import step_flops
from models.routing import RouterBook
from parallel.engine import Engine
from parallel.groups import Groups, LauncherRanks, build_groups
from parallel.schedules import formula_idle_share
from parallel.watch import watching
from trainer import checkpoint, folders, provenance
from trainer.build import fresh_weights, make_engine
from trainer.config import RunConfig, check, format_problems, ignored
from trainer.door import to_yaml
from trainer.logging.log import Log, NullLog, RunLog
from trainer.loop import Progress, Trainer
from trainer.run_folder import run_folder
from trainer.stages import build_stage


def run(cfg: RunConfig, ranks: LauncherRanks) -> Path:
    """Train as the config says and return the run folder.

    Raises:
        ValueError: the config, the data or the disk does not allow it; says what to do.
    """
    started = time.monotonic()
    problems = check(cfg, ranks.world)
    if problems:
        raise ValueError(format_problems(problems))
    cfg = _with_tokenizer(cfg)
    if cfg.run.threads:
        torch.set_num_threads(cfg.run.threads)
    # The collectives' own limit is longer, or they would give up before the watch has told who waits for whom.
    groups = build_groups(ranks, 2 * cfg.run.hang_timeout + 60, cfg.parallel)
    with watching(groups, cfg.run.hang_timeout), run_folder(cfg, groups) as run_dir:
        _train_in(run_dir, cfg, groups, started)
    return run_dir


def _train_in(run_dir: Path, cfg: RunConfig, groups: Groups, started: float) -> None:
    saved = _saved(cfg, run_dir)
    source = saved or fresh_weights(cfg)  # before the data, which may take an hour to read
    corpus = _read_data(cfg, groups, run_dir)
    total_steps = cfg.run.steps or math.ceil((cfg.run.epochs or 0) * corpus.rows_per_epoch / cfg.data.global_batch_rows)
    progress = Progress(saved.state["step"], saved.state["position"]) if saved else Progress()
    stage = build_stage(cfg.stage, len(corpus.channels), groups.cp)
    with _open_log(cfg, groups, run_dir, total_steps, progress.step) as log:
        if groups.is_main:
            provenance.write(run_dir, to_yaml(cfg), stage.contract, groups.world)
            _introduce(cfg, log, groups, run_dir, corpus, stage.contract, saved)
        if progress.step >= total_steps:
            log.close(f"nothing to do: step {progress.step} of {total_steps} is done. Raise run.steps to go on.")
            return
        engine = make_engine(cfg.model, cfg.engine, cfg.optim, groups, source, cfg.parallel, cfg.data.seq_len)
        del source
        folders.forget()  # of a large model the headers alone are large
        routers = RouterBook(engine.chunks, len(corpus.channels))
        if saved:
            checkpoint.restore(saved, engine, groups)
            routers.restore(*saved.state["routers"])
        trainer = Trainer(
            cfg=cfg,
            groups=groups,
            engine=engine,
            stage=stage,
            routers=routers,
            data=corpus,
            log=log,
            flops=functools.partial(_flops, cfg.model),
            save=functools.partial(_save, cfg, run_dir, engine, routers, groups, log, corpus.fingerprint),
            total_steps=total_steps,
        )
        log.note(f"ready after {time.monotonic() - started:.1f} s; training from step {progress.step} to {total_steps}")
        trainer.run(progress)
        log.close(f"done: {progress.step} steps. Checkpoint and metrics in {run_dir}")


def _with_tokenizer(cfg: RunConfig) -> RunConfig:
    """The run with the tokenizer of what it starts from, where none is named; from another run also with its template.

    Settled before the start: what the run starts from may be gone when it is saved.
    """
    if cfg.init_from is None or cfg.data.tokenizer:
        return cfg
    found: dict[str, str | None] = {"tokenizer": folders.tokenizer_in(cfg.init_from)}
    if cfg.data.chat_template is None and cfg.stage.name != "pretrain":
        found["chat_template"] = folders.template_in(cfg.init_from)
    return dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, **found))


def _flops(model: ModelConfig, batch: MicroBatch) -> float:
    lengths = (batch.cu_seqlens[1:] - batch.cu_seqlens[:-1]).tolist()
    return step_flops(model, lengths, batch.num_targets)


def _saved(cfg: RunConfig, run_dir: Path) -> checkpoint.Checkpoint | None:
    """The checkpoint to go on from.

    Raises:
        ValueError: it holds another model.
    """
    if cfg.run.resume == "never":
        return None
    folder = checkpoint.find_latest(run_dir / "checkpoints") if cfg.run.resume == "auto" else Path(cfg.run.resume)
    if folder is None:
        return None
    try:
        saved = checkpoint.Checkpoint(folder)
    except ValueError as error:
        others = [str(path) for path in checkpoint.checkpoints_in(folder.parent) if path != folder]
        hint = f" The others of this run: {', '.join(others)}." if others else ""
        raise ValueError(f"{error}{hint}") from error
    theirs, ours = _flat(saved.state["model"]), _flat(_plain(cfg.model))
    differ = [f"{key}: {theirs.get(key)} -> {value}" for key, value in ours.items() if theirs.get(key) != value]
    if differ:
        raise ValueError(
            f"cannot resume from {folder}: it holds another model ({'; '.join(differ)}). "
            "Take another run.name, or run.resume=never to start this run again."
        )
    return saved


def _flat(model: dict[str, Any]) -> dict[str, Any]:
    """What a model is, as `model.moe.top_k: 2`; how its routers are trained may change between runs."""
    flat: dict[str, Any] = {}
    for key, value in model.items():
        inner = {f"{key}.{name}": each for name, each in value.items()} if isinstance(value, dict) else {key: value}
        flat |= {f"model.{name}": each for name, each in inner.items()}
    trained_as = {f"model.moe.{name}" for name in folders.ROUTER_TRAINING}
    return {key: value for key, value in flat.items() if key not in trained_as}


def _plain(section: Any) -> dict[str, Any]:
    """A dataclass as JSON has it: tuples become lists."""
    return {
        key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(section).items()
    }


def _read_data(cfg: RunConfig, groups: Groups, run_dir: Path) -> TrainingData:
    """The corpus behind its gate; the report and the list of bad rows go to the run folder also when it refuses.

    Raises:
        ValueError: the gate refuses, or the tokenizer makes ids the model has no embedding for.
    """
    report = None
    try:
        corpus = data.pipeline.build(
            cfg.data,
            tokenizer_folder=None,
            loss_on=cfg.stage.loss_on,
            seed=cfg.run.seed,
            peers=Peers(groups.rank, groups.world, groups.all_gather),
            max_seq_len=cfg.model.max_seq_len,
        )
        report = corpus.report
    except GateError as refusal:
        report = refusal.report
        raise
    finally:
        if groups.is_main and report is not None:
            (run_dir / "data_report.json").write_text(json.dumps(report.to_dict(), indent=2) + "\n")
            report.write_bad_rows(str(run_dir / "bad_rows.jsonl"))
    if corpus.max_token_id >= cfg.model.vocab_size:
        raise ValueError(
            f"model.vocab_size={cfg.model.vocab_size}: the tokenizer in {cfg.data.tokenizer} makes "
            f"ids up to {corpus.max_token_id} on this data, which the embedding does not hold. Take the tokenizer that "
            f"belongs to the model, or a model with model.vocab_size={corpus.max_token_id + 1} or more."
        )
    return corpus


def _open_log(
    cfg: RunConfig, groups: Groups, run_dir: Path, total_steps: int, step: int
) -> AbstractContextManager[Log]:
    if not groups.is_main:
        return contextlib.nullcontext(NullLog())
    return RunLog(run_dir, cfg.log, run_dir.name, dataclasses.asdict(cfg), total_steps, step)


def _introduce(
    cfg: RunConfig, log: Log, groups: Groups, run_dir: Path, corpus: TrainingData, contract: str, saved: Any
) -> None:
    """What the user sees before step 1."""
    rows, micro = cfg.data.global_batch_rows, cfg.data.micro_batch_rows
    log.note(f"run folder {run_dir}")
    for warning in ignored(cfg):
        log.note(f"note: {warning}")
    log.note(str(corpus.report))
    log.note(contract)
    log.note(
        f"{groups.world} process(es) on {groups.device.type}{_layout(cfg, groups)}, ZeRO-{cfg.engine.zero}, "
        f"{cfg.engine.precision}; "
        f"global batch {rows} rows = {groups.dp.size} x {micro} x {rows // (micro * groups.dp.size)} accumulated"
    )
    if cfg.run.save_every == 0:
        log.note("the only checkpoint is written at the end; run.save_every=N also saves on the way")
    if saved:
        log.note(
            f"resuming from {saved.folder} (step {saved.state['step']}, written by {saved.state['world']} process(es))"
        )
        if saved.state["data"] != corpus.fingerprint:
            log.note(
                "note: the data or their order changed since that checkpoint; samples may repeat or be passed over"
            )


def _layout(cfg: RunConfig, groups: Groups) -> str:
    """The axes in use, as " = tp 2 x dp 4"; nothing where all ranks are data parallel."""
    layout = cfg.parallel
    sizes = {"tp": layout.tp, "cp": layout.cp, "pp": layout.pp}
    used = [f"{name} {size}" for name, size in sizes.items() if size > 1]
    if not used and layout.ep == 1:
        return ""
    notes = ["sequence parallel"] if groups.place(layout).splits_rows else []
    if layout.pp > 1:
        count = cfg.data.global_batch_rows // (cfg.data.micro_batch_rows * groups.dp.size)
        idle = formula_idle_share(layout.schedule, layout.pp, layout.stages_per_rank, count)
        notes += [f"{layout.schedule}, {layout.stages_per_rank} stage(s) a rank, idle {idle:.0%} by the formula"]
    notes += [layout.context] if layout.cp > 1 else []
    notes += [f"experts over {layout.ep}"] if layout.ep > 1 else []
    return " = " + " x ".join([*used, f"dp {groups.dp.size}"]) + (f" ({', '.join(notes)})" if notes else "")


def _save(
    cfg: RunConfig,
    run_dir: Path,
    engine: Engine,
    routers: RouterBook,
    groups: Groups,
    log: Log,
    fingerprint: str,
    progress: Progress,
) -> None:
    state = {
        "routers": groups.gather_stages(routers.state()) if cfg.model.moe is not None else [],
        "position": progress.position,
        "world": groups.world,
        "model": _plain(cfg.model),
        "data": fingerprint,
        "tokenizer": str(Path(cfg.data.tokenizer or "").absolute()),  # read again by who starts from it elsewhere
        "chat_template": cfg.data.chat_template and str(Path(cfg.data.chat_template).absolute()),
    }
    folder = checkpoint.save(run_dir / "checkpoints", progress.step, engine, state, groups, cfg.run.keep_last)
    log.note(f"saved {folder}")
