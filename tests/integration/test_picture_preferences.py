"""Whole runs of preference and reinforcement learning stages on files of rows with pictures: every layout, a reference
computed before and prompts that both answers share give the numbers of one process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.integration.test_preference_runs import Runs, same
from tests.pool import Pool
from tests.unit.data.conftest import make_tokenizer

SAYS = (" two", " seven words", " no")


@pytest.fixture(scope="module")
def runs(pool: Callable[[int], Pool], tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Two rows in three show a picture, some two; some name them in the field, some in their messages."""
    folder, draw = tmp_path_factory.mktemp("pictures"), np.random.default_rng(3)
    make_tokenizer().save_pretrained(folder / "tokenizer")
    for n in range(5):
        size = (20 + 9 * n, 44 - 6 * n, 3)
        Image.fromarray(draw.integers(0, 256, size, dtype=np.uint8)).save(folder / f"{n}.png")
    pairs: list[dict[str, Any]] = []
    judged: list[dict[str, Any]] = []
    asked: list[dict[str, Any]] = []
    for n in range(24):
        names = [[f"{n % 5}.png"], [f"{n % 5}.png", f"{n % 3}.png"], []][n % 3]
        row: dict[str, Any] = {"prompt": "<image>" * len(names) + f"What {n}?", "topic": "odd" if n % 4 else "fourth"}
        row |= {"images": names} if names else {}
        pairs.append(row | {"chosen": SAYS[n % 2], "rejected": SAYS[2]})
        judged.append(row | {"completion": SAYS[n % 3], "label": bool(n % 2)})
        parts = [*({"type": "image", "image": name} for name in names), {"type": "text", "text": f"How {n}?"}]
        question = {"messages": [{"role": "user", "content": parts}]}
        if n % 2 and names:
            question = {"images": names, "question": f"How {n}?"}
        asked.append({**question, "topic": row["topic"], "answer": "two"})
    for name, rows in (("pairs", pairs), ("judged", judged), ("asked", asked)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Runs(folder, pool)


def numbers(runs: Runs, name: str, stage: str, processes: int, **more: Any) -> list[dict[str, float]]:
    """What a run of three steps reports, in training and of held-out rows."""
    given = {"run__steps": 3, "run__save_every": 0, "data__seq_len": 160, "data__micro_batch_rows": 1, **more}
    if stage == "reward":
        given["model__head"] = "scalar"
    runs.run(name, stage, processes, **given)
    return runs.metrics(name, "train") + runs.metrics(name, "eval")


LLAVA: dict[str, Any] = {"model": "tiny_llava", "+model__init_std": 0.1}
QWEN: dict[str, Any] = {"model": "tiny_qwen2_vl", "+model__init_std": 0.1}
ROWS: list[tuple[str, dict[str, Any], list[tuple[int, dict[str, Any]]]]] = [
    # stage, model and loss, then each layout and what shall change nothing
    (
        "dpo",
        LLAVA,
        [
            (2, {"engine": "zero2", "stage__share_prompt": "true"}),
            (2, {"parallel__tp": 2}),
            (2, {"parallel__pp": 2, "stage__precompute_reference": "true"}),
        ],
    ),
    ("dpo", QWEN, [(2, {"parallel__pp": 2, "stage__share_prompt": "true"})]),
    ("dpo", LLAVA | {"stage__loss": "kto"}, [(2, {"engine": "zero2"})]),
    ("reward", QWEN, [(2, {"parallel__tp": 2, "stage__share_prompt": "true"})]),
]


@pytest.mark.parametrize("row", ROWS, ids=["llava", "qwen2_vl", "kto", "reward"])
def test_a_layout_is_one_process(row: Any, runs: Runs) -> None:
    stage, settings, layouts = row
    name = f"{stage}-{settings['model']}-{settings.get('stage__loss', '')}"
    expected = numbers(runs, name, stage, 1, **settings)
    assert expected[0]["train/grad_norm"] > 1e-3
    for place, (processes, layout) in enumerate(layouts):
        same(expected, numbers(runs, f"{name}-{place}", stage, processes, **settings, **layout))


def test_rollouts_of_prompts_from_a_file(runs: Runs) -> None:
    """The texts that are written down are those of one process; what the policy is asked is what is learnt from."""
    words: dict[str, Any] = {
        **LLAVA,
        "data__sources": f"[{{path: {runs.folder}/asked.jsonl, channel_field: topic}}]",
        "data__seq_len": 160,
        "rollout__rewards": "[{function: length, arguments: {least: 2, most: 4, window: 4}}]",
        "rollout__max_prompt_tokens": 120,
        "rollout__max_new_tokens": 8,
        "rollout__prompts_per_step": 3,
        "rollout__samples": 4,
        "run__steps": 2,
    }
    for name, processes, layout in (("alone", 1, {}), ("cut", 2, {"parallel__pp": 2})):
        runs.run(name, "grpo", processes, **words, **layout)
    alone, cut = (_texts(runs.folder / "runs" / name / "rollouts") for name in ("alone", "cut"))
    assert alone == cut and any("<image>" in json.dumps(each["messages"]) for each in alone)
    assert all(each["fields"]["answer"] == "two" for each in alone)
    assert max(row["train/mismatch_kl"] for row in runs.metrics("alone", "train")) < 1e-6


def _texts(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]
    return [{key: line[key] for key in ("prompt", "sample", "messages", "fields", "turns")} for line in lines]


def test_who_cannot_see_is_told(runs: Runs) -> None:
    common: dict[str, Any] = {**LLAVA, "rollout__rewards": "[{function: length}]", "run__steps": 1}
    told = runs.refused("grpo", **common, rollout__backend="vllm", rollout__url="http://localhost:1")
    assert "rollout.backend = vllm" in told and "cannot be shown pictures" in told and "rollout.backend=loom" in told
    runs.run("blind", "reward", model="tiny_llama", run__steps=1, model__head="scalar", data__max_bad_fraction=0.7)
    told = runs.refused("grpo", **common, rollout__reward_model=runs.folder / "runs" / "blind")
    assert "rollout.reward_model" in told and "makes something else of pictures than the policy does" in told
