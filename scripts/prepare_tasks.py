"""Prompts for reinforcement learning from a task of reasoning-gym (106 generators with verifiers; Apache-2.0).

    python scripts/prepare_tasks.py products --out assets/tasks/products.jsonl --size 1000 min_digits=1 max_digits=1
    torchrun ... train.py stage=grpo 'data.sources=[{path: assets/tasks/products.jsonl}]' \\
        'rollout.rewards=[{function: reasoning_gym}, {function: format, weight: 0.1, arguments: {tags: answer}}]'

Writes a row {"messages": ..., "answer": ..., "reasoning_gym": ...} for each item; the reward function reasoning_gym
scores answers with the task's own verifier, from the last field. Same seed, settings and package, same bytes.
KEY=VALUE words are settings of the task; --list names the tasks.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trainer.inference.settings import settings_of
from trainer.problems import nearest

ASK = "Give the answer as <answer>...</answer>."


def rows(task: str, size: int, seed: int, settings: Mapping[str, Any], ask: str) -> Iterator[dict[str, Any]]:
    """The items of a task whose own answer is still right for its verifier when they have been written to a file.

    Raises:
        ValueError: no such task, or settings it does not take.
    """
    import reasoning_gym  # seconds to import
    from reasoning_gym.factory import DATASETS

    if task not in DATASETS:
        close = nearest(task, DATASETS)
        raise ValueError(f"there is no task {task}; " + (f"did you mean {close[0]}?" if close else "--list names them"))
    try:
        dataset = reasoning_gym.create_dataset(task, size=size, seed=seed, **settings)
    except (TypeError, AssertionError, ValueError) as error:
        raise ValueError(f"{task} does not take these settings: {error}") from error
    for item in dataset:
        entry = json.loads(json.dumps(item, default=str))
        answer = entry["answer"]
        if answer is not None and dataset.score_answer(answer, entry) < 1:
            continue
        question = f"{entry['question'].strip()}\n{ask}".strip()
        yield {"messages": [{"role": "user", "content": question}], "answer": answer, "reasoning_gym": entry}


def write(path: Path, arguments: argparse.Namespace, settings: Mapping[str, Any]) -> str:
    """Write the file; what to print.

    Raises:
        ValueError: the task, its settings or the place cannot be used.
    """
    made = list(rows(arguments.task, arguments.size, arguments.seed, settings, arguments.ask))
    if not made:
        raise ValueError(f"{arguments.task}: no item can be scored from a file; take another task")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made), encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--out {path} cannot be written: {error}") from error
    left = arguments.size - len(made)
    said = f"; {left} items left out, whose answer cannot be scored from a file" if left else ""
    return f"{path}: {len(made)} prompts of {arguments.task}{said}. The first:\n{made[0]['messages'][0]['content']}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", nargs="?", help="a dataset of reasoning-gym")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="settings of the task")
    parser.add_argument("--out", type=Path, help="the file to write")
    parser.add_argument("--size", type=int, default=1000, help="how many prompts (1000)")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--ask", default=ASK, help=f"added to each question; {ASK!r}")
    parser.add_argument("--list", action="store_true", help="name the tasks")
    arguments = parser.parse_intermixed_args()
    try:
        if arguments.list:
            from reasoning_gym.factory import DATASETS

            print("\n".join(sorted(DATASETS)))
        elif arguments.task is None or arguments.out is None or arguments.size < 1:
            raise ValueError("give a task and --out FILE, such as: products --out assets/tasks/products.jsonl")
        else:
            print(write(arguments.out, arguments, settings_of(arguments.settings)))
    except ImportError as error:
        print(
            f"prepare_tasks: reasoning-gym is not installed ({error}); pip install reasoning-gym==0.1.25",
            file=sys.stderr,
        )
        return 1
    except ValueError as error:
        print(f"prepare_tasks: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
