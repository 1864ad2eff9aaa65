"""Convert a Hugging Face folder to a Megatron checkpoint, exactly.

    python convert/hf_to_mega.py --hf Llama-3.1-8B --out llama-tp4-pp2 --tp 4 --pp 2 --verify

Tensors pass in small blocks, so a model of any size needs little memory. The output appears under its name when it is
complete; stopped in the middle, the same command goes on. Families: llama, qwen2, qwen3, mixtral, qwen2_moe,
qwen3_moe, deepseek_v2, deepseek_v3.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from convert.cli import DTYPES, add_common, add_layout, layout_of, parser_of, told
from convert.conversion import How, Target, convert
from convert.from_hf import open_hf
from convert.opening import is_loom, is_megatron


def run(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = parser_of(__doc__)
    parser.add_argument("--hf", required=True, type=Path, metavar="DIR", help="folder with config.json and safetensors")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="new folder for the checkpoint")
    add_layout(parser)
    add_common(parser)
    args = parser.parse_args(argv)
    if args.hf.is_dir() and (is_megatron(args.hf) or is_loom(args.hf)):
        raise ValueError(f"--hf {args.hf} is no Hugging Face folder; reshard.py --in {args.hf} --out ... takes it")
    target = Target(args.out, args.format, layout_of(args), DTYPES.get(args.dtype))
    convert(open_hf(args.hf), target, How(args.workers, args.verify, args.start_over))


if __name__ == "__main__":
    sys.exit(told(run))
