"""Ask a model every row of a file.

    python scripts/infer.py --model DIR --data prompts.jsonl --out answers.jsonl --workers 8
    python scripts/infer.py --model DIR --data prompts.jsonl --out answers.jsonl --workers 2 --tp 2 --dtype bf16
    python scripts/infer.py ... --sampling temperature=0.7 top_p=0.9 samples=4 max_new_tokens=256

DIR is a Hugging Face folder, a Megatron checkpoint of any layout, or a run of Loom. A row is {"messages": [...]}, which
the chat template writes down, or {"prompt": "..."}, a text that goes on (with --chat a user's message); its own
"sampling": {...} goes over --sampling, and all it has besides is kept. Its line in the output has also text, finish
(stop or length), tokens and prompt_tokens; of several samples a list under samples. Lines are in the order of the
input. Rows that cannot be asked are passed over and told in answers.bad.jsonl.

--workers copies of the model run on this machine, each on --tp devices. While they work, answers.jsonl.parts lies
beside the output. Whatever ends the command, the same command goes on with what is left. On several machines that share
the folder, give the same command on each, by hand, by slurm, or by torchrun --nproc_per_node 1.

Exit code 0: done; 2: a mistake in what was given, or all workers died; 130: stopped.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from models.generation import GeneratorConfig
from parallel.groups import LauncherRanks
from trainer.failure import told_clearly
from trainer.inference.batch import BatchInference
from trainer.inference.joining import InferenceConfig, ModelFiles
from trainer.inference.loading import DTYPES
from trainer.inference.settings import settings_of

USUAL = GeneratorConfig()


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="the checkpoint")
    parser.add_argument("--data", type=Path, required=True, metavar="IN.jsonl", help="the rows")
    parser.add_argument("--out", type=Path, required=True, metavar="OUT.jsonl", help="where the results go")
    parser.add_argument("--workers", type=int, default=1, help="copies of the model on this machine (%(default)s)")
    parser.add_argument("--tp", type=int, default=1, help="devices that share a copy (%(default)s)")
    parser.add_argument(
        "--sampling", nargs="+", default=[], metavar="KEY=VALUE", help="or one JSON object (default: greedy)"
    )
    parser.add_argument("--chat", action="store_true", help="a row's prompt is a user's message")
    parser.add_argument(
        "--tokenizer", metavar="DIR", help="folder of the tokenizer, where it does not lie with the model"
    )
    parser.add_argument("--chat-template", metavar="FILE", help="instead of the tokenizer's own")
    parser.add_argument("--draft", metavar="DIR", help="a small model of the same tokenizer that runs ahead")
    parser.add_argument("--dtype", choices=DTYPES, help="of weights and cache (bf16 on a GPU, else fp32)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: GPUs if there are any")
    parser.add_argument("--backend", choices=("loom", "vllm"), default="loom", help="what generates (%(default)s)")
    parser.add_argument("--max-rows", type=int, default=USUAL.max_rows, help="decoded together (%(default)s)")
    parser.add_argument(
        "--max-cached-tokens", type=int, default=USUAL.max_cached_tokens, help="of them all (%(default)s)"
    )
    parser.add_argument("--restart", action="store_true", help="throw away what an earlier run has made")
    return parser.parse_args(argv)


def sampling_of(words: Sequence[str]) -> dict[str, Any]:
    """The settings of --sampling: KEY=VALUE words, or one JSON object.

    Raises:
        ValueError: neither.
    """
    text = " ".join(words)
    if not text.lstrip().startswith("{"):
        return settings_of(words)
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"--sampling {text}: not JSON ({error})") from error


def config_of(args: argparse.Namespace) -> InferenceConfig:
    """What the command line asks for.

    Raises:
        ValueError: --sampling cannot be read, or there is no such device.
    """
    gpu = torch.cuda.is_available() if args.device is None else args.device == "cuda"
    if gpu and not torch.cuda.is_available():
        raise ValueError("--device cuda: there is no GPU that torch can use here")
    return InferenceConfig(
        model=ModelFiles(args.model, args.tokenizer, args.chat_template),
        data=args.data,
        out=args.out,
        workers=args.workers,
        tp=args.tp,
        sampling=sampling_of(args.sampling),
        chat=args.chat,
        dtype=args.dtype or ("bf16" if gpu else "fp32"),
        gpu=gpu,
        backend=args.backend,
        draft=args.draft,
        generator=GeneratorConfig(max_rows=args.max_rows, max_cached_tokens=args.max_cached_tokens),
        restart=args.restart,
    )


def main(argv: Sequence[str]) -> None:
    """Ask and write.

    Raises:
        ValueError: something given cannot be used, or all workers have died.
    """
    summary = BatchInference(config_of(arguments(argv)), LauncherRanks.read()).run()
    if summary is not None:
        print(summary)


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)  # as Ctrl-C: what a queueing system sends before it kills
    with told_clearly(0):
        main(sys.argv[1:])
