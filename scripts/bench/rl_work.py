"""What the contenders of ``grpo.py`` are given: prompts of one length, and what an answer is worth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from scripts.bench import workload

PROMPTS, GROUP = 4, 8
"""Of a step; the group is the answers to one prompt."""
PROMPT_TOKENS, NEW_TOKENS = 64, 128
ROWS = 8
"""Answers of a micro-batch: they have the same length, so nobody pads."""
LEARNING_RATE = 1e-6
"""So small that the policy stays as drawn: an answer ends before its last token in 3 of 100 cases, for everybody."""


def write(folder: Path, prompts: int, seed: int = 0) -> Path:
    """One line a prompt, as text that the benchmark's tokenizer turns back into the drawn words."""
    rng = np.random.default_rng(seed)
    rows = ({"prompt": workload.as_text(workload.zipf_words(rng, PROMPT_TOKENS).tolist())} for _ in range(prompts))
    workload.write_lines(prompts_file(folder), rows)
    return prompts_file(folder)


def prompts_file(folder: Path) -> Path:
    """Where `write` puts them."""
    return folder / "prompts.jsonl"


def even_words(text: str, prompt: object = None) -> float:
    """The reward: the share of words with an even number."""
    words = text.split()
    return sum(word[-1] in "02468" for word in words) / max(len(words), 1)


def even_words_of_each(completions: Sequence[str], **others: object) -> list[float]:
    """`even_words` as TRL asks for it."""
    return [even_words(text) for text in completions]
