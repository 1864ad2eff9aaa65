"""Rollouts as lines of JSON: `rollouts/step_000010.jsonl` in the run folder, one line a sample; held-out ones in
`eval_000010.jsonl`. `scripts/show_rollouts.py` shows them.

Keys of a line: step, evaluation, prompt (its number), sample, channel, messages or text (what was asked), fields, turns
({role, text, learnt, tokens}), rewards (the parts), reward, advantage (mean over the sample's tokens; null = not learnt
from), prompt_tokens, new_tokens, finish, log_prob (sum over what the policy wrote, nats), errors. With
rollout.save_tokens each turn has `pieces` too: [text, log-probability] of its tokens.
"""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.rollout.types import Rollout, Turn

FOLDER = "rollouts"
_NAME = re.compile(r"(step|eval)_(\d+)\.jsonl")
Record = dict[str, Any]


class Records:
    """Writes the rollouts of steps down.

    Args:
        run_dir: the run folder; None = nothing is written (ranks besides the main one).
        pieces: keep every token's text and log-probability.
    """

    def __init__(self, run_dir: Path | None, tokenizer: Any, pieces: bool) -> None:
        self.folder = None if run_dir is None else run_dir / FOLDER
        self.tokenizer, self.pieces = tokenizer, pieces
        self._warned = False

    def write(
        self,
        step: int,
        rollouts: Sequence[Rollout],
        advantages: Mapping[tuple[int, int], float] | None = None,
        evaluation: bool = False,
    ) -> None:
        """The file of a step; one that is there (a resumed run does steps again) is replaced. A disk that is full
        costs the file, not the run.

        Args:
            advantages: by (prompt.number, sample), of the samples that are learnt from.
        """
        if self.folder is None:
            return
        path = self.folder / f"{'eval' if evaluation else 'step'}_{step:06d}.jsonl"
        part = path.with_suffix(".tmp")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with part.open("w", encoding="utf-8", errors="replace") as lines:
                for rollout in rollouts:
                    advantage = (advantages or {}).get((rollout.prompt.number, rollout.sample))
                    record = {"step": step, "evaluation": evaluation, **self.record(rollout, advantage)}
                    lines.write(json.dumps(record, ensure_ascii=False, default=str) + "\n")
            os.replace(part, path)
            self._warned = False
        except OSError as error:
            if not self._warned:
                warnings.warn(f"{path}: cannot write ({error}); rollouts of this step are not kept", stacklevel=2)
            self._warned = True

    def record(self, rollout: Rollout, advantage: float | None) -> Record:
        """One rollout as JSON has it."""
        prompt = rollout.prompt
        asked = {"text": prompt.text} if prompt.messages is None else {"messages": list(prompt.messages)}
        return {
            "prompt": prompt.number,
            "sample": rollout.sample,
            "channel": prompt.channel_name,
            **asked,
            "fields": dict(prompt.fields),
            "turns": [self._turn(rollout, turn) for turn in rollout.turns],
            "rewards": dict(rollout.rewards),
            "reward": rollout.reward,
            "advantage": None if advantage is None or not math.isfinite(advantage) else advantage,
            "prompt_tokens": len(prompt.tokens),
            "new_tokens": rollout.new_tokens,
            "finish": rollout.finish,
            "log_prob": math.fsum(rollout.log_probs),
            "errors": dict(rollout.errors),
        }

    def _turn(self, rollout: Rollout, turn: Turn) -> Record:
        found: Record = {"role": turn.role, "text": turn.text, "learnt": turn.learnt, "tokens": turn.stop - turn.start}
        if self.pieces and turn.learnt:
            tokens = rollout.tokens[turn.start : turn.stop]
            log_probs = rollout.log_probs[turn.start : turn.stop]
            texts = pieces(self.tokenizer, tokens)
            found["pieces"] = [[text, round(value, 4)] for text, value in zip(texts, log_probs, strict=True)]
        return found


def pieces(tokenizer: Any, tokens: Sequence[int]) -> list[str]:
    """The text of each token; tokens that are parts of one character leave it to the last of them."""
    found, start = [], 0
    for stop in range(1, len(tokens) + 1):
        text = tokenizer.decode(list(tokens[start:stop]), skip_special_tokens=False)
        whole = not text.endswith("\ufffd") or stop - start >= 4 or stop == len(tokens)  # no character has more bytes
        found.append(text if whole else "")
        start = stop if whole else start
    return found


def files(run_dir: Path, evaluation: bool = False) -> dict[int, Path]:
    """The files of a run by step, in the order of steps."""
    kind = "eval" if evaluation else "step"
    found = {
        int(match[2]): path
        for path in (run_dir / FOLDER).glob(f"{kind}_*.jsonl")
        if (match := _NAME.fullmatch(path.name)) is not None
    }
    return dict(sorted(found.items()))


def read(path: Path) -> list[Record]:
    """The records of a file.

    Raises:
        ValueError: it cannot be read, or a line is no record.
    """
    try:
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    found = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path} line {number} is not JSON: {error}") from error
        if not isinstance(record, dict) or not {"prompt", "turns", "rewards", "reward"} <= record.keys():
            raise ValueError(f"{path} line {number} is no rollout: it lacks prompt, turns, rewards or reward")
        found.append(record)
    return found
