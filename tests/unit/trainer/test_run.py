"""The order of a run, in one process of the pool: what it resumes from, refuses, says and leaves in its folder."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import cases
from tests.unit.data.conftest import make_tokenizer
from trainer import checkpoint
from trainer.run_folder import LOCK


@dataclass
class Runs:
    """Starts runs in the pool's single process, on a toy corpus of 24 one-row samples."""

    folder: Path
    start: Callable[[list[str]], object]

    def words(self, name: str, **more: object) -> list[str]:
        """Overrides of a run; ``more`` are further keys with ``__`` for the dot."""
        settings: dict[str, object] = {
            "model": "tiny_llama",
            "data.sources": f"[{{path: {self.folder}/chat.jsonl}}]",
            "data.tokenizer": self.folder / "tokenizer",
            "data.seq_len": 64,
            "data.packing": "none",
            "data.global_batch_rows": 4,
            "data.micro_batch_rows": 4,
            "data.cache_dir": self.folder / "cache",
            "run.dir": self.folder / "runs",
            "run.name": name,
            "log.wandb": "disabled",
            "log.tensorboard": "false",
        }
        settings |= {key.replace("__", "."): value for key, value in more.items()}
        return [f"{key}={value}" for key, value in settings.items()]

    def run(self, name: str, **more: object) -> str:
        """Run; what this start added to log.txt."""
        log = self.folder / "runs" / name / "log.txt"
        before = len(log.read_text()) if log.is_file() else 0
        self.start(self.words(name, **more))
        return log.read_text()[before:]

    def refused(self, name: str, **more: object) -> str:
        """Run; the message of the ValueError it ends with."""
        with pytest.raises(AssertionError) as failure:
            self.start(self.words(name, **more))
        text = str(failure.value)
        assert "ValueError: " in text or "GateError: " in text, text
        return text.split("Error: ", 1)[1]

    def steps(self, name: str) -> list[int]:
        """Steps in metrics.jsonl, in the order written."""
        rows = [json.loads(line) for line in (self.folder / "runs" / name / "metrics.jsonl").read_text().splitlines()]
        return [row["step"] for row in rows if row["kind"] == "train"]

    def latest(self, name: str) -> checkpoint.Checkpoint:
        """The run's latest checkpoint."""
        folder = checkpoint.find_latest(self.folder / "runs" / name / "checkpoints")
        assert folder is not None
        return checkpoint.Checkpoint(folder)


