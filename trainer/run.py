"""The order of a run, on one page: check, join, read data, build, restore, train."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from pathlib import Path

import torch

import data.pipeline
from convert.source import Source
from data.batch import MicroBatch
from data.peers import Peers
from data.pipeline import TrainingData
from models.config import ModelConfig
from models.flops import step_flops
from models.parts import PartsConfig
from models.routing import RouterBook
from parallel.groups import Groups, LauncherRanks, build_groups
from parallel.watch import watching
from trainer import checkpoint, folders, provenance
from trainer.build import make_engine, weights_of
from trainer.config import RunConfig, check, format_problems, shares_prompts
from trainer.door import to_yaml
from trainer.introduction import introduce, open_log
from trainer.loop import Progress, Trainer
from trainer.pictures import picture_config
from trainer.reading import behind_the_gate
from trainer.reference import find_reference, preparation
from trainer.resuming import save, to_resume
from trainer.run_folder import run_folder
from trainer.stages import NextTokenConfig, PolicyConfig, build_stage


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
    tokens = cfg.data.seq_len * cfg.data.micro_batch_rows
    groups = build_groups(ranks, 2 * cfg.run.hang_timeout + 60, cfg.parallel, tokens)
    with watching(groups, cfg.run.hang_timeout), run_folder(cfg, groups) as run_dir:
        if isinstance(cfg.stage, PolicyConfig):
            from trainer.rl.run import train_in  # brings the generator in

            train_in(run_dir, cfg, groups, started)
        else:
            _train_in(run_dir, cfg, groups, started)
    return run_dir


def _train_in(run_dir: Path, cfg: RunConfig, groups: Groups, started: float) -> None:
    saved = to_resume(cfg, run_dir)
    source = weights_of(cfg, saved)  # before the data, which may take an hour to read
    corpus = _read_data(cfg, groups, run_dir)
    if shares_prompts(cfg.stage):
        corpus = corpus.sharing_prompts()
    total_steps = cfg.run.steps or math.ceil((cfg.run.epochs or 0) * corpus.rows_per_epoch / cfg.data.global_batch_rows)
    progress = Progress(saved.state["step"], saved.state["position"]) if saved else Progress()
    stage = build_stage(cfg.stage, len(corpus.channels), groups.cp)
    with open_log(cfg, groups, run_dir, total_steps, progress.step) as log:
        if groups.is_main:
            provenance.write(run_dir, to_yaml(cfg), stage.contract, groups.world)
            introduce(cfg, log, groups, run_dir, corpus.report, stage.contract, saved, corpus.fingerprint)
        if progress.step >= total_steps:
            log.close(f"nothing to do: step {progress.step} of {total_steps} is done. Raise run.steps to go on.")
            return
        if isinstance(source, Source) and source.fresh_head:
            log.note(f"note: the scalar head starts from fresh weights; {cfg.init_from} has none")
        reference, corpus = find_reference(cfg, groups, corpus, log)
        engine = make_engine(
            cfg.model, cfg.engine, cfg.optim, groups, source, cfg.parallel, cfg.data.seq_len, cfg.adapter, cfg.run.seed
        )
        del source
        folders.forget()  # of a large model the headers alone are large
        routers = RouterBook(engine.chunks, len(corpus.channels))
        if saved:
            checkpoint.restore(saved, engine, groups)
            routers.restore(*saved.state["routers"])

        def save_now(progress: Progress) -> None:
            folder = save(cfg, cfg.model, run_dir, engine, routers, groups, corpus.fingerprint, progress)
            log.note(f"saved {folder}")

        trainer = Trainer(
            cfg=cfg,
            groups=groups,
            engine=engine,
            stage=stage,
            routers=routers,
            data=corpus,
            log=log,
            flops=functools.partial(_flops, cfg.model, cfg.optim.parts),
            save=save_now,
            total_steps=total_steps,
            prepare=preparation(cfg, groups, stage, engine, reference, corpus),
        )
        log.note(f"ready after {time.monotonic() - started:.1f} s; training from step {progress.step} to {total_steps}")
        trainer.run(progress)
        log.close(f"done: {progress.step} steps. Checkpoint and metrics in {run_dir}")


def _with_tokenizer(cfg: RunConfig) -> RunConfig:
    """The run with the tokenizer of what it starts from, where none is named; from another run also with its template.
    What is put together from parts has its decoder's.

    Settled before the start: what the run starts from may be gone when it is saved.
    """
    start = cfg.init_from or cfg.init_parts.decoder
    if start is None or cfg.data.tokenizer:
        return cfg
    found: dict[str, str | None] = {"tokenizer": folders.tokenizer_in(start)}
    if cfg.data.chat_template is None and cfg.stage.name != "pretrain":
        found["chat_template"] = folders.template_in(start)
    return dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, **found))


def _flops(model: ModelConfig, parts: PartsConfig, batch: MicroBatch) -> float:
    lengths = (batch.cu_seqlens[1:] - batch.cu_seqlens[:-1]).tolist()
    grids = () if batch.pictures is None else batch.pictures.grids
    return step_flops(model, lengths, batch.num_targets, grids, lambda name: parts.trains(name, model))


def _read_data(cfg: RunConfig, groups: Groups, run_dir: Path) -> TrainingData:
    def read(peers: Peers) -> TrainingData:
        return data.pipeline.build(
            cfg.data,
            tokenizer_folder=None,
            loss_on=cfg.stage.loss_on if isinstance(cfg.stage, NextTokenConfig) else "assistant",
            kind=cfg.stage.learns_from,
            seed=cfg.run.seed,
            peers=peers,
            max_seq_len=cfg.model.max_seq_len,
            pictures=picture_config(cfg.model),
        )

    return behind_the_gate(read, cfg, groups, run_dir)
