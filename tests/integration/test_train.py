"""The whole of train.py on toy data, started as users start it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests import cases, programs
from tests.integration.conftest import ROOT
from trainer import manifest


def test_channels_learn_and_everything_is_on_disk(pool, world) -> None:
    """SFT lowers the loss of every channel; the run folder holds what a reader needs later."""
    words = world.overrides(run__name="learn", run__steps=30, data__eval_fraction=0.1, run__save_every=10)
    pool(2).run(cases.run_config, words)
    rows, run = world.metrics("learn"), world.folder / "runs" / "learn"
    for name in ("sum", "echo", "say"):
        seen = [row[f"channel/{name}/loss"] for row in rows.values() if f"channel/{name}/loss" in row]
        assert seen[-1] < 0.8 * seen[0], (name, seen)
    first = rows[1]
    by_channel = sum(
        first.get(f"channel/{n}/loss", 0) * first.get(f"channel/{n}/tokens", 0) for n in ("sum", "echo", "say")
    )
    assert by_channel / first["train/tokens"] == pytest.approx(first["train/loss"], rel=1e-9)
    assert first["perf/tokens_per_s"] > 0 and first["perf/tflops"] > 0
    kinds = [json.loads(line)["kind"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert kinds.count("eval") == 2  # before the first step and after the last
    for file in ("config.yaml", "environment.json", "contract.txt", "log.txt", "data_report.json"):
        assert (run / file).stat().st_size > 0
    kept = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert kept == ["latest", "step_0000020", "step_0000030"]


def test_exported_folder_is_the_trained_model(pool, world, tmp_path: Path) -> None:
    """AutoModelForCausalLM of the export and our own model give the same logits (1e-5 of the largest)."""
    pool(2).run(cases.run_config, world.overrides(run__name="export", engine="zero3", run__steps=3))
    out = tmp_path / "hf"
    command = [sys.executable, "scripts/export_hf.py", str(world.folder / "runs" / "export"), str(out)]
    subprocess.run(command, cwd=ROOT, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(out)("3+4 is what?", return_tensors="pt")["input_ids"]
    ours_T = cases.checkpoint_logits(str(world.folder / "runs" / "export"), ids[0])
    with torch.no_grad():
        theirs_T = theirs(ids).logits[0]
    assert (ours_T - theirs_T).abs().max() <= 1e-5 * theirs_T.abs().max()
    # … and a new run starts from it, at the loss the exported weights have
    words = world.overrides(run__name="again", model="hf", init_from=out, run__steps=1)
    pool(2).run(cases.run_config, words)
    assert world.metrics("again")[1]["train/loss"] < world.metrics("export")[1]["train/loss"]
    # … which knows where they came from
    made, again = manifest.read(world.folder / "runs" / "export"), manifest.read(world.folder / "runs" / "again")
    assert made is not None and again is not None and manifest.read(out) == made
    assert again.lineage == (f"sft ({out})",) and again.parents[0].stage == "sft"


def test_random_channels_and_plain_text_pretraining(pool, world) -> None:
    text = world.folder / "book.txt"
    text.write_text("It was a bright cold day in April. " * 60)
    words = world.overrides(
        run__name="pretrain",
        stage="pretrain",
        data__sources=f"[{{path: {text}}}]",
        data__random_channels=3,
        run__steps=4,
    )
    pool(2).run(cases.run_config, words)
    row = world.metrics("pretrain")[4]
    names = {key.split("/")[1] for key in row if key.startswith("channel/")}
    assert names and names <= {"random_0", "random_1", "random_2"}


def test_killed_run_resumes_bitwise(pool, world, launch) -> None:
    """SIGKILL in the middle, the same command again: losses and gradient norms as if nothing had happened."""

    def words(name: str) -> list[str]:
        return world.overrides(run__name=name, run__steps=12, run__save_every=2, engine="zero2")

    pool(2).run(cases.run_config, words("whole"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, *words("killed")], cwd=ROOT, env=env, start_new_session=True, stdout=subprocess.DEVNULL
    )
    marker = world.folder / "runs" / "killed" / "checkpoints" / "latest"
    deadline = time.monotonic() + 120
    while not marker.is_file() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    reached = marker.read_text().strip()
    assert reached != "step_0000012", "the run ended before it could be killed"
    again = launch(words("killed"))
    assert again.returncode == 0, again.stderr
    assert "resuming from" in again.stdout
    a, b = world.metrics("whole"), world.metrics("killed")
    assert a.keys() == b.keys()
    for step in a:
        exact = [key for key in a[step] if key.startswith(("train/", "channel/"))]
        assert {key: a[step][key] for key in exact} == {key: b[step][key] for key in exact}, step


def test_a_finished_run_says_so(world, launch) -> None:
    words = world.overrides(run__name="finished", run__steps=1)
    assert launch(words, processes=0).returncode == 0
    again = programs.run([str(ROOT / "train.py"), *words])
    assert again.returncode == 0
    assert "nothing to do: step 1 of 1 is done" in again.stdout


def test_two_nodes_are_one_run(world, launch, pool) -> None:
    """Two launchers on loopback, one process each: the losses of one launcher with two processes."""
    pool(2).run(cases.run_config, world.overrides(run__name="one_node", run__steps=3))
    script = [str(ROOT / "scripts/launch/two_nodes_local.sh")]
    words = world.overrides(run__name="two_nodes", run__steps=3)
    env = os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", *script, *words], cwd=ROOT, env=env, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    one, two = world.metrics("one_node"), world.metrics("two_nodes")
    assert {s: r["train/loss"] for s, r in one.items()} == {s: r["train/loss"] for s, r in two.items()}
