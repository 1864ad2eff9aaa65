"""Who works on a shared folder, and whether they still do.

A session is one run of the command on one machine, with its workers. Its file is written anew every few seconds;
whoever shares the folder sees by it that the session lives, which of its workers do not, and how far it has come.
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

BEAT_S = 5.0
"""A session writes its file so often."""
SILENT_S = 60.0
"""A session of another machine that has not for so long is gone."""


@dataclass(frozen=True)
class Owner:
    """A worker of a session; worker -1 is the session itself."""

    session: str
    worker: int = -1

    @property
    def name(self) -> str:
        return f"{self.session}.{self.worker}"

    @staticmethod
    def of(name: str) -> Owner:
        """From its name."""
        session, _, worker = name.rpartition(".")
        return Owner(session, int(worker))


@dataclass
class Session:
    """What a session tells of itself."""

    name: str
    host: str
    boot: str
    pid: int
    started: float
    rows: int = 0
    """Done in this session."""
    tokens: int = 0
    seconds: float = 0.0
    """Since its first row."""
    dead: list[int] = field(default_factory=list)
    """Workers that have ended without being told to."""

    @staticmethod
    def begin() -> Session:
        """That of this process."""
        host, pid = socket.gethostname(), os.getpid()
        return Session(f"{host}-{pid}-{uuid.uuid4().hex[:6]}", host, boot_id(), pid, _started(pid))


class Sessions:
    """The sessions of a folder, seen from one of them.

    Args:
        folder: where their files are; it exists.
        own: the name of this process's session; empty if it has none.
    """

    def __init__(self, folder: Path, own: str) -> None:
        self.folder, self.own = folder, own

    def beat(self, session: Session) -> None:
        """Write this session's file."""
        part = self.folder / f".{session.name}.part"
        part.write_text(json.dumps(dataclasses.asdict(session)))
        os.replace(part, self._file(session.name))

    def leave(self) -> None:
        """Be gone at once for the others."""
        self._file(self.own).unlink(missing_ok=True)

    def alive(self, owner: Owner) -> bool:
        """Whether a worker, or a session, still works."""
        session = self.read(owner.session)
        return session is not None and owner.worker not in session.dead

    def others(self) -> Iterator[Session]:
        """The other sessions that live."""
        for file in sorted(self.folder.glob("*.json")):
            if file.stem != self.own and (session := self.read(file.stem)) is not None:
                yield session

    def read(self, name: str) -> Session | None:
        """A session that lives; None if it does not."""
        try:
            with self._file(name).open() as stream:  # an open file's age is the server's, a path's may be remembered
                written, session = os.fstat(stream.fileno()).st_mtime, Session(**json.load(stream))
        except (OSError, ValueError, TypeError):  # gone, or of another version
            return None
        if name == self.own:
            return session
        if (session.host, session.boot) == (socket.gethostname(), boot_id()):
            return session if _started(session.pid) == session.started else None
        return session if self.now() - written < SILENT_S else None

    def now(self) -> float:
        """The time by the clock of the folder's server."""
        with tempfile.TemporaryFile(dir=self.folder) as stream:
            return os.fstat(stream.fileno()).st_mtime

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.json"


def boot_id() -> str:
    """Of this machine since it was switched on; empty where the system has none."""
    file = Path("/proc/sys/kernel/random/boot_id")
    return file.read_text().strip() if file.is_file() else ""


def _started(pid: int) -> float:
    """When a process was started; 0 if there is none such."""
    try:
        process = psutil.Process(pid)
        return 0.0 if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.Error:
        return 0.0
