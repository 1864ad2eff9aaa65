"""What `to_llama.py` and `from_llama.py` share: the command line, and the check of the source against a plan."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert.boxes import Tensors
from convert.cli import DTYPES
from convert.copying import blocks
from convert.foreign import read_weights
from convert.llama_like import Plan, left_out, repeated, sizes
from convert.reshaped import Reshaped, check_names
from convert.rewriting import Job
from convert.tokenizer_files import carry_files, notes_on


def add_folders(parser: argparse.ArgumentParser) -> None:
    """Where from and where to."""
    parser.add_argument("--hf", type=Path, required=True, metavar="DIR", help="the Hugging Face folder to read")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to write; must not be there")


def prepared(
    args: argparse.Namespace, config: Mapping[str, Any], plan: Plan, options: Mapping[str, object]
) -> tuple[Job, list[str]]:
    """The job of a plan and what to tell about it; names, shapes and zeros of the source are checked here.

    Raises:
        ValueError: the weights are not what config.json says, or what must be zero is not.
    """
    notes = [*plan.notes, *left_out(config), *notes_on(args.hf)]
    weights = read_weights(args.hf)
    size = sizes(config)
    found = {name: meta for name, meta in weights.metas.items() if not repeated(size, name)}
    check_names(str(args.hf), found, plan.theirs)
    for name in plan.zero:
        check_zero(weights, name, str(plan.config["model_type"]))
    job = Job(
        source=args.hf,
        out=args.out,
        tensors=Reshaped(weights, plan.recipes),
        config=plan.config,
        files=lambda folder: carry_files(args.hf, folder),
        options={"--dtype": args.dtype, **options},
        dtype=None if args.dtype is None else DTYPES[args.dtype],
        workers=args.workers,
        start_over=args.start_over,
        verify=args.verify,
    )
    return job, notes


def check_zero(weights: Tensors, name: str, family: str) -> None:
    """See that a tensor, for which the result has no place, holds nothing but zeros.

    Raises:
        ValueError: it holds something.
    """
    for block in blocks(name, weights.metas[name]):
        if weights.rows(name, block.start, block.stop).count_nonzero():
            raise ValueError(
                f"this model cannot become a {family}: {name} is not zero, and {family} has no such bias. Leaving it "
                "out would change what the model says."
            )
