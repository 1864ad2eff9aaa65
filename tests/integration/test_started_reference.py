"""A run that goes on with an adapter learns beside what it started from: the base with that adapter, as in TRL, which
takes a frozen copy of it. Here `peft` folds it into the base, and that is the reference of the run compared with."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from convert.from_hf import whole_shapes
from convert.to_hf import export
from models.adapters.config import Ia3Config, LoraConfig
from models.adapters.virtual_config import PromptConfig
from models.init import InitSource
from parallel.config import ParallelConfig
from scripts.params import load_model
from tests import cases, peft_reference, start_cases
from tests.cases import TINY
from tests.pool import Pool

LORA = LoraConfig(rank=4, alpha=8)
ROWS: list[tuple[Any, int, Any, dict[str, Any]]] = [
    (dataclasses.replace(LORA, dora=True, dropout=0.1), 2, 0, {"pp": 2, "schedule": "zbv"}),
    (LORA, 2, 2, {}),
    (LORA, 4, 3, {"tp": 2, "sequence_parallel": True}),
    (Ia3Config(), 2, 1, {"tp": 2}),
    (PromptConfig(tokens=3), 2, 1, {"pp": 2}),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0].name}-{row[1]}-zero{row[2]}")
def test_the_start_comes_back_and_goes(row: Any, pool: Callable[[int], Pool]) -> None:
    """To the bit, and training goes on as if nobody had looked."""
    adapter, processes, zero, options = row
    cfg = dataclasses.replace(TINY, num_layers=4)
    layout = ParallelConfig(**options)
    found = pool(processes).run(start_cases.there_and_back, cfg, adapter, zero=zero, layout=layout)[0]
    assert found["back_2"] == found["back_3"] == found["fresh"]
    assert abs(found["trained"] - found["fresh"]) > 1e-6
    assert found["looked"] == found["plain"]
    for name, weight in found["plain_weights"].items():
        assert torch.equal(weight, found["looked_weights"][name]), name


@pytest.fixture(scope="module")
def folders(world) -> tuple[Path, Path, Path]:
    """A base, an adapter of it as peft wrote it, and both folded together by peft."""
    from peft import LoraConfig as Theirs

    cfg = dataclasses.replace(load_model("tiny_qwen2", []), tied_embeddings=True, init_std=0.1)
    source = InitSource(cfg, 5)
    weights = ((name, source.tensor(name)) for name in whole_shapes(cfg))
    base = export(world.folder / "started_base", cfg, weights, world.folder / "tokenizer")
    adapter, merged = world.folder / "started_adapter", world.folder / "started_merged"
    model = peft_reference.random_adapter(base, adapter, Theirs(r=4, lora_alpha=8, target_modules="all-linear"))
    model.merge_and_unload().save_pretrained(str(merged))
    shutil.copytree(world.folder / "tokenizer", merged, dirs_exist_ok=True)
    return base, adapter, merged


def test_the_reference_is_the_base_with_the_started_adapter(pool: Any, world: Any, folders: Any) -> None:
    base, adapter, merged = folders
    pairs = world.folder / "started_pairs.jsonl"
    rows = [
        {"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": str(a + b + 1)} for a in range(4) for b in range(4)
    ]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = f"data.sources=[{{path: {pairs}, channel: sums}}]"

    def losses(name: str, processes: int, steps: int, *more: str) -> list[float]:
        given = world.overrides(run__name=name, model="hf", init_from=base, data__tokenizer="null", run__steps=steps)
        given = [word for word in given if not word.startswith("data.sources")]
        words = [*given, sources, "run.save_every=2", "optim.schedule=constant", "stage=dpo", "adapter=lora"]
        words += ["adapter.rank=4", "adapter.alpha=8", f"adapter.start={adapter}", "optim.lr=3e-3", *more]
        pool(processes).run(cases.run_config, words)
        return [world.metrics(name)[step]["train/loss"] for step in range(1, steps + 1)]

    def said(name: str) -> str:
        return (world.folder / "runs" / name / "log.txt").read_text()

    expected = losses("beside_the_folded", 1, 4, f"stage.reference={merged}")
    assert expected[0] == pytest.approx(0.693147, rel=1e-5)
    assert expected[3] < 0.69
    losses("its_start", 2, 2, "parallel=tp2")
    found = losses("its_start", 2, 4, "engine=zero3")  # resumed, in another layout
    assert found == pytest.approx(expected, rel=2e-5)
    assert f"reference: what the run starts from, the model with the adapter in {adapter}" in said("its_start")
    once = losses("asked_once", 1, 4, "stage.precompute_reference=true")
    assert once == pytest.approx(expected, rel=2e-5)
    assert f"the model with the adapter in {adapter}; its log-probabilities were computed" in said("asked_once")
    base_is_it = losses("beside_the_base", 1, 2, f"stage.reference={base}")
    assert abs(base_is_it[0] - expected[0]) > 1e-3

    other = world.folder / "other_adapter"
    shutil.copytree(adapter, other)
    weights = other / "adapter_model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-4:] = b"\0\0\0\0"
    weights.write_bytes(bytes(raw))
    with pytest.raises(AssertionError, match=r"other_adapter is not the adapter it started from .* is the reference"):
        losses("its_start", 1, 5, f"adapter.start={other}")
    with pytest.raises(AssertionError, match=r"adapter\.start: .*started_adapter -> None, and what the run starts"):
        losses("its_start", 1, 5, "adapter.start=null")


def test_a_policy_is_measured_from_its_started_adapter(pool: Any, world: Any, folders: Any) -> None:
    """No divergence in the first step."""
    base, adapter, _ = folders
    words = world.overrides(
        stage="grpo", run__name="grpo_started", run__steps=1, model="hf", init_from=base, stage__kl="loss",
        rollout__rewards="[{function: length, arguments: {least: 2, most: 4, window: 4}}]",
        rollout__max_prompt_tokens=48, rollout__max_new_tokens=8, rollout__prompts_per_step=2, rollout__samples=2,
    )  # fmt: skip
    words += ["adapter=lora", "adapter.rank=4", "adapter.alpha=8", f"adapter.start={adapter}"]
    pool(2).run(cases.run_config, words)
    assert abs(world.metrics("grpo_started")[1]["train/kl"]) < 1e-6
    log = (world.folder / "runs" / "grpo_started" / "log.txt").read_text()
    assert f"reference: what the run starts from, the model with the adapter in {adapter}" in log
