"""Makes preference pairs anybody can make again: a right and a wrong answer to the same question.

    python scripts/prepare_preferences.py [--assets assets] [--pairs 70] [--held-out 25] [--seed 0]

Questions and right answers come from reasoning-gym's generators (Apache-2.0); a wrong answer is one that tempts: copied
instead of worked out, or nearly right. Writes into assets/preferences/
    spelling.jsonl, sorting.jsonl, fractions.jsonl, sums.jsonl     {"question": ..., "chosen": ..., "rejected": ...}
    held_out.jsonl                the same for questions that stand in none of them, with their channel
    held_out_questions.jsonl      those as multiple choice, for scripts/evaluate.py --questions

Same seed and package, same bytes.
"""

import argparse
import json
import random
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prepare_quickstart import one_at_a_time, whole_folder
from quickstart_data import ANSWER_FORM

Wrong = Callable[[str, str, random.Random], str]
"""(question, right answer, chance) -> a wrong answer; the right one, where there is no wrong one"""


@dataclass(frozen=True)
class Task:
    """A generator of reasoning-gym, its settings, and how its answers go wrong."""

    name: str
    wrong: Wrong
    settings: dict[str, Any]


def spelt_wrong(question: str, right: str, draw: random.Random) -> str:
    """The word as it was, or with two neighbours changed."""
    return right[::-1] if draw.random() < 0.5 else "".join(_exchange(list(right), draw))


def sorted_wrong(question: str, right: str, draw: random.Random) -> str:
    """The other way round, or with two neighbours changed."""
    numbers = right.split(", ")
    return ", ".join(numbers[::-1] if draw.random() < 0.5 else _exchange(numbers, draw))


def fraction_wrong(question: str, right: str, draw: random.Random) -> str:
    """The fraction as it was, or a part of it off by one."""
    if draw.random() < 0.5:
        return question.split("fraction ")[1].split(" ")[0]
    top, bottom = map(int, right.split("/"))
    return f"{top + draw.choice((-1, 1))}/{bottom}" if draw.random() < 0.5 else f"{top}/{bottom + 1}"


def sum_wrong(question: str, right: str, draw: random.Random) -> str:
    """A number nearby."""
    number = int(right) + draw.choice((-10, -2, -1, 1, 2, 10))
    return str(number if right[0] == "-" else abs(number))


def _exchange(parts: list[Any], draw: random.Random) -> list[Any]:
    """With two neighbours changed that are not alike; as they were, where all are."""
    places = [at for at in range(len(parts) - 1) if parts[at] != parts[at + 1]]
    if not places:
        return parts
    at = draw.choice(places)
    return [*parts[:at], parts[at + 1], parts[at], *parts[at + 2 :]]


TASKS = {
    "spelling": Task("spell_backward", spelt_wrong, {"min_word_len": 4, "max_word_len": 7}),
    "sorting": Task("number_sorting", sorted_wrong, {"min_numbers": 3, "max_numbers": 4, "max_decimals": 0}),
    "fractions": Task(
        "fraction_simplification", fraction_wrong, {"max_value": 50, "max_factor": 9, "styles": ("plain",)}
    ),
    "sums": Task("chain_sum", sum_wrong, {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}),
}


def pairs(task: Task, count: int, seed: int) -> Iterator[dict[str, Any]]:
    """``count`` pairs with different questions."""
    import reasoning_gym  # a second to import

    draw, seen = random.Random(f"{seed} {task.name}"), set()
    for item in reasoning_gym.create_dataset(task.name, size=4 * count, seed=seed, **task.settings):
        question, right = _plain(item["question"]), _plain(str(item["answer"]))
        wrong = task.wrong(question, right, draw)
        if question in seen or wrong == right:
            continue
        seen.add(question)
        yield {"question": question, "chosen": right, "rejected": wrong}
        if len(seen) == count:
            return


def _plain(text: str) -> str:
    """Without the instructions on the form of an answer, and lists of numbers as 1, 2, 3."""
    text = ANSWER_FORM.sub("", text).split("\nPlease follow")[0].strip()
    return re.sub(r"\.0\b", "", text.replace("'", "").strip("[]"))


def as_question(row: dict[str, Any], first: bool) -> dict[str, Any]:
    """A pair as multiple choice; the right one stands ``first`` or second."""
    choices = [row["chosen"], row["rejected"]] if first else [row["rejected"], row["chosen"]]
    return {"question": row["question"], "choices": choices, "answer": 0 if first else 1, "channel": row["channel"]}


def prepare(assets: Path, count: int, held_out: int, seed: int) -> None:
    """Make assets/preferences anew; what is there is replaced when all is written."""
    with whole_folder(assets / "preferences") as folder:
        held: list[dict[str, Any]] = []
        for channel, task in TASKS.items():
            rows = list(pairs(task, count + held_out, seed))
            _write(folder / f"{channel}.jsonl", rows[held_out:])
            held += [{**row, "channel": channel} for row in rows[:held_out]]
            example = f"{rows[0]['chosen']!r}, not {rows[0]['rejected']!r}"
            print(f"  {channel:<10} {len(rows) - held_out} pairs, such as {example}")
        _write(folder / "held_out.jsonl", held)
        _write(folder / "held_out_questions.jsonl", [as_question(row, at % 2 == 0) for at, row in enumerate(held)])
    print(f"{assets / 'preferences'}: {len(held)} pairs held out")


def _write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=Path("assets"), help="where to write (default: assets)")
    parser.add_argument("--pairs", type=int, default=70, help="of each channel, to learn from")
    parser.add_argument("--held-out", type=int, default=25, help="of each channel, to be asked")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        with one_at_a_time(args.assets):
            prepare(args.assets, args.pairs, args.held_out, args.seed)
    except (OSError, ImportError) as error:
        print(f"prepare_preferences: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
