"""Writing a Hugging Face folder made of another one: weights streamed, config and tokenizer beside them."""

import math
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from convert.boxes import Pieces, Tensors
from convert.copying import blocks, converted, copy, default_workers, total_bytes
from convert.hf_begin import begin_hf
from convert.hf_files import SHARD_BYTES
from convert.hf_folder_files import write_json
from convert.output import check_space, size, writing

ROOM_FOR_FILES = 10**8
"""Bytes left for config and tokenizer when the disk is looked at."""


@dataclass(frozen=True)
class Job:
    """One folder to write."""

    source: Path
    out: Path
    tensors: Tensors
    config: Mapping[str, Any]
    files: Callable[[Path], None]
    """Writes the tokenizer and what else belongs there into a folder."""
    options: Mapping[str, object]
    """Everything that decides what is written, by the name a user knows it under."""
    dtype: torch.dtype | None = None
    """None: every tensor in its own."""
    workers: int = 0
    """0: as many as suit this machine."""
    start_over: bool = False
    verify: bool = False
    shard_bytes: int = SHARD_BYTES


def rewrite(job: Job) -> None:
    """Write the folder; it appears when it is complete.

    Raises:
        ValueError: the target is in use, the disk too small, a file of the source damaged; with `verify` also where
            what lies on the disk is not what was to be written.
    """
    metas = converted(job.tensors.metas, job.dtype)
    with writing(job.out, job.source, job.options, job.start_over) as output:
        check_space(output, total_bytes(metas) + ROOM_FOR_FILES)

        def make(folder: Path) -> Pieces[Any]:
            config = dict(job.config)
            if job.dtype is not None:
                config = {key: value for key, value in config.items() if key != "dtype"}
                config["torch_dtype"] = str(job.dtype).removeprefix("torch.")
            write_json(folder / "config.json", config)
            job.files(folder)
            return begin_hf(folder, metas, job.shard_bytes)

        sink = output.begin(make)
        with bar("writing", total_bytes(metas)) as moved, output.noting():
            left = {hf: meta for hf, meta in metas.items() if hf in set(output.done)}
            moved(total_bytes(left))
            workers = job.workers or default_workers()
            copy(job.tensors, sink, workers, output.done, output.finished, moved)
        if job.verify:
            try:
                compare(job.tensors, sink)
            except ValueError:
                (output.folder / "finished").unlink()  # so that nothing of it is kept for a next try
                raise
        output.complete()


def compare(source: Tensors, written: Tensors) -> None:
    """Read what was written and see that every bit is right.

    Raises:
        ValueError: a tensor differs.
    """
    with bar("verifying", total_bytes(written.metas)) as moved:
        for hf, meta in written.metas.items():
            for block in blocks(hf, meta):
                wanted = source.rows(hf, block.start, block.stop).to(meta.dtype)
                found = written.rows(hf, block.start, block.stop)
                if not torch.equal(_bits(wanted), _bits(found)):
                    raise ValueError(
                        f"{hf} is not what was written (rows {block.start} to {block.stop}): the disk, or the source "
                        "while it was read, has changed. Nothing appears under the name of --out; run again."
                    )
                moved(block.bytes)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


class bar:
    """A progress bar of bytes on stderr, gone where stderr is no terminal. Gives a function to call with bytes."""

    def __init__(self, what: str, total: int) -> None:
        off = not sys.stderr.isatty()
        self._bar = tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=off, leave=False)

    def __enter__(self) -> Callable[[int], None]:
        def moved(count: int) -> None:
            self._bar.update(count)

        return moved

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def summary(job: Job, notes: Iterable[str]) -> str:
    """What a command says at its end."""
    metas = converted(job.tensors.metas, job.dtype)
    numbers = sum(math.prod(meta.shape) for meta in metas.values())
    first = f"wrote {job.out}: {len(metas)} tensors, {numbers / 1e6:,.1f} million numbers, {size(total_bytes(metas))}"
    return "\n".join([first + (", read back and compared" if job.verify else ""), *(f"  {note}" for note in notes)])