@pytest.fixture(scope="module")
def runs(pool, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("runs")
    make_tokenizer().save_pretrained(folder / "tokenizer")
    rows = [{"messages": [turn("user", f"{n}+{n}"), turn("assistant", str(2 * n))]} for n in range(24)]
    (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    bad = json.dumps(rows[0]) + "\n" + json.dumps({"messages": "no list"}) + "\n" + json.dumps(rows[1]) + "\n"
    (folder / "bad.jsonl").write_text(bad)
    return Runs(folder, lambda words: pool(1).run(cases.run_config, words))


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_resumes_says_so_and_notes_changed_data(runs: Runs) -> None:
    first = runs.run("again", run__steps=1)
    assert "resuming" not in first and "saved" in first
    same = runs.run("again", run__steps=2)
    assert "resuming from" in same and "(step 1, written by 1 process(es))" in same
    assert "data or their order changed" not in same
    other = runs.run("again", run__steps=3, run__seed=5)
    assert "data or their order changed since that checkpoint" in other
    assert runs.steps("again") == [1, 2, 3]
    assert runs.latest("again").state["position"] == 12


def test_position_is_that_of_the_checkpoint(runs: Runs) -> None:
    """Half the batch from step 1 on: rows 4 and 5 come next, not rows 2 and 3."""
    runs.run("rebatched", run__steps=1)
    runs.run("rebatched", run__steps=2, data__global_batch_rows=2, data__micro_batch_rows=2)
    assert (runs.latest("rebatched").state["step"], runs.latest("rebatched").state["position"]) == (2, 6)


def test_nothing_to_do(runs: Runs) -> None:
    runs.run("done", run__steps=2)
    before = runs.latest("done").folder.stat().st_mtime_ns
    assert "nothing to do: step 2 of 2 is done. Raise run.steps to go on." in runs.run("done", run__steps=2)
    assert "nothing to do: step 2 of 1 is done" in runs.run("done", run__steps=1)
    assert runs.latest("done").folder.stat().st_mtime_ns == before and runs.steps("done") == [1, 2]


def test_another_model_is_refused(runs: Runs) -> None:
    runs.run("model", run__steps=1)
    message = runs.refused("model", run__steps=2, model__num_layers=3, model__rope__theta=5000.0)
    assert "cannot resume from" in message and "another model" in message
    assert "model.num_layers: 2 -> 3" in message and "model.rope" in message and "hidden_size" not in message
    assert "run.resume=never" in message and "run.name" in message
    assert runs.latest("model").state["step"] == 1


def test_never_starts_again_and_keeps_what_it_saves(runs: Runs) -> None:
    """Step 4 of the run before stays on disk, but is not what the next start goes on from."""
    runs.run("never", run__steps=4)
    started = runs.run("never", run__steps=1, run__resume="never")
    assert "resuming" not in started
    assert runs.latest("never").state["step"] == 1
    assert "(step 1, written by" in runs.run("never", run__steps=2)


def test_goes_on_from_a_named_checkpoint(runs: Runs) -> None:
    runs.run("named", run__steps=3, run__save_every=1, run__keep_last=3)
    first = runs.folder / "runs" / "named" / "checkpoints" / "step_0000001"
    said = runs.run("branch", run__steps=2, run__resume=first)
    assert f"resuming from {first} (step 1" in said
    assert runs.steps("branch") == [2]
    back = runs.run("named", run__steps=3, run__resume=first, run__save_every=1, run__keep_last=3)
    assert f"resuming from {first} (step 1" in back and runs.steps("named") == [1, 2, 3, 2, 3]


def test_a_folder_that_is_no_checkpoint_is_refused(runs: Runs) -> None:
    assert "is not a Loom checkpoint" in runs.refused("stray", run__steps=1, run__resume=runs.folder / "tokenizer")


def test_half_written_checkpoints_of_a_crash_are_removed(runs: Runs) -> None:
    folder = runs.folder / "runs" / "crashed" / "checkpoints"
    for name in ("step_0000005.building", "step_0000001.deleting"):
        (folder / name).mkdir(parents=True)
        (folder / name / "state.json").write_text("{}")
    (folder / "latest.tmp").write_text("step_00")
    assert "resuming" not in runs.run("crashed", run__steps=1)
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step_0000001"]


def test_bad_rows_that_are_put_up_with_are_written_aside(runs: Runs) -> None:
    sources = f"[{{path: {runs.folder}/bad.jsonl}}]"
    said = runs.run("bad", run__steps=1, data__sources=sources, data__max_bad_fraction=0.5, data__global_batch_rows=2,
                    data__micro_batch_rows=2)  # fmt: skip
    run = runs.folder / "runs" / "bad"
    (row,) = [json.loads(line) for line in (run / "bad_rows.jsonl").read_text().splitlines()]
    assert row["file"] == str(runs.folder / "bad.jsonl") and row["line"] == 2 and row["reason"]
    report = json.loads((run / "data_report.json").read_text())
    assert report["bad_rows"] == 1 and report["channels"][0]["samples"] == 2
    assert "1 bad row" in said


def test_the_report_is_written_also_when_the_gate_refuses(runs: Runs) -> None:
    sources = f"[{{path: {runs.folder}/bad.jsonl}}]"
    message = runs.refused("gate", run__steps=1, data__sources=sources)
    assert "bad.jsonl:2" in message and "data.max_bad_fraction" in message
    run = runs.folder / "runs" / "gate"
    assert json.loads((run / "data_report.json").read_text())["bad_rows"] == 1
    assert len((run / "bad_rows.jsonl").read_text().splitlines()) == 1
    assert list((run / "checkpoints").iterdir()) == []


def test_good_data_leave_an_empty_list_of_bad_rows(runs: Runs) -> None:
    """Also where an earlier start of the same run had some."""
    (runs.folder / "runs" / "clean").mkdir(parents=True)
    (runs.folder / "runs" / "clean" / "bad_rows.jsonl").write_text('{"file": "old"}\n')
    runs.run("clean", run__steps=1)
    assert (runs.folder / "runs" / "clean" / "bad_rows.jsonl").read_text() == ""


def test_a_vocabulary_too_small_is_refused_before_training(runs: Runs) -> None:
    message = runs.refused("vocabulary", run__steps=1, model__vocab_size=64)
    assert "model.vocab_size=64" in message and str(runs.folder / "tokenizer") in message


def test_a_run_folder_that_cannot_be_made_is_refused(runs: Runs) -> None:
    message = runs.refused("x", run__steps=1, run__dir=runs.folder / "chat.jsonl")
    assert "run.dir=" in message and "writable folder" in message


def test_a_folder_in_which_another_job_trains_is_refused(runs: Runs) -> None:
    folder = runs.folder / "runs" / "held"
    building = folder / "checkpoints" / "step_0000001.building"
    building.mkdir(parents=True)
    with open(folder / LOCK, "w") as lock:
        lock.write("process 123 on far")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        said = runs.refused("held", run__steps=1)
        assert "run.name=held" in said and "process 123 on far is still training" in said
        assert building.is_dir(), "the other job's half-written checkpoint is its own"
    assert "the only checkpoint is written at the end" in runs.run("held", run__steps=1)
    assert not building.is_dir()


def test_epochs_become_steps(runs: Runs) -> None:
    """24 rows, 4 a step: half an epoch is 3 steps; 5/12 is 2.5 steps, rounded up."""
    for name, epochs in (("half", 0.5), ("rounded", 5 / 12)):
        runs.run(name, run__steps="null", run__epochs=epochs)
        assert runs.steps(name) == [1, 2, 3]
