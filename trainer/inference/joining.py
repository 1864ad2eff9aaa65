"""Before the work: what was asked for is checked, and the place of work is made, or found and compared."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

from models import build
from models.generation import GeneratorConfig
from models.generation.config import told
from parallel.groups import LauncherRanks
from trainer.inference import vllm_backend, workplace
from trainer.inference.identity import changes, identity_of
from trainer.inference.index import check_data, digest_of, read_index
from trainer.inference.loading import Dtype, TextModel, check_draft, open_text_model, tp_problem
from trainer.inference.prompts import Asking
from trainer.inference.workplace import Workplace

CHUNK_ROWS, CHUNKS_PER_WORKER = 32, 8
"""Most rows of a chunk, and how many chunks a worker has of a short file."""


@dataclass(frozen=True)
class ModelFiles:
    """A checkpoint, and the files to use instead of those that lie with it."""

    path: str
    tokenizer: str | None = None
    chat_template: str | None = None

    def open(self) -> TextModel:
        """As `open_text_model`."""
        return open_text_model(self.path, tokenizer=self.tokenizer, chat_template=self.chat_template)


@dataclass(frozen=True)
class InferenceConfig:
    """What to ask of which model, and with what."""

    model: ModelFiles
    data: Path
    out: Path
    workers: int = 1
    """Copies of the model on this machine."""
    tp: int = 1
    """Processes (GPUs) that share a copy."""
    sampling: dict[str, Any] = field(default_factory=dict)
    """As `sampling_config` takes them; a row's own "sampling" goes over them."""
    chat: bool = False
    """Write prompts down as a user's message."""
    dtype: Dtype = "fp32"
    gpu: bool = False
    backend: Literal["loom", "vllm"] = "loom"
    draft: str | None = None
    """Checkpoint of a small model that runs ahead."""
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    restart: bool = False
    """Throw away what an earlier run has made."""


@dataclass(frozen=True)
class Opened:
    """What was found under the given names."""

    model: TextModel
    draft: TextModel | None
    asking: Asking


def check(cfg: InferenceConfig, ranks: LauncherRanks) -> Opened:
    """Everything that can be known before a weight is read.

    Raises:
        ValueError: something given cannot be used.
    """
    check_data(cfg.data)
    workplace.check_out(cfg.out, 2 * cfg.data.stat().st_size)
    for key, value in (("--workers", cfg.workers), ("--tp", cfg.tp)):
        if value < 1:
            raise ValueError(f"{key} {value}: must be at least 1")
    if problems := told(cfg.generator.problems()):
        raise ValueError("\n".join(problems))
    if ranks.local_rank:
        raise ValueError(
            "start one process a machine (torchrun --nproc_per_node 1): the workers of a machine are started by "
            f"--workers {cfg.workers}"
        )
    model = cfg.model.open()
    asking = Asking(cfg.sampling, cfg.chat, model.render is not None, model.eyes, str(cfg.data.parent))
    if cfg.chat and model.render is None:
        raise ValueError(f"--chat: the tokenizer in {model.folder} has no chat template; give --chat-template FILE")
    draft = None if cfg.draft is None else open_text_model(cfg.draft)
    if cfg.backend == "vllm" and model.opened.cfg.vision is not None:
        raise ValueError(
            f"--backend vllm: {model.opened.path} sees pictures, which are not given to vLLM; leave it out"
        )
    if cfg.backend == "vllm":
        vllm_backend.check_vllm(model, draft)
    elif problem := tp_problem(model.opened, cfg.tp):
        raise ValueError(problem)
    if draft is not None:
        check_draft(model, draft)
    _check_devices(cfg, model)
    return Opened(model, draft, asking)


def _check_devices(cfg: InferenceConfig, model: TextModel) -> None:
    devices, asked = cfg.workers * cfg.tp, f"--workers {cfg.workers} --tp {cfg.tp}"
    if cfg.gpu:
        count = torch.cuda.device_count()
        if devices > count:
            raise ValueError(f"{asked}: {devices} GPUs are needed and {count} are here; ask for fewer")
        return
    needed = 4 * cfg.workers * sum(parameter.numel() for parameter in build(model.opened.cfg).parameters())
    free = psutil.virtual_memory().available
    if needed > free:
        raise ValueError(
            f"{asked}: {cfg.workers} copies of the model need {needed / 1e9:.3g} GB for their weights and "
            f"{free / 1e9:.3g} GB are free; ask for fewer workers"
        )


def join(cfg: InferenceConfig, opened: Opened, place: Workplace, machines: int) -> bool:
    """Have a place of work with these settings; False if the output is complete already.

    Raises:
        ValueError: what lies there was made with other settings, or no row can be used.
    """
    if place.folder.exists():
        others = place.others()
        if cfg.restart and not others:
            place.remove()
        else:
            differ = changes(place.saved["identity"], _identity(cfg, opened, digest_of(cfg.data)))
            if differ:
                raise ValueError(_other_settings(place, differ, [each.host for each in others]))
            return True
    if cfg.out.exists() and not cfg.restart:
        differ = changes(_finished(place), _identity(cfg, opened, digest_of(cfg.data)))
        if not differ:
            return False
        raise ValueError(f"--out {cfg.out} is there already; --restart makes it anew, or name another file")
    index, bad = read_index(cfg.data, opened.asking.asked)
    if not len(index):
        first = "; ".join(f"line {each.line}: {each.reason}" for each in bad[:3])
        raise ValueError(f"--data {cfg.data}: no row can be used: {first or 'the file is empty'}")
    rows = max(1, min(CHUNK_ROWS, len(index) // (cfg.workers * machines * CHUNKS_PER_WORKER)))
    place.make(_identity(cfg, opened, index.digest), index, bad, rows)
    return True


def _identity(cfg: InferenceConfig, opened: Opened, data: str) -> dict[str, Any]:
    sampling = opened.asking.sampling
    return identity_of(opened.model, opened.draft, sampling, data, chat=cfg.chat, dtype=cfg.dtype, backend=cfg.backend)


def _finished(place: Workplace) -> dict[str, Any]:
    """By what settings the output was made; empty if that is not known."""
    try:
        return json.loads(place.about_file.read_text(encoding="utf-8"))["identity"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _other_settings(place: Workplace, differ: list[str], hosts: list[str]) -> str:
    lines = "".join(f"\n  {line}" for line in differ)
    if hosts:
        return (
            f"{place.folder} is being worked on with other settings, on {', '.join(hosts)}; name another --out:{lines}"
        )
    return (
        f"{place.folder} was begun with other settings. Give the same to go on with it, --restart to throw its results "
        f"away, or another --out:{lines}"
    )
