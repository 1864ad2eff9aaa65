"""The command line of scripts/evaluate.py."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from data.formats import FORMATS
from trainer.evaluation.judging import RULES, Take
from trainer.evaluation.scorer import DTYPES

SEQ_LEN = 2048


@dataclasses.dataclass(frozen=True)
class Input:
    """A file to measure on, and what was said of it."""

    kind: str
    path: str
    channel: str | None = None
    format: str | None = None


class Given(argparse.Action):
    """Keeps --data, --questions and --tasks in order; --channel and --format tell of the one before them."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: str | None = None) -> None:
        name, inputs = (option or "").removeprefix("--"), namespace.inputs
        if name in ("data", "questions", "tasks"):
            namespace.inputs = [*inputs, Input(name, values)]
        elif not inputs or getattr(inputs[-1], name) is not None or (name == "format" and inputs[-1].kind != "data"):
            parser.error(f"--{name} {values}: stands behind the {'--data' if name == 'format' else 'file'} it tells of")
        else:
            namespace.inputs = [*inputs[:-1], dataclasses.replace(inputs[-1], **{name: values})]


def arguments(argv: Sequence[str], description: str | None) -> argparse.Namespace:
    """The command line of scripts/evaluate.py."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.set_defaults(inputs=[])
    parser.add_argument("--model", help="what to measure (default: the weights of --run)")
    parser.add_argument("--run", type=Path, help="a run's folder: the held-out part of its data is measured")
    for option, metavar, what in (
        ("--data", "FILE", "text, conversations or completions: file, folder or glob; may be given several times"),
        ("--questions", "FILE", "multiple-choice questions: .jsonl, .json or .parquet; may be given several times"),
        ("--tasks", "FILE", "prompts with answers, .jsonl, .json or .parquet; may be given several times"),
        ("--channel", "NAME", "channel of the file named before it (default: the file's stem)"),
        ("--format", "FORMAT", f"format of the --data before it: {', '.join(FORMATS)} (default: from its fields)"),
    ):
        parser.add_argument(option, action=Given, dest="inputs", metavar=metavar, help=what)
    parser.add_argument("--tokenizer", help="folder of the tokenizer, where it does not lie with the model")
    parser.add_argument("--chat", action="store_true", help="write questions and prompts down by the chat template")
    parser.add_argument("--chat-template", help="file of a chat template to use instead of the tokenizer's own")
    parser.add_argument("--separator", default=" ", help="between question and choice without --chat (a space)")
    parser.add_argument(
        "--set",
        nargs="+",
        metavar="KEY=VALUE",
        help="how --tasks are answered: max_new_tokens=256 temperature=0.7 ... (default: greedy, 128 tokens)",
    )
    parser.add_argument(
        "--normalise",
        type=_rules,
        metavar="RULES",
        help=f"what is alike in answers to --tasks: {','.join(RULES)}, or none (default: whitespace)",
    )
    parser.add_argument("--take", choices=get_args(Take), help="which match of a task's regex counts (default: first)")
    parser.add_argument("--loss-on", choices=("assistant", "all"), help="which tokens of --data count")
    parser.add_argument(
        "--seq-len",
        type=_positive,
        help=f"--data is cut into pieces of so many tokens (the context, at most {SEQ_LEN})",
    )
    parser.add_argument("--batch-tokens", type=_positive, default=8192, help="tokens of a forward pass (%(default)s)")
    parser.add_argument("--precision", choices=DTYPES, help="default: as the run was trained, else fp32")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    parser.add_argument("--cache-dir", default=".cache/tokens", help="where tokens of --data are kept (%(default)s)")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    parser.add_argument("--details", type=Path, help="write every question's scores and every task's text as JSONL")
    args = parser.parse_args(argv)
    if args.model is None and args.run is None:
        parser.error("name a model with --model, or a run with --run")
    if args.run is None and not args.inputs:
        parser.error("nothing to measure: give --data, --questions, --tasks or --run")
    for option in ("set", "normalise", "take"):
        if getattr(args, option) is not None and not any(each.kind == "tasks" for each in args.inputs):
            parser.error(f"--{option} has no effect without --tasks FILE")
    return args


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _rules(text: str) -> tuple[str, ...]:
    found = () if text == "none" else tuple(text.split(","))
    for word in found:
        if word not in RULES:
            raise argparse.ArgumentTypeError(f"{word!r} is not among {', '.join(RULES)}; none stands alone")
    return found
