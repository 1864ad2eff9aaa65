"""The run log with real files: what was logged is read back from each sink."""

from __future__ import annotations

import io
import json
import math
import os
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.errors import CommError

from trainer.logging import history
from trainer.logging.boards import BackgroundBoard
from trainer.logging.config import LogConfig
from trainer.logging.files import GrowingFile
from trainer.logging.log import NullLog, RunLog

QUIET = LogConfig(wandb="disabled", tensorboard=False)


def metrics_of(step: int) -> dict[str, float]:
    return {"train/loss": 3.0 - 0.1 * step, "channel/code/loss": 1.5 * step, "perf/tokens_per_s": 1000.0}


def run(folder: Path, cfg: LogConfig, steps: range, resume_step: int = 0, offset: float = 0.0) -> str:
    """Log ``steps`` into ``folder``; returns what a pipe saw."""
    out = io.StringIO()
    log = RunLog(folder, cfg, "my run", {"seed": 0}, 10, resume_step, stream=out)
    for step in steps:
        log.step(step, {name: value + offset for name, value in metrics_of(step).items()})
    log.close("done")
    return out.getvalue()


@pytest.fixture
def no_wandb_login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No key anywhere, and no address to send one to, whoever runs the tests."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "no-config"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")


def test_metrics_file_has_one_strict_json_object_per_call(tmp_path: Path) -> None:
    log = RunLog(tmp_path, QUIET, "r", {}, 10, 0, stream=io.StringIO())
    log.step(1, metrics_of(1))
    # Flushed at once: readable while the run goes on.
    first = json.loads((tmp_path / "metrics.jsonl").read_text())
    log.evaluation(1, {"eval/loss": math.nan, "eval/perplexity": math.inf})
    log.close()
    assert first.pop("time") > 1.6e9
    assert first == {"kind": "train", "step": 1, **metrics_of(1)}
    second = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[1], parse_constant=pytest.fail)
    assert (second["kind"], second["eval/loss"], second["eval/perplexity"]) == ("eval", "NaN", "Infinity")
    steps, values = history.read(tmp_path).series("eval/loss")
    assert steps == [1] and math.isnan(values[0])
    assert history.read(tmp_path).series("eval/perplexity") == ([1], [math.inf])


def test_resumed_run_supersedes_what_it_repeats(tmp_path: Path) -> None:
    run(tmp_path, QUIET, range(1, 7))
    run(tmp_path, QUIET, range(5, 6), resume_step=4, offset=100.0)
    steps, losses = history.read(tmp_path).series("train/loss")
    assert steps == [1, 2, 3, 4, 5]
    assert losses == pytest.approx([2.9, 2.8, 2.7, 2.6, 102.5], abs=1e-12)
    # Append-only: the first life is still in the file.
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 6 + 1 + 1


def test_a_run_that_starts_over_leaves_nothing_of_the_one_before(tmp_path: Path) -> None:
    cfg = LogConfig(wandb="disabled", tensorboard=True)
    run(tmp_path, cfg, range(1, 7))
    run(tmp_path, cfg, range(1, 4), offset=100.0)
    steps, losses = history.read(tmp_path).series("train/loss")
    assert steps == [1, 2, 3], "steps of the longer run before are not part of this one"
    assert losses == pytest.approx([102.9, 102.8, 102.7], abs=1e-12)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3]


def test_half_line_of_a_killed_run_costs_only_itself(tmp_path: Path) -> None:
    run(tmp_path, QUIET, range(1, 3))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    run(tmp_path, QUIET, range(2, 4), resume_step=1)
    with pytest.warns(UserWarning, match=r"metrics\.jsonl:2: not a metrics line"):
        found = history.read(tmp_path)
    assert found.series("train/loss")[0] == [1, 2, 3]
    # The new life begins on a line of its own.
    assert [json.loads(line)["kind"] for line in path.read_text().splitlines()[2:]] == ["resume", "train", "train"]


@pytest.mark.parametrize(
    ("content", "says"), [(None, "no such folder"), ("absent", r"has no metrics\.jsonl"), ("", "holds no metrics yet")]
)
def test_reading_a_folder_that_is_no_run(tmp_path: Path, content: str | None, says: str) -> None:
    folder = tmp_path / "run"
    if content is not None:
        folder.mkdir()
    if content == "":
        (folder / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match=says):
        history.read(folder)


