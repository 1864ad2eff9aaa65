"""Load one Hugging Face folder with Loom and with transformers and compare the fp32 logits on a few texts.

    python scripts/check_parity.py --hf DIR [--attention sdpa]

The texts also go through Loom packed into one row, where no document may see another. Passes (exit code 0) when the
largest absolute difference is at most 1e-5 times the largest absolute logit of that text; both numbers are printed.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from convert.from_hf import HFSource
from models import Decoder, Runtime, build, config_from_hf_folder
from parallel.materialise import materialise
from parallel.sharding import SINGLE

TOLERANCE = 1e-5
TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)\n",
    "In 1905 Albert Einstein published four papers. The first was on the photoelectric effect, for which " * 12,
    "Hi",
)


def load_ours(folder: str, attention: str) -> Decoder:
    """The decoder with the folder's weights, fp32 on the CPU."""
    cfg = config_from_hf_folder(folder)
    source = HFSource(folder, cfg)
    source.check()
    model = build(cfg, SINGLE, Runtime(attention=attention))
    materialise(model, source, SINGLE, torch.device("cpu"))
    return model


@torch.no_grad()
def compare(folder: str, attention: str) -> list[tuple[int, float, float, float]]:
    """For each text: tokens, largest |logit|, largest difference alone, largest difference packed with the others."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours = load_ours(folder, attention)
    texts = [torch.tensor(tokenizer(text)["input_ids"]) for text in TEXTS]
    borders = [0]
    for tokens in texts:
        borders.append(borders[-1] + len(tokens))
    positions = torch.cat([torch.arange(len(tokens)) for tokens in texts])
    packed = ours(torch.cat(texts), positions, borders, output="head")
    rows = []
    for i, tokens in enumerate(texts):
        expected = theirs(tokens[None]).logits[0]
        alone = ours(tokens, torch.arange(len(tokens)), [0, len(tokens)], output="head")
        together = packed[borders[i] : borders[i + 1]]
        scale = expected.abs().max().item()
        rows.append((len(tokens), scale, _largest(alone - expected), _largest(together - expected)))
    return rows


def _largest(difference: torch.Tensor) -> float:
    return difference.abs().max().item()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf", required=True, help="Hugging Face folder (config.json, safetensors, tokenizer)")
    parser.add_argument("--attention", default="sdpa", choices=("sdpa", "eager"))
    args = parser.parse_args()
    rows = compare(args.hf, args.attention)
    print(f"{'tokens':>7s} {'max |logit|':>12s} {'alone':>10s} {'packed':>10s} {'allowed':>10s}")
    for tokens, scale, alone, packed in rows:
        print(f"{tokens:7d} {scale:12.3f} {alone:10.2e} {packed:10.2e} {TOLERANCE * scale:10.2e}")
    worst = max(max(alone, packed) / scale for _, scale, alone, packed in rows)
    print(
        f"largest difference / largest logit = {worst:.2e}, allowed {TOLERANCE:.0e}: {'equal' if worst <= TOLERANCE else 'DIFFERENT'}"
    )
    return 0 if worst <= TOLERANCE else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as err:
        sys.exit(f"error: {err}")
