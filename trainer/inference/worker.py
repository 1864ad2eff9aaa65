"""A process that holds a model, or one tp rank's part of it, and works rows off until none are left."""

from __future__ import annotations

import os
import signal
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist

from models.generation import Request
from parallel.config import ParallelConfig
from parallel.groups import Groups, LauncherRanks, build_groups
from parallel.host_memory import keep_few_products, keep_freed_memory
from trainer.inference import vllm_backend
from trainer.inference.backend import Backend, LoomBackend
from trainer.inference.claims import Claims
from trainer.inference.desk import Desk, Done
from trainer.inference.joining import InferenceConfig
from trainer.inference.loading import TextModel, generator_of, open_text_model
from trainer.inference.prompts import Asking, Prompter
from trainer.inference.results import Part
from trainer.inference.sessions import Owner
from trainer.inference.workplace import Workplace

TELL_S = 0.5
"""Between two messages to the parent."""
TIMEOUT_S = 1800.0
"""A tp rank that waits so long for another gives up; the parent ends them sooner, when it sees that one is gone."""


@dataclass(frozen=True)
class Task:
    """What a worker process is told."""

    cfg: InferenceConfig
    session: str
    worker: int
    rank: int
    """Among the tp ranks of the worker."""
    threads: int
    share: int
    """Most rows it has at one time."""
    store: str = ""
    """File by which the tp ranks of a worker find each other."""

    @property
    def device(self) -> torch.device:
        """Where this process works."""
        number = self.worker * self.cfg.tp + self.rank
        return torch.device("cuda", number) if self.cfg.gpu else torch.device("cpu")


@dataclass(frozen=True)
class Ready:
    """The model is there."""


@dataclass(frozen=True)
class Count:
    """Rows done since the last message."""

    rows: int
    bad: int
    tokens: int


@dataclass(frozen=True)
class Failed:
    """Why a worker stops; `mistake` is the user's, which every worker will find."""

    reason: str
    mistake: bool


@dataclass(frozen=True)
class Finished:
    """Nothing is left to do."""


def main(task: Task, pipe: Connection) -> None:
    """Of a worker process. It ends with its parent, and with 0 only when all rows have results."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent ends its workers
    threading.Thread(target=_end_with, args=(pipe,), daemon=True).start()
    torch.set_num_threads(task.threads)
    code = 0
    try:
        _work(task, pipe)
    except ValueError as error:
        pipe.send(Failed(str(error), mistake=True))
        code = 2
    except torch.OutOfMemoryError as error:
        way = "give a smaller --max-cached-tokens or --max-rows"
        pipe.send(Failed(f"{task.device} has too little memory: {way} ({_first_line(error)})", mistake=False))
        code = 1
    except OSError as error:
        pipe.send(Failed(f"{error.filename or task.cfg.out}: {error.strerror}", mistake=False))
        code = 1
    except Exception:
        pipe.send(Failed(traceback.format_exc().strip(), mistake=False))
        code = 1
    os._exit(code)  # threads of torch and of a library behind it would make an orderly end take its time


def _work(task: Task, pipe: Connection) -> None:
    model = task.cfg.model.open()
    groups = _groups(task) if task.cfg.tp > 1 and task.cfg.backend == "loom" else None
    backend = _backend(task, model, groups)
    pipe.send(Ready())
    counter = Counter(pipe.send)
    if task.rank:
        for _ in backend.serve(Following(groups).take):
            pass
    else:
        try:
            _serve(task, model, backend, groups, counter.add)
        except FileNotFoundError:
            if Workplace(task.cfg.out).folder.exists():
                raise  # else another machine has put it all together
    counter.send()
    pipe.send(Finished())


def _serve(task: Task, model: TextModel, backend: Backend, groups: Groups | None, tell: Callable[[Done], None]) -> None:
    place, owner = Workplace(task.cfg.out), Owner(task.session, task.worker)
    claims = Claims(place.folder / "claims", place.chunks, place.sessions(task.session), owner)
    folder = str(task.cfg.data.parent)
    asking = Asking(task.cfg.sampling, task.cfg.chat, model.render is not None, model.eyes, folder)
    part = Part(place.part(owner.name))
    with task.cfg.data.open("rb") as stream:
        desk = Desk(place, place.index(), claims, asking, Prompter.of(model), stream, part, tell, task.share)
        take = desk.take if groups is None else Leading(groups, desk.take).take
        for made in backend.serve(take):
            desk.put(made)
    part.close()


class Counter:
    """Tells the parent what was done, not too often."""

    def __init__(self, send: Callable[[object], None]) -> None:
        self._send = send
        self._rows = self._bad = self._tokens = 0
        self._sent = time.monotonic()

    def add(self, done: Done) -> None:
        """One more row."""
        self._rows, self._bad, self._tokens = self._rows + 1, self._bad + done.bad, self._tokens + done.tokens
        if time.monotonic() - self._sent >= TELL_S:
            self.send()

    def send(self) -> None:
        """Tell now."""
        self._send(Count(self._rows, self._bad, self._tokens))
        self._rows = self._bad = self._tokens = 0
        self._sent = time.monotonic()


@dataclass(frozen=True)
class Leading:
    """Rank 0 of a worker's tp ranks: what it takes, all take."""

    groups: Groups
    own: Callable[[int, bool], list[Request] | None]

    def take(self, room: int, idle: bool) -> list[Request] | None:
        """As `backend.Take`."""
        return _shared(self.groups, self.own(room, idle))


@dataclass(frozen=True)
class Following:
    """The other ranks."""

    groups: Groups | None

    def take(self, room: int, idle: bool) -> list[Request] | None:
        """As `backend.Take`."""
        assert self.groups is not None
        return _shared(self.groups, None)


def _shared(groups: Groups, value: list[Request] | None) -> list[Request] | None:
    box = [value]
    dist.broadcast_object_list(box, group=groups.tp.group, group_src=0, device=torch.device("cpu"))
    return box[0]


def _backend(task: Task, model: TextModel, groups: Groups | None) -> Backend:
    cfg = task.cfg
    if cfg.backend == "vllm":
        devices = range(task.worker * cfg.tp, (task.worker + 1) * cfg.tp)
        return vllm_backend.VllmBackend(model, devices, cfg.dtype, cfg.generator.max_rows)
    if task.device.type == "cuda":
        torch.cuda.set_device(task.device)
    else:
        keep_freed_memory()
        keep_few_products()
    draft = None if cfg.draft is None else open_text_model(cfg.draft)
    made = generator_of(model, device=task.device, dtype=cfg.dtype, config=cfg.generator, groups=groups, draft=draft)
    return LoomBackend(made)


def _groups(task: Task) -> Groups:
    """The process group of a worker's ranks."""
    timeout = timedelta(seconds=TIMEOUT_S)
    backend = "cpu:gloo,cuda:nccl" if task.cfg.gpu else "gloo"
    store = dist.FileStore(task.store, task.cfg.tp)
    dist.init_process_group(backend, store=store, rank=task.rank, world_size=task.cfg.tp, timeout=timeout)
    ranks = LauncherRanks(task.rank, task.cfg.tp, task.device.index or 0)
    return build_groups(ranks, TIMEOUT_S, ParallelConfig(tp=task.cfg.tp))


def _end_with(pipe: Connection) -> None:
    """Wait for the end of the parent, which never sends anything."""
    try:
        pipe.recv()
    except (EOFError, OSError):
        os._exit(3)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
