"""Turn a LLaMA into a checkpoint of another family with the same logits.

python convert/from_llama.py --hf Llama-3.2-1B --out Llama-3.2-1B-qwen2 --to qwen2
python convert/from_llama.py --hf Yi-6B --out Yi-6B-mistral --to mistral --verify

Qwen2 always has biases on q, k and v (zeros where the LLaMA has none) and never others; Mistral has none at all. A
LLaMA with other biases that are not zero is refused.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from convert.between import add_folders, prepared
from convert.cli import add_common, parser_of, told
from convert.foreign import read_object
from convert.llama_like import MLP, OUT, QKV, Plan, added_zeros, carried, decoder_shapes, renamed, sizes
from convert.rewriting import Job, rewrite


def plan(config: Mapping[str, Any], folder: Path, to: str) -> Plan:
    """How a LLaMA with this config.json becomes a `qwen2` or a `mistral`.

    Raises:
        ValueError: it is no LLaMA, or the family cannot express its sizes.
    """
    if config.get("model_type") != "llama":
        raise ValueError(
            f"{folder} is of model_type {config.get('model_type')!r}, not a LLaMA; convert/to_llama.py makes one of "
            "Qwen2, Mistral, Yi and Baichuan"
        )
    size = sizes(config)
    if to == "qwen2" and size.heads * size.head_dim != size.hidden:
        raise ValueError(
            f"this model cannot become a qwen2: its heads are {size.head_dim} wide, and Qwen2's are always "
            f"hidden_size / num_attention_heads = {size.hidden}/{size.heads}"
        )
    biased = (*QKV, OUT) if config.get("attention_bias") else ()
    biased += MLP if config.get("mlp_bias") else ()
    theirs = decoder_shapes(size, biased)
    kept = QKV if to == "qwen2" else ()
    zeros = added_zeros(size, kept)
    known = renamed(theirs)
    recipes = {name: known.get(name) or zeros[name] for name in decoder_shapes(size, kept)}
    zero = [name for name in theirs if name not in recipes]
    notes = [f"{len(zero)} biases that hold zeros only were left out"] if zero else []
    if to == "qwen2" and not config.get("attention_bias"):
        notes.append("zeros were added as biases of q, k and v")
    return Plan(theirs, recipes, carried(config, size, to) | _own(to, config, size.head_dim), zero, notes)


def _own(to: str, config: Mapping[str, Any], head_dim: int) -> dict[str, Any]:
    """The keys of config.json that only the new family has."""
    if to == "mistral":
        return {"sliding_window": None, "head_dim": head_dim}
    return {"use_sliding_window": False, "sliding_window": None, "max_window_layers": config["num_hidden_layers"]}


def job(args: argparse.Namespace) -> tuple[Job, list[str]]:
    """What a command line asks for, checked against the source; nothing is written yet.

    Raises:
        ValueError: it cannot be done.
    """
    config = read_object(args.hf / "config.json")
    return prepared(args, config, plan(config, args.hf, args.to), {"--to": args.to})


def main(argv: Sequence[str] | None = None) -> None:
    """Command line.

    Raises:
        ValueError: the model cannot become one of that family, or the files are not as they should be.
    """
    parser = parser_of(__doc__)
    add_folders(parser)
    add_common(parser)
    parser.add_argument("--to", choices=("qwen2", "mistral"), required=True, help="the family to write")
    rewrite(*job(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(told(main))
