"""What a run learns from, behind its gate: the same for texts and for prompts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from data.gate import GateError
from data.peers import Peers
from data.pipeline import TrainingData
from data.prompts import PromptData
from parallel.groups import Groups
from trainer.config import RunConfig

Found = TypeVar("Found", TrainingData, PromptData)


def behind_the_gate(read: Callable[[Peers], Found], cfg: RunConfig, groups: Groups, run_dir: Path) -> Found:
    """What ``read`` gives; its report and the list of bad rows go to the run folder, also when the gate refuses.

    Raises:
        ValueError: the gate refuses, or the tokenizer makes ids the model has no embedding for.
    """
    report = None
    try:
        found = read(Peers(groups.rank, groups.world, groups.all_gather))
        report = found.report
    except GateError as refusal:
        report = refusal.report
        raise
    finally:
        if groups.is_main and report is not None:
            (run_dir / "data_report.json").write_text(json.dumps(report.to_dict(), indent=2) + "\n")
            report.write_bad_rows(str(run_dir / "bad_rows.jsonl"))
    if found.max_token_id >= cfg.model.vocab_size:
        raise ValueError(
            f"model.vocab_size={cfg.model.vocab_size}: the tokenizer in {cfg.data.tokenizer} makes "
            f"ids up to {found.max_token_id} on this data, which the embedding does not hold. Take the tokenizer that "
            f"belongs to the model, or a model with model.vocab_size={found.max_token_id + 1} or more."
        )
    return found
