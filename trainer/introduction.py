"""What the user sees before step 1."""

from __future__ import annotations

import contextlib
import dataclasses
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from models import Decoder, build
from models.adapters.attach import attach
from models.parts import freeze
from parallel.groups import Groups
from parallel.schedules import formula_idle_share
from trainer import chain, parts, virtual_adapters
from trainer.config import RunConfig, ignored
from trainer.logging.log import Log, NullLog, RunLog


def open_log(cfg: RunConfig, groups: Groups, run_dir: Path, total_steps: int, step: int) -> AbstractContextManager[Log]:
    """The run's log on the main rank, silence on the others."""
    if not groups.is_main:
        return contextlib.nullcontext(NullLog())
    return RunLog(run_dir, cfg.log, run_dir.name, dataclasses.asdict(cfg), total_steps, step)


def introduce(
    cfg: RunConfig,
    log: Log,
    groups: Groups,
    run_dir: Path,
    report: Any,
    contract: str,
    saved: Any,
    fingerprint: str,
    batch: str | None = None,
) -> None:
    """Where the run is, what it reads, its loss, its layout.

    Args:
        report: the data gate's.
        saved: the checkpoint it goes on from, if any; ``fingerprint`` tells whether the data are still the same.
        batch: what one step works on; None = the rows of the data section.
    """
    rows, micro = cfg.data.global_batch_rows, cfg.data.micro_batch_rows
    if batch is None:
        accumulated = rows // (micro * groups.dp.size)
        batch = f"global batch {rows} rows = {groups.dp.size} x {micro} x {accumulated} accumulated"
    log.note(f"run folder {run_dir}")
    link = chain.link_of(cfg)
    for stage in chain.begin(link, run_dir, fingerprint, resumed=saved is not None):
        log.note(f"starts from {stage}")
    for warning in (*ignored(cfg), *chain.notes(link), *(chain.changed(link, run_dir) if saved else ())):
        log.note(f"note: {warning}")
    log.note(str(report))
    log.note(contract)
    for line in (*trained_share(cfg), *parts.notes(cfg), *(virtual_adapters.told(cfg) if saved is None else ())):
        log.note(line)
    log.note(
        f"{groups.world} process(es) on {groups.device.type}{_layout(cfg, groups)}, ZeRO-{cfg.engine.zero}, "
        f"{cfg.engine.precision}; {batch}"
    )
    if cfg.run.save_every == 0:
        log.note("the only checkpoint is written at the end; run.save_every=N also saves on the way")
    if saved:
        log.note(
            f"resuming from {saved.folder} (step {saved.state['step']}, written by {saved.state['world']} process(es))"
        )
        if saved.state["data"] != fingerprint:
            log.note(
                "note: the data or their order changed since that checkpoint; samples may repeat or be passed over"
            )


def trained_share(cfg: RunConfig) -> list[str]:
    """How many parameters are trained of how many, where that is not all of them."""
    model = build(cfg.model)
    if cfg.adapter is not None:
        assert isinstance(model, Decoder), "adapters are for decoders"
        attach(model, cfg.adapter)
    else:
        freeze(model, cfg.optim.parts)
    counts = {True: 0, False: 0}
    for param in model.parameters():
        counts[param.requires_grad] += param.numel()
    trained, every = counts[True], counts[True] + counts[False]
    return [f"trained: {trained:,} of {every:,} parameters ({100 * trained / every:.2f} %)"] if counts[False] else []


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
