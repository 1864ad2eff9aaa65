"""Load one Hugging Face folder with Loom and with transformers and compare the fp32 logits on a few texts.

    python scripts/check_parity.py --hf DIR [--attention sdpa]

The texts also go through Loom packed into one row, where no document may see another. Passes (exit code 0) when the
largest difference is at most 1e-5 of the largest absolute logit of that text. Beside it stands how far transformers'
own fp32 logits are from its fp64 ones: fp32 cannot be closer than that to anything.
"""

import argparse
import sys
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from convert.from_hf import open_hf
from convert.source import Source
from models import Decoder, Runtime
from models.decoder import build
from parallel.materialise import materialise
from parallel.sharding import SINGLE, WHOLE

TOLERANCE = 1e-5
TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)\n",
    "In 1905 Albert Einstein published four papers. The first was on the photoelectric effect, for which " * 12,
    "Hi",
)


def load_ours(folder: str, attention: Any) -> Decoder:
    """The decoder with the folder's weights, fp32 on the CPU."""
    opened = open_hf(folder)
    opened.check_decoder()
    model = build(opened.cfg, SINGLE, Runtime(attention=attention))
    materialise(model, Source(opened, opened.cfg), WHOLE, torch.device("cpu"))
    return model


@dataclass(frozen=True)
class Row:
    """One text: its tokens, its largest |logit|, and the largest differences from transformers' fp32 logits."""

    tokens: int
    scale: float
    alone: float
    packed: float
    fp32_error: float
    """transformers fp32 against transformers fp64."""


@torch.no_grad()
def compare(folder: str, attention: Any) -> list[Row]:
    """Run all texts through both, alone and packed."""
    ours = load_ours(folder, attention)  # first: it says in words what is wrong with a folder
    tokenizer = AutoTokenizer.from_pretrained(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    texts = [torch.tensor(tokenizer(text)["input_ids"]) for text in TEXTS]
    borders = [0, *accumulate(len(tokens) for tokens in texts)]
    positions = torch.cat([torch.arange(len(tokens)) for tokens in texts])
    packed = ours(torch.cat(texts), positions, borders, output="head")
    expected = [theirs(tokens[None]).logits[0] for tokens in texts]
    exact = theirs.double()
    rows = []
    for i, tokens in enumerate(texts):
        alone = ours(tokens, torch.arange(len(tokens)), [0, len(tokens)], output="head")
        together = packed[borders[i] : borders[i + 1]]
        error = expected[i] - exact(tokens[None]).logits[0]
        scale = expected[i].abs().max().item()
        found = (alone - expected[i], together - expected[i], error)
        rows.append(Row(len(tokens), scale, *(difference.abs().max().item() for difference in found)))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf", required=True, help="Hugging Face folder (config.json, safetensors, tokenizer)")
    parser.add_argument("--attention", default="sdpa", choices=("sdpa", "eager"))
    args = parser.parse_args()
    rows = compare(args.hf, args.attention)
    print(f"{'tokens':>7s} {'max |logit|':>12s} {'alone':>10s} {'packed':>10s} {'allowed':>10s} {'fp32 itself':>12s}")
    for row in rows:
        allowed = TOLERANCE * row.scale
        print(
            f"{row.tokens:7d} {row.scale:12.3f} {row.alone:10.2e} {row.packed:10.2e} {allowed:10.2e} "
            f"{row.fp32_error:12.2e}"
        )
    worst = max(max(row.alone, row.packed) / row.scale for row in rows)
    verdict = "equal" if worst <= TOLERANCE else "DIFFERENT"
    print(f"largest difference / largest logit = {worst:.2e}, allowed {TOLERANCE:.0e}: {verdict}")
    return 0 if worst <= TOLERANCE else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as err:
        sys.exit(f"error: {err}")
