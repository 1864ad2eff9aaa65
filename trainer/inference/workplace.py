"""The folder beside an output that is being made: what was asked, who has which rows, and the results so far.

answers.jsonl.parts/          (gone when answers.jsonl is there)
  settings.json               what the results depend on, and the size of the chunks
  index.npz, bad.json         where the rows lie in the input; lines that cannot be asked
  sessions/<name>.json        runs of the command that work on it now
  claims/<chunk>.<attempt>    who works on which rows
  parts/<worker>.jsonl        their results
  final/                      who puts it all together
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from trainer.inference.index import BadLine, Index
from trainer.inference.results import encoded
from trainer.inference.sessions import Session, Sessions

SETTINGS = "settings.json"
FOLDERS = ("sessions", "claims", "parts", "final")
SPARE_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Workplace:
    """That folder."""

    out: Path

    @property
    def folder(self) -> Path:
        return self.out.with_name(f"{self.out.name}.parts")

    @property
    def bad_file(self) -> Path:
        """Where lines that could not be asked are told, in the end."""
        return self.out.with_name(f"{self.out.stem}.bad{self.out.suffix}")

    @property
    def about_file(self) -> Path:
        """What was asked and what came of it, in the end."""
        return self.out.with_name(f"{self.out.stem}.run.json")

    @cached_property
    def saved(self) -> dict[str, Any]:
        """What settings.json says.

        Raises:
            FileNotFoundError: the folder is gone, since all is done.
            ValueError: the folder is another thing.
        """
        if not self.folder.exists():
            raise FileNotFoundError(self.folder)
        try:
            saved = json.loads((self.folder / SETTINGS).read_text(encoding="utf-8"))
            assert isinstance(saved["identity"], dict) and isinstance(saved["chunk_rows"], int)
        except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
            raise ValueError(
                f"{self.folder} is not a folder of this command ({type(error).__name__} in {SETTINGS}); move it away, "
                "or name another --out"
            ) from error
        return saved

    @property
    def chunks(self) -> int:
        """How many the rows are dealt out in."""
        return -(-self.saved["rows"] // self.saved["chunk_rows"])

    def rows_of(self, chunk: int, index: Index) -> list[int]:
        """The rows of a chunk, in the order of the work."""
        size = self.saved["chunk_rows"]
        return index.order_N[chunk * size : (chunk + 1) * size].tolist()

    def index(self) -> Index:
        """Where the rows lie."""
        return Index.load(self.folder / "index.npz")

    def bad(self) -> list[BadLine]:
        """Lines that were bad at first sight."""
        return [BadLine(**each) for each in json.loads((self.folder / "bad.json").read_text(encoding="utf-8"))]

    def part(self, worker: str) -> Path:
        """The results of a worker."""
        return self.folder / "parts" / f"{worker}.jsonl"

    def parts(self) -> list[Path]:
        """All results there are."""
        return sorted((self.folder / "parts").glob("*.jsonl"))

    def sessions(self, own: str = "") -> Sessions:
        """Who works here."""
        return Sessions(self.folder / "sessions", own)

    def others(self) -> list[Session]:
        """The sessions that work here now, before there is one of this process."""
        return list(self.sessions().others())

    def make(self, identity: Mapping[str, Any], index: Index, bad: list[BadLine], chunk_rows: int) -> None:
        """Make the folder whole at once; if another machine was faster, its folder stays."""
        made = Path(tempfile.mkdtemp(prefix=f".{self.folder.name}.", dir=self.folder.parent))
        try:
            for name in FOLDERS:
                (made / name).mkdir()
            index.save(made / "index.npz")
            bad_rows = [dataclasses.asdict(each) for each in bad]
            (made / "bad.json").write_text(json.dumps(bad_rows), encoding="utf-8")
            saved = {"identity": dict(identity), "rows": len(index), "chunk_rows": chunk_rows}
            (made / SETTINGS).write_text(json.dumps(saved, indent=2), encoding="utf-8")
            made.chmod(0o755)
            made.rename(self.folder)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise ValueError(f"{self.folder} cannot be written ({error.strerror}); make room there") from error
        finally:
            shutil.rmtree(made, ignore_errors=True)

    def reopen(self, rows: Iterable[int], index: Index) -> None:
        """Have chunks worked on again whose rows have no results."""
        missing = {*rows}
        for chunk in range(self.chunks):
            if missing.intersection(self.rows_of(chunk, index)):
                (self.folder / "claims" / f"{chunk}.done").unlink(missing_ok=True)

    def remove(self) -> None:
        """Take the folder away; it is never seen half removed."""
        if self.folder.exists():
            gone = Path(tempfile.mkdtemp(prefix=f".{self.folder.name}.", dir=self.folder.parent))
            self.folder.rename(gone / "old")
            shutil.rmtree(gone, ignore_errors=True)  # another machine may still write into it

    def publish(self, results: Path, bad: list[BadLine], about: Mapping[str, Any]) -> None:
        """Give the finished files their names: the output last, at once and whole."""
        _write(self.bad_file, b"".join(encoded(dataclasses.asdict(each)) + b"\n" for each in bad))
        if not bad:
            self.bad_file.unlink()
        _write(self.about_file, json.dumps(about, indent=2, ensure_ascii=False).encode() + b"\n")
        os.replace(results, self.out)


def check_out(out: Path, needed: int) -> None:
    """That results of about so many bytes can be written, before anything is loaded.

    Raises:
        ValueError: they cannot.
    """
    folder = out.absolute().parent
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder; name a file in it, such as {out / 'answers.jsonl'}")
    if not folder.is_dir():
        raise ValueError(f"--out {out}: there is no folder {folder}; make it first")
    try:
        with tempfile.TemporaryFile(dir=folder) as stream:
            stream.write(b"\0" * 2**16)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise ValueError(f"--out {out} cannot be written ({error.strerror}); name another place") from error
    free = shutil.disk_usage(folder).free
    if free < needed + SPARE_BYTES:
        raise ValueError(
            f"--out {out}: about {(needed + SPARE_BYTES) / 1e6:,.0f} MB are needed there and {free / 1e6:,.0f} MB are "
            "free; make room or name another place"
        )


def _write(path: Path, content: bytes) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_bytes(content)
    os.replace(part, path)
