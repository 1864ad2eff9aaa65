"""Measure a model: losses by channel, answers to multiple-choice questions, and tasks it answers in its own words.

    python scripts/evaluate.py --model MODEL --data book.txt --channel fiction --data chats.jsonl --channel chat
    python scripts/evaluate.py --model MODEL --questions quiz.jsonl --chat --out results.json
    python scripts/evaluate.py --model MODEL --tasks sums.jsonl --chat --set max_new_tokens=256 --details texts.jsonl
    python scripts/evaluate.py --run runs/quickstart                 the held-out part of a run's data, its own weights
    python scripts/evaluate.py --run runs/quickstart --model MODEL   another model on the same documents

MODEL is a Hugging Face folder, a Megatron checkpoint of any layout, or a run of Loom. --data reads whatever training
reads; of conversations and completions the answers count, of plain text everything (--loss-on says otherwise). A row of
--questions is {"question": "...", "choices": ["...", "..."], "answer": INDEX, LETTER or TEXT} and may name a "channel";
the answer is the choice with the highest log-likelihood behind the question, also taken per token and per byte.
A row of --tasks is {"prompt": "..." or "messages": [...], "answer": TEXT, NUMBER or a list of them, "regex": ...}: the
model writes a text, which is right if it equals an answer; with a regex, if what its first group finds equals one; with
a regex alone, if it matches. --normalise says what is made alike before: case, whitespace, punctuation, numbers. Of a
whole conversation with neither answer nor regex the last message is the answer. A model that sees is shown the pictures
of rows, which name them as training data do; a path is relative to the rows' file.
--channel names the channel of the file before it; --format text reads any file as one text. Rows that cannot be used
are counted, named and passed over. Exit code 0: measured; 2: a mistake in what was given.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from omegaconf import OmegaConf
from yaml import YAMLError

from convert.adapter_runs import open_beside
from convert.opened import Opened
from data.chat import template_renderer
from data.config import SourceConfig
from data.tokenizer import load_tokenizer
from models.generation import Generator, GeneratorConfig, sampling_config
from models.generation.config import Settings
from scripts.evaluate_options import SEQ_LEN, arguments
from trainer.config import RunConfig
from trainer.door import load
from trainer.evaluation import choices, completions, perplexity, questions, report, rows, tasks
from trainer.evaluation.perplexity import Corpus
from trainer.evaluation.report import BadRows
from trainer.evaluation.rows import RowFile
from trainer.evaluation.scorer import Scorer, load_scorer
from trainer.evaluation.tokens import tokenizer_folder
from trainer.failure import told_clearly
from trainer.inference.loading import open_text_model
from trainer.inference.settings import device_of, settings_of
from trainer.pictures import picture_config
from trainer.stages import NextTokenConfig

Detail = Callable[[dict[str, Any]], None]
"""Takes a row of --details."""


def main(argv: Sequence[str]) -> None:
    """Measure and print.

    Raises:
        ValueError: something given cannot be used.
    """
    args = arguments(argv, __doc__)
    for path, option in ((args.out, "--out"), (args.details, "--details")):
        if path is not None:
            report.check_writable(path, option)
    try:
        _measure(args, argv)
    except OSError as error:  # no permission, a broken disk or mount
        raise ValueError(f"cannot read or write: {error}") from error


def _measure(args: argparse.Namespace, argv: Sequence[str]) -> None:
    for source in (*_row_files(args, "questions"), *_row_files(args, "tasks")):
        rows.check(source)
    sampling = _sampling(args)
    run = _run_config(args.run) if args.run else None
    opened, virtual = open_beside(Path(args.model or args.run))
    opened.check_decoder()
    precision = args.precision or (run.engine.precision if run else "fp32")
    theirs = run.data.tokenizer if run and run.data.tokenizer and Path(run.data.tokenizer).is_dir() else None
    folder = tokenizer_folder(args.tokenizer or theirs, opened)
    device = device_of(args.device)
    corpora = _corpora(args, run, opened, folder)
    scorer = load_scorer(opened, device, precision, virtual)
    print(f"{opened.path}: {scorer.model.cfg.family}, {precision} on {scorer.device}; tokenizer {folder}", flush=True)
    bad = BadRows()
    try:
        losses = perplexity.evaluate(scorer, corpora, args.batch_tokens) if corpora else []
        with contextlib.ExitStack() as stack:
            details = stack.enter_context(args.details.open("w", encoding="utf-8")) if args.details else None

            def detail(row: dict[str, Any]) -> None:
                if details is not None:
                    details.write(json.dumps(row, ensure_ascii=False) + "\n")

            answers = _answers(args, scorer, opened, folder, bad, detail)
            attempts = _attempts(args, scorer, opened, folder, sampling, bad, detail)
    except torch.OutOfMemoryError as error:
        raise ValueError(f"{scorer.device} has too little memory: give a smaller --batch-tokens ({error})") from error
    for corpus in corpora:
        for row in corpus.bad():
            bad.add(row)
    _tell(args, losses, answers, attempts, corpora, bad)
    if args.out is not None:
        about = {"model": str(opened.path), "tokenizer": folder, "precision": precision, "device": str(scorer.device)}
        about |= {"run": args.run and str(args.run), "chat": args.chat, "command": list(argv)}
        if attempts:
            about |= {"sampling": dataclasses.asdict(sampling), "judging": dataclasses.asdict(_judging(args))}
        report.write_json(args.out, report.to_dict(about, losses, answers, attempts, bad))
        print(f"wrote {args.out}")


def _tell(
    args: argparse.Namespace, losses: Any, answers: Any, attempts: Any, corpora: Sequence[Corpus], bad: BadRows
) -> None:
    if losses:
        longest = max(corpus.seq_len for corpus in corpora)
        print(f"\nLosses over supervised tokens, documents of at most {longest} tokens, ± one standard error")
        print(report.loss_table(losses))
    if answers:
        how = "by the chat template" if args.chat else "as plain text"
        print(f"\nMultiple choice {how}: the most likely choice, likeliest per token, per byte; ± one standard error")
        print(report.accuracy_table(answers))
    if attempts:
        how = "by the chat template" if args.chat else "as they are"
        alike = ", ".join(_judging(args).rules) or "nothing"
        print(f"\nTasks, prompts {how}: right answers and their 95% interval; made alike: {alike}")
        print(report.task_table(attempts))
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
    context, pictures = opened.cfg.max_seq_len, picture_config(opened.cfg)
    corpora = []
    if run is not None:
        if not isinstance(run.stage, NextTokenConfig):
            kinds = {"preference": "preference pairs", "unpaired": "judged answers", "prompts": "its own texts"}
            learnt = kinds[run.stage.learns_from]
            raise ValueError(
                f"the run in {args.run} (stage {run.stage.name}) learnt from {learnt}, of which no loss of texts can "
                "be taken; its eval/ metrics are in its metrics.jsonl. Name texts with --data"
            )
        corpora.append(perplexity.held_out(run.data, folder, run.stage.loss_on, run.run.seed, context, pictures))
    seq_len = args.seq_len or min(context, SEQ_LEN)
    if seq_len > context:
        raise ValueError(f"--seq-len {seq_len} is longer than the model's context of {context}")
    named = [each for each in args.inputs if each.kind == "data"]
    sources = [SourceConfig(each.path, each.channel, format=each.format or "auto") for each in named]
    if sources:
        template = _template(args, opened)
        corpora += perplexity.files(sources, template, folder, args.loss_on, seq_len, args.cache_dir, pictures)
    return corpora


def _template(args: argparse.Namespace, opened: Opened) -> str | None:
    if args.chat_template is not None and not Path(args.chat_template).is_file():
        raise ValueError(f"--chat-template {args.chat_template} is not a file")
    return args.chat_template or (str(opened.chat_template) if opened.chat_template else None)


def _row_files(args: argparse.Namespace, kind: str) -> list[RowFile]:
    return [RowFile(each.path, each.channel, f"--{kind}") for each in args.inputs if each.kind == kind]


def _sampling(args: argparse.Namespace) -> Settings:
    try:
        return sampling_config(settings_of(args.set or ()))
    except ValueError as error:
        raise ValueError(f"--set: {error}") from error


def _judging(args: argparse.Namespace) -> completions.Judging:
    given = {"rules": args.normalise, "take": args.take}
    return completions.Judging(**{key: value for key, value in given.items() if value is not None})


def _answers(
    args: argparse.Namespace, scorer: Scorer, opened: Opened, folder: str, bad: BadRows, detail: Detail
) -> list[choices.ChannelAccuracy]:
    sources = _row_files(args, "questions")
    if not sources:
        return []
    tokenizer, template = load_tokenizer(folder), _template(args, opened)
    render = None
    if args.chat:
        if template is None and tokenizer.chat_template is None:
            raise ValueError(_no_template(folder))
        text = Path(template).read_text(encoding="utf-8") if template else None
        render = template_renderer(tokenizer, text, template or folder)
    encoder = choices.QuestionEncoder(tokenizer, folder, scorer, render, args.separator)
    tally, asked = choices.Tally(), (row for source in sources for row in questions.read(source))
    for answered in choices.answer(scorer, asked, encoder, args.batch_tokens, bad.add):
        tally.add(answered)
        detail(dataclasses.asdict(answered.question) | {"scores": answered.scores(), "right": answered.right()})
    results = tally.results()
    if not results:
        raise ValueError(f"there is no question that can be used. {str(bad) or 'The files are empty.'}")
    return results


def _attempts(
    args: argparse.Namespace,
    scorer: Scorer,
    opened: Opened,
    folder: str,
    sampling: Settings,
    bad: BadRows,
    detail: Detail,
) -> list[completions.ChannelTasks]:
    sources = _row_files(args, "tasks")
    if not sources:
        return []
    found = open_text_model(opened.path, tokenizer=folder, chat_template=_template(args, opened))
    if args.chat and found.render is None:
        raise ValueError(_no_template(folder))
    usual = GeneratorConfig()
    config = GeneratorConfig(
        max_cached_tokens=max(usual.max_cached_tokens, scorer.context), prefill_tokens=args.batch_tokens
    )
    generator = Generator(scorer.model, found.tokenizer, config, found.stop_tokens)
    encoder = completions.TaskEncoder(found.tokenizer, found.render, args.chat, found.eyes)
    tally, asked = completions.Tally(), (row for source in sources for row in tasks.read(source, found.eyes))
    with scorer.autocast():
        for attempted in completions.attempt(generator, asked, encoder, sampling, _judging(args), bad.add):
            tally.add(attempted)
            for row in attempted.details():
                detail(row)
    results = tally.results()
    if not results:
        raise ValueError(f"there is no task that can be used. {str(bad) or 'The files are empty.'}")
    return results


def _no_template(folder: str) -> str:
    return f"the tokenizer in {folder} has no chat template; give --chat-template FILE, or no --chat"


if __name__ == "__main__":
    with told_clearly(0):
        main(sys.argv[1:])