def test_full_disk_keeps_every_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = GrowingFile(tmp_path / "x.txt")
    file.line("first")
    write = os.write
    answers = iter([5, None])  # five bytes fit, then the disk is full

    def full(fd: int, data: bytes) -> int:
        fits = next(answers)
        if fits is None:
            raise OSError(28, "No space left on device")
        return write(fd, data[:fits])

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        with pytest.warns(UserWarning, match="No space left"):
            file.line("second line")
    assert (tmp_path / "x.txt").read_text() == "first\nsecon"
    file.line("third")
    file.close()
    assert (tmp_path / "x.txt").read_text() == "first\nsecond line\nthird\n"


def test_pipe_and_log_file_get_the_same_plain_lines(tmp_path: Path) -> None:
    out = run(tmp_path, QUIET, range(1, 4))
    text = (tmp_path / "log.txt").read_text()
    lines = out.splitlines()
    assert len(lines) == 4 and lines[0].startswith("step  1/10  loss 2.9000  [code 1.5000]") and lines[-1] == "done"
    # "2026-01-31 12:34:56  " stands before each line of the file.
    assert [line[21:] for line in text.splitlines()] == lines
    assert "\x1b" not in out + text and "\r" not in out + text


class FakeTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_terminal_has_a_bar_below_lines_that_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "70")
    out = FakeTerminal()
    log = RunLog(tmp_path, QUIET, "r", {}, 10, 4, stream=out)
    log.advance(5)
    many = {f"channel/name{i}/loss": float(i) for i in range(9)}
    log.step(6, {"train/loss": math.nan, **many, "train/lr": 1e-4})
    log.note("a word")
    log.close("done")
    pieces = [piece.strip() for piece in out.getvalue().replace("\r", "\n").split("\n")]
    bars = [piece for piece in pieces if "steps" in piece]
    lines = [piece for piece in pieces if piece and piece not in bars]
    assert lines == ["step  6/10  loss NAN  [name0 0.0000  name1 1.0000  +7]  lr 1.00e-04", "a word", "done"]
    assert any("4/10 steps" in bar for bar in bars) and any("60%" in bar and "6/10 steps" in bar for bar in bars)
    assert "+7" not in (tmp_path / "log.txt").read_text()
    assert "\x1b" not in (tmp_path / "log.txt").read_text()


