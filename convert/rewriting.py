"""Writing a Hugging Face folder made of another one: weights streamed, config and tokenizer beside them."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from convert.boxes import Meta, Pieces, Tensors
from convert.checking import compare_checksums
from convert.conversion import bar
from convert.copying import converted, copy, total_bytes
from convert.foreign import Stored, read_object
from convert.hf_begin import begin_hf
from convert.hf_files import SHARD_BYTES, read_folder
from convert.hf_folder_files import CONFIG, write_json
from convert.logits import SPARE, TOKENS, TOLERANCE, transformers_logits
from convert.output import check_space, size, writing

ROOM_FOR_FILES = 10**8
"""Bytes left for config and tokenizer when the disk is looked at."""

RUN_BY_TRANSFORMERS = ("llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen2_moe", "qwen3_moe")
"""Families whose logits are compared: transformers runs them from any folder, in fp32 on a CPU."""


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
    workers: int
    dtype: torch.dtype | None = None
    """None: every tensor in its own."""
    start_over: bool = False
    verify: bool = False
    new_ids: Collection[int] = ()
    """Token ids whose rows are new: their logits are not those of the source."""
    shard_bytes: int = SHARD_BYTES

    @property
    def metas(self) -> dict[str, Meta]:
        """Every tensor as it is written."""
        # A router's correction bias moves by steps that bf16 rounds away, as in every other conversion.
        exact = {hf for hf in self.tensors.metas if hf.endswith(".e_score_correction_bias")}
        return converted(self.tensors.metas, self.dtype, exact)


def rewrite(job: Job, notes: Iterable[str]) -> None:
    """Write the folder, which appears when it is complete, and say what was done.

    Raises:
        ValueError: the target is in use, the disk too small, a file of the source damaged; with `verify` also where
            what lies on the disk is not what was to be written.
    """
    metas = job.metas
    lines: list[str] = []
    with writing(job.out, job.source, job.options, job.start_over) as output:
        check_space(output, total_bytes(metas) + ROOM_FOR_FILES)
        sink = output.begin(lambda folder: _begin(job, folder, metas))
        there = total_bytes({hf: metas[hf] for hf in output.done})
        with bar("writing", total_bytes(metas), there) as moved, output.noting():
            copy(job.tensors, sink, job.workers, output.done, output.finished, moved)
        if job.verify:
            try:
                lines += verify(job, output.weights, metas)
            except ValueError as error:
                output.distrust()
                raise ValueError(f"--verify failed, nothing was written: {error}") from error
        output.complete()
    for line in lines:
        print(f"     ok  {line}")
    numbers = sum(math.prod(meta.shape) for meta in metas.values())
    print(f"Wrote {job.out}: {len(metas)} tensors, {numbers / 1e6:,.1f} million numbers, {size(total_bytes(metas))}")
    for note in notes:
        print(f"   note  {note}")


def _begin(job: Job, folder: Path, metas: Mapping[str, Meta]) -> Pieces[Any]:
    """Make every file of the folder, values not written yet."""
    config = dict(job.config)
    if job.dtype is not None:
        config.pop("dtype", None)
        config["torch_dtype"] = str(job.dtype).removeprefix("torch.")
    job.files(folder)
    write_json(folder / CONFIG, config)
    return begin_hf(folder, metas, job.shard_bytes)


def verify(job: Job, folder: Path, metas: Mapping[str, Meta]) -> list[str]:
    """Read what was written and compare every tensor, and the logits where both sides can be run.

    Returns:
        What was compared.

    Raises:
        ValueError: something differs.
    """
    output = Stored(read_folder(folder))
    with bar("reading", total_bytes(metas)) as moved:
        compare_checksums(job.tensors, output, metas, job.workers, moved)
    lines = [f"checksums (SHA-256): {len(metas)} of {len(metas)} tensors equal, {size(total_bytes(metas))}"]
    return [*lines, compare_logits(job, folder, metas)]


def compare_logits(job: Job, folder: Path, metas: Mapping[str, Meta]) -> str:
    """Run source and result with transformers and compare their logits, of the tokens that both have.

    Returns:
        What was compared, in a line; or why not.

    Raises:
        ValueError: they differ.
    """
    theirs = read_object(job.source / CONFIG)
    needed = int(sum(math.prod(meta.shape) for meta in metas.values()) * 4 * SPARE)
    free = psutil.virtual_memory().available
    if "score.weight" in metas:
        return "logits: not compared, the model has none"
    if theirs.get("model_type") not in RUN_BY_TRANSFORMERS:
        return f"logits: not compared, transformers has no {theirs.get('model_type')} without code of its own"
    if needed > free:
        return f"logits: not compared, the model needs {size(needed)} of memory and {size(free)} are free"
    ids = torch.tensor([i for i in range(theirs["vocab_size"]) if i not in job.new_ids])
    tokens = ids[torch.randint(len(ids), (TOKENS,), generator=torch.Generator().manual_seed(0))]
    wanted = transformers_logits(job.source, tokens, job.dtype)[:, ids]
    found = transformers_logits(folder, tokens, None)[:, ids]
    largest, difference = wanted.abs().max().item(), (found - wanted).abs().max().item()
    numbers = f"largest difference {difference:.1e}, largest logit {largest:.3g}, allowed {TOLERANCE:.0e} of it"
    if not difference <= TOLERANCE * largest:
        raise ValueError(f"the logits of source and result differ: {numbers}")
    return f"logits of source and result, {TOKENS} tokens: {numbers}"
