"""One conversion from beginning to end: what all three commands do once they know what is asked for."""

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from convert.boxes import Meta, Pieces
from convert.checking import verify
from convert.cli import KINDS, layout_notes, layout_words, model_line, source_line
from convert.copying import converted, copy, total_bytes
from convert.from_hf import weight_rules
from convert.hf_begin import begin_hf
from convert.hf_files import SHARD_BYTES
from convert.hf_folder_files import copy_files, has_tokenizer, write_config
from convert.megatron.args import differences, to_args
from convert.megatron.dist import begin_dist
from convert.megatron.layout import Layout, problems
from convert.megatron.names import has_no_bias_form
from convert.megatron.reading import HF_FILES
from convert.megatron.writing import begin_safetensors, begin_torch
from convert.opened import Opened
from convert.output import Output, check_space, check_target, size, writing
from convert.using import directions
from models import build
from models.config import ModelConfig

BEGIN = {"torch": begin_torch, "torch_dist": begin_dist, "safetensors": begin_safetensors}


@dataclass(frozen=True)
class Target:
    """What is to be written."""

    out: Path
    format: Literal["hugging_face", "torch", "torch_dist", "safetensors"]
    layout: Layout | None = None
    """Of a Megatron checkpoint."""
    dtype: torch.dtype | None = None
    """Of floats; None leaves them as they are."""
    limit: int = SHARD_BYTES
    """Most bytes of one of a Hugging Face folder's files."""

    def options(self) -> dict[str, object]:
        """All that decides what is written, by name."""
        return {"the format": self.format, "the layout": self.layout, "--dtype": self.dtype, "file size": self.limit}


@dataclass(frozen=True)
class How:
    """What changes nothing that is written."""

    workers: int
    verify: bool = False
    start_over: bool = False


def convert(source: Opened, target: Target, how: How) -> None:
    """Write `target` from `source`, telling a terminal how it goes.

    Raises:
        ValueError: the layout does not fit, the output is in use, the disk is too small, a file is damaged, or what was
            written is not what it should be.
    """
    check_target(target.out, source.path)
    found = problems(target.layout, source.cfg) if target.layout is not None else []
    if target.format in ("torch", "torch_dist") and (reason := has_no_bias_form(source.cfg)):
        found.append(f"{reason}; --format safetensors holds them, for Loom")
    if found:
        raise ValueError("the model cannot be cut this way:\n" + "\n".join(f"  {line}" for line in found))
    metas = converted(source.tensors.metas, target.dtype, correction_biases(source.cfg))
    with writing(target.out, source.path, target.options(), how.start_over) as output:
        check_space(output, total_bytes(metas))
        sink = output.begin(lambda folder: begin(folder, source, target, metas))
        files = [path for path in output.weights.rglob("*") if path.is_file()]
        needed = sum(path.stat().st_size for path in files)
        check_space(output, needed)
        _tell(source, target, metas, needed, len(files), output)
        started = time.perf_counter()
        with bar("copying", total_bytes(metas), _bytes_of(metas, output.done)) as moved, output.noting():
            copy(source.tensors, sink, how.workers, output.done, output.finished, moved)
        took = time.perf_counter() - started
        if how.verify:
            _check(source, output, metas, how.workers)
        started = time.perf_counter()
        output.complete()
        took += time.perf_counter() - started
    print(f"\nWrote {target.out}: {size(needed)} in {took:.1f} s.\n")
    print(directions(target.out, target.format, source.cfg, target.layout, main_dtype(metas)))


def begin(folder: Path, source: Opened, target: Target, metas: Mapping[str, Meta]) -> Pieces[Any]:
    """Make every file of the output, values not written yet."""
    dtype, cfg = main_dtype(metas), source.cfg
    if target.layout is None:
        sink = begin_hf(folder, metas, target.limit)
        small = folder
    else:
        sink = BEGIN[target.format](folder, cfg, target.layout, metas, to_args(cfg, target.layout, dtype))
        small = folder / HF_FILES
        small.mkdir()
    if source.files is not None:
        copy_files(source.files, small)
    if source.chat_template is not None:
        (small / "chat_template.jinja").write_bytes(source.chat_template.read_bytes())
    write_config(small, cfg, dtype, source.files)
    return sink


def correction_biases(cfg: ModelConfig) -> set[str]:
    """The Hugging Face names of the routers' correction biases: their steps are smaller than bf16 tells apart."""
    rules, _ = weight_rules(cfg)
    return {name for buffer, _ in build(cfg).named_buffers() for name in rules[buffer].sources}


def main_dtype(metas: Mapping[str, Meta]) -> torch.dtype:
    """The dtype of most of the weights."""
    counted: Counter[torch.dtype] = Counter()
    for meta in metas.values():
        counted[meta.dtype] += torch.Size(meta.shape).numel()
    return counted.most_common(1)[0][0]


def _bytes_of(metas: Mapping[str, Meta], names: list[str]) -> int:
    return total_bytes({hf: metas[hf] for hf in names})


def _tell(source: Opened, target: Target, metas: Mapping[str, Meta], needed: int, files: int, output: Output) -> None:
    layout = f", {layout_words(target.layout)}" if target.layout else ""
    print(f"  model  {model_line(source.cfg, source.tensors.metas)}")
    print(f"   from  {source_line(source)}")
    dtype = f" as {target.dtype}".replace("torch.", "") if target.dtype else ""
    print(f"     to  {target.out} ({KINDS[target.format]}{layout}{dtype}; {files} files, {size(needed)})")
    notes = layout_notes(target.layout, source.cfg, target.format) if target.layout else []
    notes += differences(source.cfg) if target.layout else []
    if source.files is None or not has_tokenizer(source.files):
        notes.append("there is no tokenizer to bring along; copy one beside config.json yourself")
    if output.done:
        there = size(_bytes_of(metas, output.done))
        notes.append(f"going on: {len(output.done)} of {len(metas)} tensors ({there}) are there from an earlier try")
    for note in notes:
        print(f"   note  {note}")
    sys.stdout.flush()


@contextmanager
def bar(word: str, total: int, already: int = 0) -> Iterator[Callable[[int], object]]:
    """A progress bar of bytes with their rate and the time left; in a log a line now and then."""
    shape = "{desc} {percentage:3.0f}% |{bar}| {n_fmt} of {total_fmt}, {rate_fmt}, {remaining} left"
    often = 0.2 if sys.stderr.isatty() else 30
    with tqdm(
        desc=f"{word:>7s}", total=total, initial=already, unit="B", unit_scale=True, bar_format=shape, mininterval=often
    ) as shown:
        yield shown.update


def _check(source: Opened, output: Output, metas: Mapping[str, Meta], workers: int) -> None:
    lines: list[str] = []
    try:
        with bar("reading", total_bytes(metas)) as moved:
            verify(source, output.weights, metas, workers, moved, lines.append)
    except ValueError as error:
        output.distrust()
        done = "".join(f"\n  ok: {line}" for line in lines)
        raise ValueError(f"--verify failed, nothing was written:{done}\n  {error}") from error
    for line in lines:
        print(f"     ok  {line}")
