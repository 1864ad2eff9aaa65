"""Fold an adapter into the model it belongs to: full weights as a Hugging Face folder.

python convert/merge_adapter.py --base Qwen2.5-7B --adapter runs/qwen_lora --out Qwen2.5-7B-tuned
python convert/merge_adapter.py --base Qwen2.5-7B --adapter FOLDER_OF_PEFT --out Qwen2.5-7B-tuned --dtype bf16

The adapter is one in peft's format, or a run (or one of its checkpoints) that trained one. A run knows its base; --base
is needed where that has moved. Rows are made one block at a time: the whole model is never in memory.
"""

import dataclasses
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from convert.adapter_runs import adapter_of, base_of
from convert.adapters import merged
from convert.cli import DTYPES, parser_of, told
from convert.loom_files import Checkpoint, find_checkpoint, model_of, words_of
from convert.opened import Opened
from convert.opening import open_weights
from convert.peft_files import is_peft, read_peft
from convert.to_hf import export


def opened(adapter: Path, base: Path | None) -> Opened:
    """The base with the adapter folded in.

    Raises:
        ValueError: neither is what it should be, or they do not belong together.
    """
    if is_peft(adapter):
        if base is None:
            raise ValueError(f"{adapter} is an adapter without a base; name the model it belongs to with --base DIR")
        below = open_weights(base)
        return merged(below, below.cfg, read_peft(adapter, below.cfg))
    found = find_checkpoint(adapter)
    if found is None:
        raise ValueError(f"{adapter} holds neither an adapter in peft's format nor a run of Loom")
    checkpoint = Checkpoint(found)
    if checkpoint.state.get("adapter") is None:
        raise ValueError(f"{found} is a run that trained all weights; python scripts/export_hf.py writes them")
    model = model_of(checkpoint)
    below = base_of(checkpoint, model) if base is None else open_weights(base)
    made = merged(below, model, adapter_of(checkpoint, model))
    files, template = words_of(checkpoint)
    return dataclasses.replace(made, files=files or made.files, chat_template=template)


def run(argv: Sequence[str] | None = None) -> None:
    """Fold in and write.

    Raises:
        ValueError: see `opened`; or the target is in use, or the disk full.
    """
    parser = parser_of(__doc__)
    parser.add_argument("--base", type=Path, help="the model: a Hugging Face folder, a Megatron checkpoint or a run")
    parser.add_argument("--adapter", type=Path, required=True, help="a folder in peft's format, or a run")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="type of the written weights")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    args = parser.parse_args(argv)
    made = opened(args.adapter, args.base)
    export(args.out, made.cfg, made.tensors, made.files, DTYPES[args.dtype], overwrite=args.overwrite)
    if made.chat_template is not None:
        shutil.copyfile(made.chat_template, args.out / "chat_template.jinja")
    print(f"wrote {args.out}: {made.path} with the adapter in {args.adapter}")


if __name__ == "__main__":
    sys.exit(told(run))
