"""Measure a model: losses by channel on text and conversations, and answers to multiple-choice questions.

    python scripts/evaluate.py --model MODEL --data book.txt --channel fiction --data chats.jsonl --channel chat
    python scripts/evaluate.py --model MODEL --questions quiz.jsonl --chat --out results.json
    python scripts/evaluate.py --run runs/quickstart                 the held-out part of a run's data, its own weights
    python scripts/evaluate.py --run runs/quickstart --model MODEL   another model on the same documents

MODEL is a Hugging Face folder, a Megatron checkpoint of any layout, or a run of Loom. --data reads whatever training
reads; of conversations and completions the answers count, of plain text everything (--loss-on says otherwise). A row of
--questions is {"question": "...", "choices": ["...", "..."], "answer": INDEX, LETTER or TEXT} and may name a "channel";
the answer is the choice with the highest log-likelihood behind the question, also taken per token and per byte.
--channel names the channel of the --data or --questions before it; --format text reads any file as one text. Rows that
cannot be used are counted, named and passed over. Exit code 0: measured; 2: a mistake in what was given.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from omegaconf import OmegaConf
from yaml import YAMLError

from convert.opened import Opened
from convert.opening import open_weights
from data.chat import template_renderer
from data.config import SourceConfig
from data.formats import FORMATS
from data.tokenizer import load_tokenizer
from trainer.config import RunConfig
from trainer.door import load
from trainer.evaluation import choices, perplexity, questions, report
from trainer.evaluation.perplexity import Corpus
from trainer.evaluation.questions import QuestionFile
from trainer.evaluation.report import BadRows
from trainer.evaluation.scorer import DTYPES, Scorer, load_scorer
from trainer.evaluation.tokens import tokenizer_folder
from trainer.failure import told_clearly

SEQ_LEN = 2048


@dataclasses.dataclass(frozen=True)
class Input:
    """A file to measure on, and what was said of it."""

    kind: str
    path: str
    channel: str | None = None
    format: str | None = None


class Given(argparse.Action):
    """Keeps --data and --questions in order; --channel and --format tell of the one before them."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: str | None = None) -> None:
        name, inputs = (option or "").removeprefix("--"), namespace.inputs
        if name in ("data", "questions"):
            namespace.inputs = [*inputs, Input(name, values)]
        elif not inputs or getattr(inputs[-1], name) is not None or (name == "format" and inputs[-1].kind != "data"):
            parser.error(f"--{name} {values}: stands behind the {'--data' if name == 'format' else 'file'} it tells of")
        else:
            namespace.inputs = [*inputs[:-1], dataclasses.replace(inputs[-1], **{name: values})]


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.set_defaults(inputs=[])
    parser.add_argument("--model", help="what to measure (default: the weights of --run)")
    parser.add_argument("--run", type=Path, help="a run's folder: the held-out part of its data is measured")
    for option, metavar, what in (
        ("--data", "FILE", "text, conversations or completions: file, folder or glob; may be given several times"),
        ("--questions", "FILE", "multiple-choice questions: .jsonl, .json or .parquet; may be given several times"),
        ("--channel", "NAME", "channel of the file named before it (default: the file's stem)"),
        ("--format", "FORMAT", f"format of the --data before it: {', '.join(FORMATS)} (default: from its fields)"),
    ):
        parser.add_argument(option, action=Given, dest="inputs", metavar=metavar, help=what)
    parser.add_argument("--tokenizer", help="folder of the tokenizer, where it does not lie with the model")
    parser.add_argument("--chat", action="store_true", help="write questions down by the chat template")
    parser.add_argument("--chat-template", help="file of a chat template to use instead of the tokenizer's own")
    parser.add_argument("--separator", default=" ", help="between question and choice without --chat (a space)")
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
    parser.add_argument("--details", type=Path, help="write every question's scores as JSONL")
    args = parser.parse_args(argv)
    if args.model is None and args.run is None:
        parser.error("name a model with --model, or a run with --run")
    if args.run is None and not args.inputs:
        parser.error("nothing to measure: give --data, --questions or --run")
    return args


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def main(argv: Sequence[str]) -> None:
    """Measure and print.

    Raises:
        ValueError: something given cannot be used.
    """
    args = arguments(argv)
    for path, option in ((args.out, "--out"), (args.details, "--details")):
        if path is not None:
            report.check_writable(path, option)
    try:
        _measure(args, argv)
    except OSError as error:  # no permission, a broken disk or mount
        raise ValueError(f"cannot read or write: {error}") from error


