"""Turn a run into a Hugging Face folder: ``python scripts/export_hf.py runs/quickstart exported/quickstart``.

The folder holds config, safetensors, tokenizer and generation config, and loads with ``AutoModelForCausalLM``.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import torch

from convert.to_hf import export
from models.config import ModelConfig
from trainer import typed
from trainer.checkpoint import Checkpoint, find_latest
from trainer.problems import Problem, format_problems

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def find_checkpoint(path: Path) -> Path:
    """The checkpoint ``path`` means: itself, or the latest of a run folder.

    Raises:
        ValueError: there is none.
    """
    for folder in (path, path / "checkpoints"):
        if (folder / "state.json").is_file():
            return folder
        if (latest := find_latest(folder)) is not None:
            return latest
    raise ValueError(
        f"{path} holds no complete checkpoint. Name a run folder (runs/NAME) or one of its checkpoints/step_* folders."
    )


def export_checkpoint(checkpoint: Path, out: Path, dtype: torch.dtype, overwrite: bool, tokenizer: Path | None) -> Path:
    """Write the weights of ``checkpoint`` and the tokenizer the run used as a Hugging Face folder.

    Raises:
        ValueError: no such checkpoint, the target is in use, or the tokenizer is gone.
    """
    saved = Checkpoint(checkpoint)
    problems: list[Problem] = []
    model = typed.build(ModelConfig, saved.state["model"], "model", problems, {})
    if model is None:
        raise ValueError(f"{checkpoint} was written by another version: {format_problems(problems)}")
    folder = tokenizer or Path(saved.state["tokenizer"])
    if not folder.is_dir():
        raise ValueError(f"the run's tokenizer {folder} is not there any more; name it with --tokenizer FOLDER")
    export(out, model, saved.weights(), folder, dtype, overwrite=overwrite)
    template = saved.state.get("chat_template")
    if template:
        shutil.copyfile(template, out / "chat_template.jinja")
    return out


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder, or one checkpoint of it")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="type of the written weights")
    parser.add_argument("--tokenizer", type=Path, help="folder of the tokenizer, if the run's own has moved")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    args = parser.parse_args()
    try:
        checkpoint = find_checkpoint(args.run)
        export_checkpoint(checkpoint, args.out, DTYPES[args.dtype], args.overwrite, args.tokenizer)
    except ValueError as error:
        sys.exit(f"{error}")
    print(f"wrote {args.out} from {checkpoint}")


if __name__ == "__main__":
    main()
