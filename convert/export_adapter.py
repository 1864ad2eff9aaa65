"""Write the adapter of a run in peft's format: adapter_config.json and adapter_model.safetensors.

python convert/export_adapter.py runs/qwen_lora qwen_lora_adapter

`PeftModel.from_pretrained(base, "qwen_lora_adapter")` loads it.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from convert.adapter_runs import adapter_of
from convert.cli import parser_of, told
from convert.loom_files import Checkpoint, find_checkpoint, model_of
from convert.peft_files import write_peft


def run(argv: Sequence[str] | None = None) -> None:
    """Write it.

    Raises:
        ValueError: the run trained no adapter, or one that the format does not have; the folder is in use.
    """
    parser = parser_of(__doc__)
    parser.add_argument("run", type=Path, help="a run folder, or one checkpoint of it")
    parser.add_argument("out", type=Path, help="folder to write")
    args = parser.parse_args(argv)
    found = find_checkpoint(args.run)
    if found is None:
        raise ValueError(f"{args.run} holds no complete checkpoint; name a run folder or one of its checkpoints/step_*")
    checkpoint = Checkpoint(found)
    about = checkpoint.state.get("adapter")
    if about is None:
        raise ValueError(f"{found} is a run that trained all weights; python scripts/export_hf.py writes them")
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise ValueError(f"{args.out} already holds something; give a new folder")
    model = model_of(checkpoint)
    write_peft(args.out, model, adapter_of(checkpoint, model), about["base"] or "")
    print(f"wrote {args.out} from {found}; it belongs to {about['base'] or 'fresh weights'}")


if __name__ == "__main__":
    sys.exit(told(run))
