"""Whole runs of reinforcement learning on toy data: what a user types, what lies in the run folder, resuming."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from convert.to_hf import export
from models import build
from models.init import InitSource
from tests import cases
from tests.vllm_stand_in import serving

SHOWN = {
    *("rollout/reward", "rollout/reward_std", "rollout/flat_groups", "rollout/length", "rollout/truncated"),
    *("rollout/reward/length", "train/kl", "train/entropy", "train/clip_low", "train/clip_high", "train/ratio_min"),
    *("train/ratio_max", "train/mismatch_kl", "train/loss", "train/grad_norm", "critic/loss", "critic/grad_norm"),
    *("critic/explained_variance", "perf/generate_tokens_per_s", "perf/score_tokens_per_s", "perf/generate_idle"),
    *("perf/update_tokens_per_s", "perf/step_time", "channel/sum/reward", "channel/sum/entropy", "channel/sum/length"),
}
"""What a step tells, all and by channel."""


def _words(world: Any, **more: object) -> list[str]:
    rollout = {
        "rollout__rewards": "[{function: length, arguments: {least: 2, most: 4, window: 4}}]",
        "rollout__max_prompt_tokens": 48,
        "rollout__max_new_tokens": 12,
        "rollout__prompts_per_step": 4,
        "rollout__samples": 2,
        "data__eval_fraction": 0.1,
    }
    return world.overrides(**(rollout | more))


def _rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_ppo_tells_all_its_numbers_and_goes_on_after_a_stop(pool: Any, world: Any) -> None:
    settings = {"stage": "ppo", "run__name": "ppo", "run__steps": 2, "stage__mini_batches": 2}
    pool(2).run(cases.run_config, _words(world, **settings))
    folder = world.folder / "runs" / "ppo"
    rows = [row for row in _rows(folder) if row["kind"] == "train"]
    named = {key for row in rows for key in row}
    assert not SHOWN - named, SHOWN - named
    held_out = [row for row in _rows(folder) if row["kind"] == "eval"]
    assert len(held_out) == 2 and "eval/reward" in held_out[0]
    for name in ("step_000001", "step_000002", "eval_000000", "eval_000002"):
        assert (folder / "rollouts" / f"{name}.jsonl").stat().st_size > 0
    lines = [json.loads(line) for line in (folder / "rollouts" / "step_000001.jsonl").read_text().splitlines()]
    assert len(lines) == 8 and all(line["advantage"] is not None for line in lines)
    assert (folder / "critic" / "checkpoints" / "step_0000002").is_dir()
    assert (
        "generator: 2 x tp 1, reads the trained weights; besides the policy: critic, reference"
        in (folder / "log.txt").read_text()
    )
    pool(2).run(cases.run_config, _words(world, **settings | {"run__steps": 3}))
    later = json.loads((folder / "rollouts" / "step_000003.jsonl").read_text().splitlines()[0])
    assert later["prompt"] == 8  # two steps of four prompts before


def test_a_critic_that_is_gone_is_told(pool: Any, world: Any) -> None:
    """A run of GRPO has none to go on with."""
    pool(1).run(cases.run_config, _words(world, stage="grpo", run__name="grpo", run__steps=1))
    saved = world.folder / "runs" / "grpo" / "checkpoints" / "step_0000001"
    words = _words(world, stage="ppo", run__name="after", run__steps=2, run__resume=saved)
    with pytest.raises(AssertionError, match=r"its critic is not in .*critic/checkpoints/step_0000001"):
        pool(1).run(cases.run_config, words)


def test_a_run_whose_texts_a_vllm_server_writes(pool: Any, world: Any, tmp_path: Path) -> None:
    """The server is a stand-in by transformers, and has the weights of each step: both sides agree on every token."""
    model = dataclasses.replace(cases.TINY, vocab_size=264, max_seq_len=64)
    source = InitSource(model, 4)
    weights = ((name, source.tensor(name)) for name, _ in build(model).named_parameters())
    base = export(tmp_path / "base", model, weights, world.folder / "tokenizer")
    settings = {"stage": "grpo", "run__name": "served", "run__steps": 2, "optim__lr": 0.02, "optim__warmup_steps": 0}
    settings |= {"init_from": base, "model": "hf", "rollout__backend": "vllm", "rollout__samples": 4}
    with serving(base) as server:
        pool(1).run(cases.run_config, _words(world, **settings, rollout__url=server.url))
        url = server.url
    folder = world.folder / "runs" / "served"
    rows = _rows(folder)
    assert len([row for row in rows if row["kind"] == "eval"]) == 2
    learnt = [row for row in rows if row["kind"] == "train"]
    assert len(learnt) == 2 and max(row["train/mismatch_kl"] for row in learnt) < 1e-6
    assert learnt[0]["train/grad_norm"] > 0 and learnt[0]["perf/generate_tokens_per_s"] > 0
    policy = folder / "policy"
    said = f"generator: the vLLM server at {url}, given the weights in {policy} before every rollout"
    assert said in (folder / "log.txt").read_text()
    assert [each.name for each in policy.iterdir()] == ["weights_000003"]
    assert (policy / "weights_000003" / "tokenizer.json").is_file()
    with pytest.raises(AssertionError, match=rf"rollout\.url={url}: no vLLM server answers .*vllm serve {base} --port"):
        pool(1).run(cases.run_config, _words(world, **settings | {"run__steps": 3}, rollout__url=url))
