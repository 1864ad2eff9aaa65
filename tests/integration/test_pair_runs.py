"""A run that compares pictures with captions goes on at another layout, and a model with a decoder takes its tower."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from convert.from_hf import whole_shapes
from convert.opening import open_weights
from convert.source import Source
from tests import cases

TOWER = ["model.vision.tower.hidden_size=48", "model.vision.tower.intermediate_size=96"]


@pytest.fixture(scope="module")
def shown(world: Any) -> Path:
    """Twelve pictures of noise with captions to learn from, three that are held out."""
    folder, random = world.folder / "shown", np.random.default_rng(0)
    folder.mkdir()
    for file, numbers in (("learnt", range(12)), ("held_out", range(12, 15))):
        rows = [{"image": f"{n}.png", "caption": f"number {n}"} for n in numbers]
        (folder / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for n in numbers:
            Image.fromarray(random.integers(0, 256, (28, 28, 3), dtype=np.uint8)).save(folder / f"{n}.png")
    return folder


def words(world: Any, shown: Path, name: str, steps: int, *more: str) -> list[str]:
    """A short run of either stage on the pictures."""
    sources = f"[{{path: {shown}/learnt.jsonl, channel: shown}}]"
    given = world.overrides(run__name=name, run__steps=steps, data__sources=sources, optim__eps=1e-3, optim__lr=3e-4)
    held = f"data.eval_sources=[{{path: {shown}/held_out.jsonl, channel: shown}}]"
    return [*given, held, "optim.schedule=constant", *more]


def test_a_run_resumes_elsewhere_and_lends_its_tower(pool: Any, world: Any, shown: Path) -> None:
    pairs = ["model=tiny_clip", "stage=clip"]
    pool(1).run(cases.run_config, words(world, shown, "pairs_whole", 4, *pairs, "data.micro_batch_rows=8"))
    pool(2).run(cases.run_config, words(world, shown, "pairs", 2, *pairs, "engine=zero3"))
    pool(2).run(cases.run_config, words(world, shown, "pairs", 4, *pairs, "parallel.tp=2", "engine=zero2"))
    straight, resumed = (
        [world.metrics(name)[step]["train/loss"] for step in (1, 2, 3, 4)] for name in ("pairs_whole", "pairs")
    )
    assert cases.relative(straight, resumed) <= 1e-5 and len(set(straight)) == 4
    told = [_evaluations(world, name) for name in ("pairs_whole", "pairs")]
    assert told[0].keys() == told[1].keys() and told[0]["eval/pairs"] == 3 and "eval/shown/caption@1" in told[0]
    assert cases.relative(list(told[0].values()), list(told[1].values())) <= 1e-5

    run = world.folder / "runs" / "pairs"
    seeing = ["model=tiny_llava", *TOWER, "stage=sft", f"init_parts.vision={run}", "optim.parts.vision.train=false"]
    pool(1).run(cases.run_config, words(world, shown, "reader", 2, *seeing, "data.seq_len=64"))
    tower, reader = open_weights(run), open_weights(world.folder / "runs" / "reader")
    ours, theirs = Source(tower, tower.cfg), Source(reader, reader.cfg)
    names = [name for name in whole_shapes(reader.cfg) if name.startswith("vision.")]
    assert len(names) > 20 and all(torch.equal(ours.tensor(name), theirs.tensor(name)) for name in names)


def _evaluations(world: Any, run: str) -> dict[str, float]:
    """What the last evaluation of a run said."""
    rows = [json.loads(line) for line in (world.folder / "runs" / run / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if row["kind"] == "eval"][-1]
    return {name: value for name, value in last.items() if name.startswith("eval/")}
