"""Turn a run into a Hugging Face folder: ``python scripts/export_hf.py runs/quickstart exported/quickstart``.

The folder holds config, safetensors, tokenizer and generation config, and loads with ``AutoModelForCausalLM``. The
run's manifest goes with it, so that a next stage is checked against the run. Any layout and ZeRO stage; no GPU is
needed. ``convert/mega_to_hf.py`` does the same with a check and restarts, for models that take long.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import torch

from convert.loom_files import open_loom
from convert.to_hf import export
from trainer import manifest

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def export_run(run: Path, out: Path, dtype: torch.dtype, overwrite: bool, tokenizer: Path | None) -> Path:
    """Write the weights of a run or of one checkpoint, and the tokenizer it used, as a Hugging Face folder.

    Returns:
        The checkpoint that was written.

    Raises:
        ValueError: there is no checkpoint, the target is in use, or the tokenizer is gone.
    """
    opened = open_loom(run)
    folder = tokenizer or opened.files
    if folder is None or not folder.is_dir():
        gone = f"--tokenizer {folder} is no folder" if folder else "the run's tokenizer is not there any more"
        raise ValueError(f"{gone}; name its folder with --tokenizer FOLDER")
    export(out, opened.cfg, opened.tensors, folder, dtype, overwrite=overwrite)
    if opened.chat_template is not None and tokenizer is None:
        shutil.copyfile(opened.chat_template, out / "chat_template.jinja")
    manifest.carry(opened.path, out)
    return opened.path


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
        checkpoint = export_run(args.run, args.out, DTYPES[args.dtype], args.overwrite, args.tokenizer)
    except ValueError as error:
        sys.exit(f"{error}")
    print(f"wrote {args.out} from {checkpoint}")


if __name__ == "__main__":
    main()
