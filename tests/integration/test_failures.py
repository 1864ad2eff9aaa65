"""What a user sees when something goes wrong: one clear message, an exit code, nothing lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import programs
from tests.integration.conftest import ROOT

TRAIN = str(ROOT / "train.py")

REFUSALS = [  # (overrides, fragments of the message)
    pytest.param({"model__num_heads": 5}, ["num_heads"], id="heads"),
    pytest.param({"engine__zero": 4}, ["engine.zero", "4"], id="zero stage"),
    pytest.param({"data__seq_len": 100000}, ["data.seq_len", "max_seq_len"], id="too long"),
    pytest.param({"init_from": "/nowhere/model"}, ["init_from", "/nowhere/model"], id="missing path"),
    pytest.param({"model__vocab_size": 100}, ["model.vocab_size=100", "257"], id="vocabulary"),
    pytest.param({"optim__leraning_rate": 1}, ["optim.leraning_rate", "optim.lr"], id="unknown key"),
]


@pytest.mark.parametrize(("change", "fragments"), REFUSALS)
def test_mistakes_end_calmly(world, change: dict, fragments: list[str]) -> None:
    done = programs.run([TRAIN, *world.overrides(run__name="refused", **change)])
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    for fragment in fragments:
        assert fragment in done.stderr, done.stderr


def test_a_mistake_is_told_once_by_many_ranks(world, launch) -> None:
    began = time.monotonic()
    done = launch(world.overrides(run__name="refused", engine__zero=4), processes=2)
    assert done.returncode != 0
    assert done.stderr.count("engine.zero = 4") == 1, done.stderr
    assert time.monotonic() - began < 60


def test_a_channel_without_a_supervised_token_stops_the_run(world) -> None:
    path = world.folder / "mute.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "anyone there?"}]}) + "\n")
    words = world.overrides(run__name="mute", data__sources=f"[{{path: {path}, channel: mute}}]")
    done = programs.run([TRAIN, *words, "data.max_bad_fraction=1.0"])
    assert done.returncode == 2
    assert "mute" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("damage", ["truncated", "mismatch"])
def test_damaged_weights_are_named(world, tmp_path: Path, damage: str) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path / "model"
    config = LlamaConfig(
        vocab_size=264,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    if damage == "truncated":
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-1000])
        fragments = ["model.safetensors"]
    else:
        facts = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(facts | {"intermediate_size": 64}))
        fragments = ["gate_proj", "[48, 32] in the file", "[64, 32] by the config"]
    done = programs.run([TRAIN, *world.overrides(run__name=f"bad_{damage}", model="hf", init_from=folder)])
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    for fragment in fragments:
        assert fragment in done.stderr, done.stderr


def test_full_disk_while_saving_loses_nothing(world) -> None:
    """A file-size limit stands in for the full disk: the second save fails, the first stays usable."""
    words = world.overrides(run__name="full", run__steps=2, run__save_every=1)
    assert programs.run([TRAIN, *world.overrides(run__name="full", run__steps=1)]).returncode == 0
    good = world.folder / "runs" / "full" / "checkpoints" / "step_0000001"
    before = {file.name: file.read_bytes() for file in good.iterdir()}
    limit = max(len(content) for content in before.values()) // 2
    done = programs.run([TRAIN, *words], file_limit=limit)
    assert done.returncode == 2, done.stderr
    assert "could not be written" in done.stderr and "step_0000001" in done.stderr
    assert "Traceback" not in done.stderr
    assert {file.name: file.read_bytes() for file in good.iterdir()} == before
    assert sorted(path.name for path in good.parent.iterdir()) == ["latest", "step_0000001"]
    assert programs.run([TRAIN, *words]).returncode == 0


def test_the_failing_rank_speaks_first_and_ends_the_job(tmp_path: Path) -> None:
    """Rank 1 fails while rank 0 waits for it: the job ends within seconds, with rank 1's message before anything."""
    script = tmp_path / "fail.py"
    script.write_text(
        "from parallel.groups import LauncherRanks, build_groups\n"
        "from trainer.failure import told_clearly\n"
        "ranks = LauncherRanks.read()\n"
        "with told_clearly(ranks.rank):\n"
        "    groups = build_groups(ranks, 600)\n"
        "    if ranks.rank == 1:\n"
        "        raise ValueError('the disk of this rank is gone')\n"
        "    groups.barrier()\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    began = time.monotonic()
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode != 0
    assert time.monotonic() - began < 40
    words = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith(("W", "["))]
    assert words[0] == "rank 1: the disk of this rank is gone", done.stderr