class ClosedPipe(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


def test_a_closed_pipe_does_not_end_the_run(tmp_path: Path) -> None:
    log = RunLog(tmp_path, QUIET, "r", {}, 10, 0, stream=ClosedPipe())
    with pytest.warns(UserWarning, match="Broken pipe"):
        log.step(1, metrics_of(1))
    log.step(2, metrics_of(2))
    log.close()
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 2


def test_tensorboard_is_read_back_with_the_resume_point(tmp_path: Path) -> None:
    cfg = LogConfig(wandb="disabled", tensorboard=True)
    run(tmp_path, cfg, range(1, 7))
    run(tmp_path, cfg, range(5, 6), resume_step=4, offset=100.0)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == set(metrics_of(1))
    found = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert [step for step, _ in found] == [1, 2, 3, 4, 5]
    assert found[-1][1] == pytest.approx(102.5, rel=1e-6)  # stored as fp32


def wandb_record(folder: Path, last_word: bytes) -> bytes:
    """The one offline record below ``folder``; wandb's service writes it out a moment after finish() has returned."""
    [path] = folder.glob("run-*.wandb")
    deadline = time.monotonic() + 10
    while last_word not in (found := path.read_bytes()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return found


def wandb_folders(folder: Path) -> list[Path]:
    return sorted((folder / "wandb").glob("offline-run-*"))


@pytest.mark.usefixtures("no_wandb_login")
def test_wandb_offline_writes_one_run_that_a_resume_goes_on_with(tmp_path: Path) -> None:
    cfg = LogConfig(wandb="offline", project="my-project", tensorboard=False)
    run(tmp_path, cfg, range(1, 4))
    run_id = (tmp_path / "wandb" / "run_id").read_text().strip()
    [first] = wandb_folders(tmp_path)
    recorded = wandb_record(first, last_word=b"train/loss")
    assert (first / f"run-{run_id}.wandb").is_file()
    for word in (b"my-project", b"my run", b"train/loss", b"channel/code/loss", b"seed"):
        assert word in recorded, word
    run(tmp_path, cfg, range(4, 5), resume_step=3)
    assert (tmp_path / "wandb" / "run_id").read_text().strip() == run_id
    records = [path.name for folder in wandb_folders(tmp_path) for path in folder.glob("run-*.wandb")]
    assert records == [f"run-{run_id}.wandb"] * 2
    run(tmp_path, cfg, range(1, 2))  # started over: another curve, so another run
    assert (tmp_path / "wandb" / "run_id").read_text().strip() != run_id


def test_disabled_boards_make_nothing(tmp_path: Path) -> None:
    run(tmp_path, QUIET, range(1, 3))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.txt", "metrics.jsonl"]
    with pytest.warns(UserWarning, match=r"log\.entity=me is ignored"):
        RunLog(tmp_path, LogConfig(wandb="disabled", entity="me", tensorboard=False), "r", {}, 1, 0).close()


@pytest.mark.usefixtures("no_wandb_login")
def test_online_without_login_goes_on_offline(tmp_path: Path) -> None:
    out = run(tmp_path, LogConfig(wandb="online", tensorboard=False), range(1, 4))
    assert "wandb: not online (no login; run `wandb login` once); going on offline" in out
    assert len(wandb_folders(tmp_path)) == 1
    assert len(history.read(tmp_path).rows) == 3


@pytest.mark.usefixtures("no_wandb_login")
def test_online_without_server_goes_on_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = wandb.init

    def unreachable(**options: Any) -> object:
        if options["mode"] == "online":
            raise CommError("Run initialization has timed out after 30.0 sec.")
        return start(**options)

    monkeypatch.setattr(wandb, "login", lambda prompt: True)
    monkeypatch.setattr(wandb, "init", unreachable)
    out = run(tmp_path, LogConfig(wandb="online", tensorboard=False), range(1, 3))
    assert "wandb: not online (Run initialization has timed out" in out
    [folder] = wandb_folders(tmp_path)
    assert b"train/loss" in wandb_record(folder, last_word=b"train/loss")


class BrokenBoard:
    def write(self, step: int, metrics: object) -> None:
        raise RuntimeError("the server said 500")

    def close(self, failed: bool) -> None:
        raise AssertionError("never reached")


def test_a_board_that_breaks_is_reported_and_left_out() -> None:
    heard: list[str] = []
    board = BackgroundBoard("board", BrokenBoard, heard.append)
    board.write(1, {"train/loss": 1.0})
    board.write(2, {"train/loss": 1.0})
    assert board.close(failed=False, timeout=10)
    assert heard == ["board: switched off (RuntimeError: the server said 500); metrics.jsonl goes on"]


def test_error_inside_the_run_is_said_and_the_log_closed(tmp_path: Path) -> None:
    out = io.StringIO()
    with pytest.raises(ValueError, match="bad data"), RunLog(tmp_path, QUIET, "r", {}, 10, 0, stream=out) as log:
        log.step(1, metrics_of(1))
        raise ValueError("bad data")
    log.close("a second close says nothing")
    assert out.getvalue().splitlines()[-1] == "stopped: bad data"


def test_null_log_touches_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = NullLog()
    log.step(1, {})
    log.advance(1)
    log.evaluation(1, {})
    log.note("x")
    log.close("y")
    assert capsys.readouterr().out == "" and not list(tmp_path.iterdir())


def test_config_problems_name_key_value_and_way_out() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert LogConfig().problems() == []
    wrong: dict[str, Any] = {"every": 0, "wandb": "on", "project": "a/b", "entity": " "}
    bad = LogConfig(**wrong)
    found = bad.problems()
    assert [(key, value) for key, value, _, _ in found] == [
        ("log.every", 0),
        ("log.wandb", "on"),
        ("log.project", "a/b"),
        ("log.entity", " "),
    ]
    assert [way for *_, way in found] == ["log.every=1", "log.wandb=offline", "log.project=loom", "log.entity=null"]
    assert [key for key, *_ in LogConfig(project="x" * 129).problems()] == ["log.project"]
    assert [key for key, *_ in LogConfig(project="").problems()] == ["log.project"]
