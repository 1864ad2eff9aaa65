"""A folder that appears under its name when it is complete, and whose writing goes on after it was stopped.

OUT.parent/.OUT.building/
  job.json      what is being written: source, options, places
  finished      names of tensors that are on the disk, one a line
  lock          held by the one process that writes here
  weights/      becomes OUT
  kept/         for a moment: the weights of an earlier try, while empty files are made anew to see that they fit
"""

import fcntl
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from convert.boxes import Pieces

SYNC_S = 5.0
"""So often what is finished is put on the disk and noted. A kill loses no more than this."""

P = TypeVar("P", bound=Pieces[Any])


class Output:
    """One folder being written. Made by `writing`."""

    def __init__(self, out: Path, folder: Path, job: dict[str, str], sync_s: float) -> None:
        self.out, self.folder, self._job, self._sync_s = out, folder, job, sync_s
        self.done: list[str] = []
        """Tensors that an earlier try has written."""
        self._pending: list[str] = []
        self._lock = threading.Lock()

    @property
    def weights(self) -> Path:
        """Where the files are written: `OUT` to be."""
        return self.folder / "weights"

    def begin(self, make: Callable[[Path], P]) -> P:
        """Call `make` with the folder to make the files in. What an earlier try has written stays.

        Raises:
            ValueError: an earlier try was another conversion.
        """
        kept = self.folder / "kept"
        earlier = self._earlier()
        if self.weights.exists() and not kept.exists() and self.done:
            os.rename(self.weights, kept)
        for stale in (self.weights, *(() if self.done else (kept,))):
            shutil.rmtree(stale, ignore_errors=True)
        self.weights.mkdir(parents=True)
        sink = make(self.weights)
        plan = {"places": _places(sink, self.weights)}
        if kept.exists() and earlier is not None:
            if earlier.get("places") != plan["places"] or _sizes(kept) != _sizes(self.weights):
                raise ValueError(
                    f"{self.folder} was begun by another version of Loom and cannot go on. Add --start-over to write "
                    "everything anew."
                )
            shutil.rmtree(self.weights)
            os.rename(kept, self.weights)
        _write(self.folder / "job.json", json.dumps(self._job | plan, indent=2) + "\n")
        return sink

    def _earlier(self) -> dict[str, str] | None:
        """The job of an earlier try; reads what it has finished.

        Raises:
            ValueError: it was another one.
        """
        if not (self.folder / "job.json").is_file():
            return None
        earlier = json.loads((self.folder / "job.json").read_text(encoding="utf-8"))
        noted = self.folder / "finished"
        names = noted.read_text(encoding="utf-8") if noted.is_file() else ""
        self.done = names[: names.rfind("\n") + 1].splitlines()  # a line cut by a power failure does not count
        if not self.done:
            return None
        unequal = [key for key, value in self._job.items() if earlier.get(key) != value]
        if unequal:
            told = "; ".join(f"{key} was {earlier.get(key)}, now it is {self._job[key]}" for key in unequal)
            raise ValueError(
                f"{self.out} was begun by another conversion that is not complete ({len(self.done)} tensors lie in "
                f"{self.folder}): {told}. Run that one again and it goes on, or add --start-over to throw it away."
            )
        return earlier

    def finished(self, hf: str) -> None:
        """Note that a tensor is written whole; any thread may call this."""
        with self._lock:
            self._pending.append(hf)

    @contextmanager
    def noting(self) -> Iterator[None]:
        """While inside, put what is finished on the disk now and then and note it, so that a restart goes on there."""
        stop = threading.Event()

        def watch() -> None:
            while not stop.wait(self._sync_s):
                self._sync()

        watcher = threading.Thread(target=watch, name="note", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            stop.set()
            watcher.join()
            self._sync()

    def _sync(self) -> None:
        with self._lock:
            names, self._pending = self._pending, []
        if names:
            sync_files(self.weights)
            with (self.folder / "finished").open("a", encoding="utf-8") as file:
                file.write("".join(f"{name}\n" for name in names))
                file.flush()
                os.fsync(file.fileno())

    def distrust(self) -> None:
        """Forget what is finished: it was found to be wrong, and a next try writes everything anew."""
        (self.folder / "finished").unlink(missing_ok=True)

    def complete(self) -> None:
        """Put everything on the disk and give the folder its name."""
        sync_files(self.weights)
        os.rename(self.weights, self.out)
        _sync_folder(self.out.parent)
        shutil.rmtree(self.folder)


@contextmanager
def writing(
    out: Path, source: Path, options: Mapping[str, object], start_over: bool = False, sync_s: float = SYNC_S
) -> Iterator[Output]:
    """Write a folder that appears only when `Output.complete` is called.

    Args:
        out: the folder to be.
        source: what it is made from.
        options: everything that decides what is written, by the name a user knows it under.
        start_over: throw away what an earlier, stopped try left.
        sync_s: how often finished tensors are put on the disk.

    Raises:
        ValueError: `out` is in use, or another conversion is under way there.
    """
    check_target(out, source)
    out = out.resolve()
    folder = building_folder(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("w")
    except OSError as error:
        raise ValueError(f"cannot write beside {out}: {error}. Name another --out.") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another process is writing {out} at this moment; wait for it") from error
        if start_over:
            for name in ("finished", "job.json"):
                (folder / name).unlink(missing_ok=True)
            for name in ("weights", "kept"):
                shutil.rmtree(folder / name, ignore_errors=True)
        job = {"source": str(source.resolve()), "the state of its files": fingerprint(source)}
        output = Output(out, folder, job | {key: str(value) for key, value in options.items()}, sync_s)
        try:
            yield output
        finally:
            if folder.exists() and not (folder / "finished").exists():  # nothing worth going on with
                shutil.rmtree(folder)


def building_folder(out: Path) -> Path:
    """Where a folder is written before it appears."""
    return out.parent / f".{out.name}.building"


def check_target(out: Path, source: Path) -> None:
    """See that a new folder can appear at `out`.

    Raises:
        ValueError: something is there, or it lies in the source.
    """
    here, there = out.resolve(), source.resolve()
    if out.is_symlink() and not out.exists():
        raise ValueError(f"{out} is a link that leads nowhere; name a new folder with --out")
    if out.is_file():
        raise ValueError(f"{out} is a file; name a new folder with --out")
    if here == there or here.is_relative_to(there):
        raise ValueError(f"{out} lies in the source {source}, which is only read; name another folder with --out")
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty, and nothing is ever overwritten; name a new folder with --out")
    above = next(parent for parent in here.parents if parent.exists())
    if not above.is_dir():
        raise ValueError(f"{above} is a file, so {out} cannot be made below it; name another folder with --out")


def check_space(output: Output, needed: int) -> None:
    """See that the disk holds `needed` bytes, what an earlier try has written counted in.

    Raises:
        ValueError: it does not.
    """
    held = 0
    for path in output.folder.rglob("*"):
        held += path.stat().st_blocks * 512 if path.is_file() else 0
    free = shutil.disk_usage(output.folder).free
    if free + held < needed:
        lacking = needed - free - held
        raise ValueError(
            f"{output.out.parent} has {size(free)} free and {size(needed - held)} are needed: {size(lacking)} too "
            "few. Free space, or name an --out on another disk. Nothing was written."
        )


def size(count: int) -> str:
    """Bytes for a reader."""
    for unit, one in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= 0.9995 * one:
            return f"{count / one:.3g} {unit}" if count < 999.5 * one else f"{count / one:,.0f} {unit}"
    return f"{count} bytes"


def fingerprint(source: Path) -> str:
    """A checksum of the names, sizes and times of the files of a folder."""
    found = hashlib.sha256()
    for path in sorted(source.rglob("*")):
        if path.is_file():
            about = path.stat()
            found.update(f"{path.relative_to(source)} {about.st_size} {about.st_mtime_ns}\n".encode())
    return found.hexdigest()[:16]


def sync_files(folder: Path) -> None:
    """Put every file below a folder on the disk, and the folders themselves."""
    for path in [*folder.rglob("*"), folder]:
        _sync_folder(path)


def _sync_folder(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _places(sink: Pieces[Any], folder: Path) -> str:
    """A checksum of where every row lies, whatever the folder is called."""
    found = hashlib.sha256()
    for hf in sink.metas:
        found.update(repr([hf, *sink.of(hf)]).replace(str(folder), "").encode())
    return found.hexdigest()[:16]


def _sizes(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def _write(file: Path, text: str) -> None:
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    _sync_folder(temporary)
    os.replace(temporary, file)