def _measure(args: argparse.Namespace, argv: Sequence[str]) -> None:
    for source in _question_files(args):
        questions.check(source)
    run = _run_config(args.run) if args.run else None
    opened = open_weights(args.model or args.run)
    precision = args.precision or (run.engine.precision if run else "fp32")
    theirs = run.data.tokenizer if run and run.data.tokenizer and Path(run.data.tokenizer).is_dir() else None
    folder = tokenizer_folder(args.tokenizer or theirs, opened)
    device = _device(args.device)
    corpora = _corpora(args, run, opened, folder)
    scorer = load_scorer(opened, device, precision)
    print(f"{opened.path}: {scorer.model.cfg.family}, {precision} on {scorer.device}; tokenizer {folder}", flush=True)
    bad = BadRows()
    try:
        losses = perplexity.evaluate(scorer, corpora, args.batch_tokens) if corpora else []
        answers = _answers(args, scorer, opened, folder, bad)
    except torch.OutOfMemoryError as error:
        raise ValueError(f"{scorer.device} has too little memory: give a smaller --batch-tokens ({error})") from error
    for corpus in corpora:
        for row in corpus.bad():
            bad.add(row)
    _tell(args, losses, answers, corpora, bad)
    if args.out is not None:
        about = {"model": str(opened.path), "tokenizer": folder, "precision": precision, "device": str(scorer.device)}
        about |= {"run": args.run and str(args.run), "chat": args.chat, "command": list(argv)}
        report.write_json(args.out, report.to_dict(about, losses, answers, bad))
        print(f"wrote {args.out}")


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {name}: must be cpu, cuda or cuda:N")
    return device


def _tell(args: argparse.Namespace, losses: Any, answers: Any, corpora: Sequence[Corpus], bad: BadRows) -> None:
    if losses:
        longest = max(corpus.seq_len for corpus in corpora)
        print(f"\nLosses over supervised tokens, documents of at most {longest} tokens, ± one standard error")
        print(report.loss_table(losses))
    if answers:
        how = "by the chat template" if args.chat else "as plain text"
        print(f"\nMultiple choice {how}: the most likely choice, likeliest per token, per byte; ± one standard error")
        print(report.accuracy_table(answers))
    if str(bad):
        print(f"\n{bad}")


def _run_config(run: Path) -> RunConfig:
    """The config a run was trained by.

    Raises:
        ValueError: there is none, or another version of Loom wrote it.
    """
    file = run / "config.yaml"
    if not file.is_file():
        raise ValueError(f"--run {run} is no run's folder: it has no config.yaml")
    try:
        tree = OmegaConf.load(file)
    except (YAMLError, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    if not OmegaConf.is_dict(tree):
        raise ValueError(f"{file} holds no config")
    try:
        return load(tree)  # pyright: ignore[reportArgumentType]  # is_dict narrows no type
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _corpora(args: argparse.Namespace, run: RunConfig | None, opened: Opened, folder: str) -> list[Corpus]:
    context = opened.cfg.max_seq_len
    corpora = []
    if run is not None:
        corpora.append(perplexity.held_out(run.data, folder, run.stage.loss_on, run.run.seed, context))
    seq_len = args.seq_len or min(context, SEQ_LEN)
    if seq_len > context:
        raise ValueError(f"--seq-len {seq_len} is longer than the model's context of {context}")
    named = [each for each in args.inputs if each.kind == "data"]
    sources = [SourceConfig(each.path, each.channel, format=each.format or "auto") for each in named]
    if sources:
        template = _template(args, opened)
        corpora += perplexity.files(sources, template, folder, args.loss_on, seq_len, args.cache_dir)
    return corpora


def _template(args: argparse.Namespace, opened: Opened) -> str | None:
    if args.chat_template is not None and not Path(args.chat_template).is_file():
        raise ValueError(f"--chat-template {args.chat_template} is not a file")
    return args.chat_template or (str(opened.chat_template) if opened.chat_template else None)


def _question_files(args: argparse.Namespace) -> list[QuestionFile]:
    return [QuestionFile(each.path, each.channel) for each in args.inputs if each.kind == "questions"]


def _answers(
    args: argparse.Namespace, scorer: Scorer, opened: Opened, folder: str, bad: BadRows
) -> list[choices.ChannelAccuracy]:
    sources = _question_files(args)
    if not sources:
        return []
    tokenizer, template = load_tokenizer(folder), _template(args, opened)
    render = None
    if args.chat:
        if template is None and tokenizer.chat_template is None:
            raise ValueError(f"the tokenizer in {folder} has no chat template; give --chat-template FILE, or no --chat")
        text = Path(template).read_text(encoding="utf-8") if template else None
        render = template_renderer(tokenizer, text, template or folder)
    encoder = choices.QuestionEncoder(tokenizer, folder, scorer, render, args.separator)
    tally, rows = choices.Tally(), (row for source in sources for row in questions.read(source))
    with contextlib.ExitStack() as stack:
        details = stack.enter_context(args.details.open("w", encoding="utf-8")) if args.details else None
        for answered in choices.answer(scorer, rows, encoder, args.batch_tokens, bad.add):
            tally.add(answered)
            if details is not None:
                _detail(details, answered)
    results = tally.results()
    if not results:
        raise ValueError(f"there is no question that can be used. {str(bad) or 'The files are empty.'}")
    return results


def _detail(stream: TextIO, answered: choices.Answered) -> None:
    row = dataclasses.asdict(answered.question) | {"scores": answered.scores(), "right": answered.right()}
    stream.write(json.dumps(row, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    with told_clearly(0):
        main(sys.argv[1:])
