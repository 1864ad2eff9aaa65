"""What the contenders of ``dpo.py`` and ``reward.py`` are given: pairs of answers to a prompt, drawn from a Zipf law.

Written as text that the benchmark's tokenizer turns back into exactly the drawn words; all read the same file.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from scripts.bench import workload

Lengths = Literal["equal", "skewed"]
EQUAL = 512
"""Tokens of every document, a prompt with one of its answers, where nothing has to be padded."""
MEDIAN, LONGEST, SIGMA = 120, 1024, 1.0
"""Of skewed documents: log-normal."""
STEP_PAIRS = {"equal": 1, "skewed": 4}
"""Pairs of a step of those who count pairs; a packed row holds about as many."""
ROW = {"equal": 2 * EQUAL, "skewed": 2 * LONGEST}
"""Tokens of a packed row: the longest pair fits."""
LEARNING_RATE = 1e-5


@dataclass(frozen=True)
class PairTokens:
    """Numbers of tokens; the end of text counts with each answer."""

    prompt: int
    chosen: int
    rejected: int


def draw_lengths(lengths: Lengths, pairs: int, rng: np.random.Generator) -> list[PairTokens]:
    """A third of a document is the prompt. Both answers to it have lengths of their own."""
    if lengths == "equal":
        return [PairTokens(EQUAL // 3, EQUAL - EQUAL // 3, EQUAL - EQUAL // 3)] * pairs
    drawn = np.exp(rng.normal(np.log(MEDIAN), SIGMA, (pairs, 3))).astype(int).clip(9, LONGEST)
    return [PairTokens(int(p) // 3, int(c) - int(c) // 3, int(r) - int(r) // 3) for p, c, r in drawn]


def write(folder: Path, lengths: Lengths, pairs: int, seed: int = 0) -> Path:
    """One line a pair; prompt, chosen and rejected are text."""
    rng = np.random.default_rng(seed)
    rows = []
    for each in draw_lengths(lengths, pairs, rng):
        prompt, *answers = (
            workload.as_text(workload.zipf_words(rng, count).tolist())
            for count in (each.prompt, each.chosen - 1, each.rejected - 1)
        )
        rows.append({"prompt": prompt, "chosen": f" {answers[0]}", "rejected": f" {answers[1]}"})
    path = pairs_file(folder, lengths)
    workload.write_lines(path, rows)
    return path


def pairs_file(folder: Path, lengths: Lengths) -> Path:
    """Where `write` puts them."""
    return folder / f"pairs_{lengths}.jsonl"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What a contender is told beside its turns."""
    parser.add_argument("--stage", choices=("dpo", "reward"), required=True)
    parser.add_argument("--lengths", choices=("equal", "skewed"), required=True)
    parser.add_argument("--precompute", action="store_true", help="the reference's log-probabilities, before training")
