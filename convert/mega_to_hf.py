"""Convert a Megatron checkpoint, or a checkpoint of a run of Loom, to a Hugging Face folder, exactly.

    python convert/mega_to_hf.py --mega checkpoints/llama --out llama-hf --dtype bf16 --verify
    python convert/mega_to_hf.py --mega runs/my_run --out my-model --dtype bf16

All of Megatron's formats (torch, torch_dist) at any layout, ours in safetensors, and any layout and ZeRO stage of
Loom's runs; no GPU is needed. Tensors pass in small blocks; the output appears when it is complete; stopped in the
middle, the same command goes on.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from convert.cli import DTYPES, add_common, byte_count, parser_of, told
from convert.conversion import How, Target, convert
from convert.hf_files import SHARD_BYTES
from convert.opening import open_weights


def run(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = parser_of(__doc__)
    parser.add_argument(
        "--mega", required=True, type=Path, metavar="DIR",
        help="the checkpoint: the folder Megatron saved to, one of its iter_*/release folders, or a run of Loom"
    )  # fmt: skip
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="new folder for the model")
    parser.add_argument(
        "--hf-files", type=Path, metavar="DIR",
        help="a Hugging Face folder with config.json and tokenizer, where the checkpoint keeps none in huggingface/"
    )  # fmt: skip
    parser.add_argument(
        "--max-shard-size", type=byte_count, default=SHARD_BYTES, metavar="5GB", help="most bytes of a file (5GB)"
    )
    add_common(parser)
    args = parser.parse_args(argv)
    source = open_weights(args.mega, args.hf_files)
    if source.format == "hugging_face":
        raise ValueError(f"{args.mega} is a Hugging Face folder already; to Megatron goes hf_to_mega.py")
    target = Target(args.out, "hugging_face", None, DTYPES.get(args.dtype), args.max_shard_size)
    convert(source, target, How(args.workers, args.verify, args.start_over))


if __name__ == "__main__":
    sys.exit(told(run))
