"""What the policy wrote and what it got for it: a table in the terminal, and a page to read and filter.

    python scripts/show_rollouts.py runs/my_grpo                       a line for each step
    python scripts/show_rollouts.py runs/my_grpo --out rollouts.html   and the texts, the samples of a prompt together
    python scripts/show_rollouts.py runs/my_grpo --out page.html --steps 0,50,99 --groups 20 --channel maths

Reads RUN/rollouts/ (rollout.save=true). With rollout.save_tokens=true the page colours tokens by their probability.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.rollout_page import Group, page
from trainer.rollout import records
from trainer.rollout.records import Record

MOST_STEPS = 12
"""On a page, unless --steps says which."""
MOST_LINES = 24
"""Of the table."""


@dataclass(frozen=True)
class Line:
    """A step in numbers."""

    step: int
    evaluation: bool
    samples: int
    reward: float
    std: float
    parts: dict[str, float]
    """Means of the parts of the reward, over the samples that have them."""
    flat: float
    """Share of the prompts whose samples all have the same reward; NaN where none has two samples."""
    length: float
    truncated: float
    errors: int
    """Samples with an error."""


def line_of(step: int, evaluation: bool, rollouts: Sequence[Record]) -> Line:
    """The numbers of one file."""
    rewards = [each["reward"] for each in rollouts]
    mean = math.fsum(rewards) / len(rewards)
    names = dict.fromkeys(name for each in rollouts for name in each["rewards"])
    parts = {name: [each["rewards"][name] for each in rollouts if name in each["rewards"]] for name in names}
    compared = [group for group in groups_of(step, evaluation, rollouts) if len(group.samples) > 1]
    return Line(
        step,
        evaluation,
        len(rollouts),
        mean,
        math.sqrt(math.fsum((reward - mean) ** 2 for reward in rewards) / len(rewards)),
        {name: math.fsum(values) / len(values) for name, values in parts.items()},
        sum(group.flat for group in compared) / len(compared) if compared else math.nan,
        sum(each["new_tokens"] for each in rollouts) / len(rollouts),
        sum(each["finish"] == "length" for each in rollouts) / len(rollouts),
        sum(bool(each["errors"]) for each in rollouts),
    )


def groups_of(step: int, evaluation: bool, rollouts: Sequence[Record]) -> list[Group]:
    """The samples of each prompt, in the order of the file."""
    found: dict[int, list[Record]] = {}
    for each in rollouts:
        found.setdefault(each["prompt"], []).append(each)
    return [Group(step, evaluation, samples) for samples in found.values()]


def table(lines: Sequence[Line]) -> str:
    """The lines below each other; of many some, evenly."""
    shown = evenly(lines, MOST_LINES)
    names = list(dict.fromkeys(name for line in lines for name in line.parts))
    head = ["step", "samples", "reward", "std", *names, "no signal", "tokens", "cut off", "errors"]
    rows = [
        [
            f"{line.step}{' held out' if line.evaluation else ''}",
            str(line.samples),
            f"{line.reward:.3f}",
            f"{line.std:.3f}",
            *(f"{line.parts[name]:.3f}" if name in line.parts else "-" for name in names),
            "-" if math.isnan(line.flat) else f"{100 * line.flat:.0f} %",
            f"{line.length:.0f}",
            f"{100 * line.truncated:.0f} %",
            str(line.errors or "-"),
        ]
        for line in shown
    ]
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    out = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in [head, *rows]]
    left = len(lines) - len(shown)
    return "\n".join([*out, *([f"({left} more steps)"] if left else [])])


def errors_of(rollouts: Sequence[Record]) -> Counter[str]:
    """Errors by what failed, with their text."""
    return Counter(f"{what}: {text}" for each in rollouts for what, text in each["errors"].items())


def evenly(items: Sequence, most: int) -> list:
    """At most so many of them, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(index * (len(items) - 1) / (most - 1))] for index in range(most)]


def all_files(run: Path) -> list[tuple[int, bool, Path]]:
    """(step, held out, file) of a run, or of a single file.

    Raises:
        ValueError: there is nothing to show.
    """
    if run.is_file():
        first = records.read(run)[0]
        return [(first.get("step", 0), bool(first.get("evaluation")), run)]
    found = [
        (step, evaluation, path)
        for evaluation in (False, True)
        for step, path in records.files(run, evaluation).items()
    ]
    if not found:
        raise ValueError(
            f"{run} has no {records.FOLDER}/ with steps; the run needs rollout.save=true and stage=grpo or ppo"
        )
    return sorted(found, key=lambda each: each[:2])


def chosen_steps(files: Sequence[tuple[int, bool, Path]], asked: str | None) -> set[int]:
    """The steps of the page.

    Raises:
        ValueError: a step that is not there, or no number.
    """
    there = list(dict.fromkeys(step for step, _, _ in files))
    if asked is None:
        return set(evenly(there, MOST_STEPS))
    try:
        wanted = {int(word) for word in asked.split(",")}
    except ValueError as error:
        raise ValueError(f"--steps {asked}: give numbers with commas, such as --steps 0,50,99") from error
    if lacks := wanted - set(there):
        raise ValueError(f"--steps: there are no rollouts of step {min(lacks)}; there are {there[0]} to {there[-1]}")
    return wanted


def page_groups(
    rollouts: Sequence[Record], step: int, evaluation: bool, most: int, channel: str | None
) -> Iterator[Group]:
    """The groups of one file that go on the page."""
    found = [group for group in groups_of(step, evaluation, rollouts) if channel in (None, group.channel)]
    yield from found[:most]


def show(arguments: argparse.Namespace) -> str:
    """Write the page if one is asked for; what to print.

    Raises:
        ValueError: there is nothing to show, or what there is cannot be read.
    """
    files = all_files(arguments.run)
    steps = chosen_steps(files, arguments.steps)
    lines, groups, errors = [], [], Counter[str]()
    for step, evaluation, path in files:
        rollouts = records.read(path)
        if not rollouts:
            continue
        lines.append(line_of(step, evaluation, rollouts))
        errors += errors_of(rollouts)
        if arguments.out is not None and step in steps:
            groups += page_groups(rollouts, step, evaluation, arguments.groups, arguments.channel)
    said = [table(lines)]
    said += [f"{count} x {text}" for text, count in errors.most_common(5)]
    if arguments.out is not None:
        if not groups:
            raise ValueError(f"--channel {arguments.channel}: no such channel among these steps")
        arguments.out.write_text(page(arguments.run.resolve().name, table(lines), groups), encoding="utf-8")
        said.append(f"{arguments.out}: {len(groups)} prompts of {len({group.step for group in groups})} steps")
    return "\n".join(said)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder, or one file of its rollouts/")
    parser.add_argument("--out", type=Path, help="the page to write")
    parser.add_argument("--steps", help="steps of the page, with commas; without it up to 12, evenly")
    parser.add_argument("--groups", type=int, default=8, help="prompts of each step (8)")
    parser.add_argument("--channel", help="only prompts of this channel")
    try:
        print(show(parser.parse_args()))
    except (ValueError, OSError) as error:
        print(f"show_rollouts: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
