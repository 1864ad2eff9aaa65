"""Write a checkpoint again at another Megatron layout or in another of its formats, exactly.

    python convert/reshard.py --in llama-tp4-pp2 --out llama-tp8 --tp 8 --format torch_dist

The source is a Megatron checkpoint of any format and layout, a Hugging Face folder, or a run of Loom. Optimizer state
is not taken along. Tensors pass in small blocks; the output appears when it is complete; stopped in the middle, the
same command goes on.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from convert.cli import DTYPES, add_common, add_layout, layout_of, parser_of, told
from convert.conversion import How, Target, convert
from convert.opening import open_weights


def run(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = parser_of(__doc__)
    parser.add_argument("--in", dest="source", required=True, type=Path, metavar="DIR", help="the checkpoint as it is")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="new folder for the checkpoint")
    add_layout(parser)
    add_common(parser)
    args = parser.parse_args(argv)
    target = Target(args.out, args.format, layout_of(args), DTYPES.get(args.dtype))
    convert(open_weights(args.source), target, How(args.workers, args.verify, args.start_over))


if __name__ == "__main__":
    sys.exit(told(run))
