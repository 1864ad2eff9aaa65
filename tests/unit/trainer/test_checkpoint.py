"""Files on disk: what is found, kept, refused, and what a failed write leaves behind."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.engine import Fragment
from parallel.groups import Groups
from parallel.loss_scale import LossScale
from parallel.sharding import REPLICATED, WHOLE, Axis
from tests import checkpoint_cases
from trainer import checkpoint

ALONE = Groups(0, 1, torch.device("cpu"), Axis())


class OneWeight:
    """An engine of one parameter ``w`` [2, 3], owned by this rank."""

    def __init__(self, value: float):
        self.value = value
        self.optimizer_steps = 5
        self.loss_scale = LossScale(dynamic=True)

    def fragments(self, once: bool = True) -> Iterator[Fragment]:
        flat = torch.full((6,), self.value)
        states = {"exp_avg": flat + 1, "exp_avg_sq": flat + 2}
        yield Fragment("w", 0, flat, states, REPLICATED, WHOLE, (2, 3))


def write(folder: Path, step: int, value: float = 0.0, keep_last: int = 2) -> Path:
    engine: Any = OneWeight(value)
    state = {"position": 8 * step, "world": 1, "model": {}, "data": ""}
    return checkpoint.save(folder, step, engine, state, ALONE, keep_last)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- what is found ---------------------------------------------------------------------------------------------------


def test_a_saved_checkpoint_is_found_and_read(tmp_path: Path) -> None:
    folder = write(tmp_path, 7, value=0.5)
    assert folder == tmp_path / "step_0000007" == checkpoint.find_latest(tmp_path)
    assert names(folder) == ["rank_00000.safetensors", "state.json"]
    saved = checkpoint.Checkpoint(folder)
    assert (saved.state["step"], saved.state["position"], saved.state["optimizer_steps"]) == (7, 56, 5)
    assert torch.equal(saved.tensor("w"), torch.full((2, 3), 0.5))
    assert saved.read_range("exp_avg", "w", WHOLE, 0, 6).tolist() == [1.5] * 6
    assert saved.read_range("exp_avg_sq", "w", WHOLE, 2, 3).tolist() == [2.5] * 3


def test_nothing_is_found_in_an_empty_or_missing_folder(tmp_path: Path) -> None:
    assert checkpoint.find_latest(tmp_path) is None
    assert checkpoint.find_latest(tmp_path / "not there") is None


def test_the_marker_wins_over_a_higher_number(tmp_path: Path) -> None:
    """A run that went back to an earlier step goes on from there."""
    for step in (1, 2):
        write(tmp_path, step)
    (tmp_path / "latest").write_text("step_0000001\n")
    assert checkpoint.find_latest(tmp_path) == tmp_path / "step_0000001"


@pytest.mark.parametrize("marker", ["step_0000009\n", "", "step_0000003.building", None])
def test_a_marker_that_leads_nowhere_falls_back_to_the_newest_complete(tmp_path: Path, marker: str | None) -> None:
    for step in (1, 2):
        write(tmp_path, step)
    half = tmp_path / "step_0000003"
    half.mkdir()
    (half / "rank_00000.safetensors").write_bytes(b"")  # no state.json: not complete
    building = tmp_path / "step_0000004.building"
    building.mkdir()
    (building / "rank_00000.safetensors").write_bytes(b"")
    if marker is None:
        (tmp_path / "latest").unlink()
    else:
        (tmp_path / "latest").write_text(marker)
    assert checkpoint.find_latest(tmp_path) == tmp_path / "step_0000002"


def test_a_half_written_folder_is_never_the_latest_even_with_a_state_file(tmp_path: Path) -> None:
    building = tmp_path / "step_0000004.building"
    building.mkdir()
    (building / "state.json").write_text("{}")
    assert checkpoint.checkpoints_in(tmp_path) == [] and checkpoint.find_latest(tmp_path) is None


def test_checkpoints_are_ordered_by_number_not_by_spelling(tmp_path: Path) -> None:
    for step in (9_999_999, 10_000_000):
        write(tmp_path, step)
    (tmp_path / "latest").unlink()
    assert checkpoint.find_latest(tmp_path) == tmp_path / "step_10000000"


# ---- what is kept ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_last", [1, 2, 3])
def test_older_ones_are_removed(tmp_path: Path, keep_last: int) -> None:
    for step in range(1, 6):
        write(tmp_path, step, keep_last=keep_last)
    assert names(tmp_path) == ["latest", *(f"step_{step:07d}" for step in range(6 - keep_last, 6))]


def test_a_run_that_starts_over_does_not_lose_what_it_saves(tmp_path: Path) -> None:
    """Steps 90 and 100 lie there from before; the new run's step 10 must stay and be the latest."""
    for step in (90, 100):
        write(tmp_path, step, value=1.0)
    for step in (10, 20, 30):
        write(tmp_path, step, value=2.0)
        latest = checkpoint.find_latest(tmp_path)
        assert latest is not None and latest == tmp_path / f"step_{step:07d}"
        assert torch.equal(checkpoint.Checkpoint(latest).tensor("w"), torch.full((2, 3), 2.0))
    assert names(tmp_path) == ["latest", "step_0000020", "step_0000030", "step_0000090", "step_0000100"]


def test_an_old_one_that_cannot_be_removed_is_told_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 1)

    def failing(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise OSError(39, "Directory not empty")

    monkeypatch.setattr(checkpoint.shutil, "rmtree", failing)
    with pytest.warns(UserWarning, match=r"step_0000001 could not be removed: .*not empty"):
        write(tmp_path, 2, keep_last=1)
    assert checkpoint.checkpoints_in(tmp_path) == [tmp_path / "step_0000002"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    """Resumed from an earlier step and come back to this one: the new content counts, nothing is left over."""
    for step, value in ((1, 1.0), (2, 2.0), (2, 3.0)):
        write(tmp_path, step, value)
    assert names(tmp_path) == ["latest", "step_0000001", "step_0000002"]
    again = checkpoint.Checkpoint(tmp_path / "step_0000002")
    assert torch.equal(again.tensor("w"), torch.full((2, 3), 3.0))


def test_a_leftover_of_a_crash_does_not_get_into_the_next_checkpoint(tmp_path: Path) -> None:
    building = tmp_path / "step_0000001.building"
    building.mkdir()
    (building / "rank_00007.safetensors").write_bytes(b"old")
    assert names(write(tmp_path, 1)) == ["rank_00000.safetensors", "state.json"]


# ---- what a failed write leaves --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("step", "nth"), [(2, 1), (2, 2), (2, 3), (2, 4), (3, 1), (3, 2), (3, 3)])
def test_a_failure_at_any_point_of_completion_keeps_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, nth: int
) -> None:
    """Renames in turn: state.json, (the old step 2 aside,) the folder, the marker. Step 2 exists, step 3 does not."""
    for earlier in (1, 2):
        write(tmp_path, earlier, value=float(earlier))
    real, calls = os.replace, 0

    def failing(src: Any, dst: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == nth:
            raise OSError(28, "No space left on device")
        real(src, dst)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "replace", failing)
        with pytest.raises(ValueError, match=r"step \d could not be written.*No space left.*run\.dir"):
            write(tmp_path, step, value=9.0)
    assert not [name for name in names(tmp_path) if name.endswith(".building")]
    latest = checkpoint.find_latest(tmp_path)
    assert latest is not None and latest.name == "step_0000002"
    assert torch.equal(checkpoint.Checkpoint(tmp_path / "step_0000001").tensor("w"), torch.full((2, 3), 1.0))
    kept = checkpoint.Checkpoint(tmp_path / "step_0000002").tensor("w")
    assert torch.equal(kept, torch.full((2, 3), 2.0))
    write(tmp_path, 4, value=4.0)
    assert checkpoint.find_latest(tmp_path) == tmp_path / "step_0000004"


def test_a_small_file_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "latest"
    checkpoint.write_atomic(path, "step_0000001\n")

    def failing(fd: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(checkpoint.os, "fsync", failing)
    with pytest.raises(OSError, match="Input/output error"):
        checkpoint.write_atomic(path, "step_0000002\n")
    assert path.read_text() == "step_0000001\n"


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_one_rank_that_cannot_write_fails_the_checkpoint_on_every_rank(pool, tmp_path: Path, zero: int) -> None:
    for result in pool(2).run(checkpoint_cases.save_with_a_blocked_rank, str(tmp_path), zero):
        assert "rank 1:" in result["error"] and "step 2 could not be written" in result["error"]
        assert str(tmp_path / "step_0000001") in result["error"] and "run.dir" in result["error"]
        assert result["names"] == ["latest", "step_0000001"] and result["same"]
        assert result["latest"] == str(tmp_path / "step_0000001")
        assert result["third"] == str(tmp_path / "step_0000003")
    assert names(tmp_path) == ["latest", "step_0000001", "step_0000003"]


# ---- what is refused -------------------------------------------------------------------------------------------------


def refusal(folder: Path) -> str:
    with pytest.raises(ValueError) as refused:
        checkpoint.Checkpoint(folder)
    return str(refused.value)


@pytest.mark.parametrize("content", [b'{"format": 1, "st', b"", b"\xff\xfe\x00", b"[1, 2]", b"{}", b'"text"'])
def test_a_corrupt_state_file_is_refused(tmp_path: Path, content: bytes) -> None:
    folder = write(tmp_path, 1)
    (folder / "state.json").write_bytes(content)
    message = refusal(folder)
    assert str(folder) in message and ("step_*" in message or "run.resume" in message)


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    assert "not a Loom checkpoint" in refusal(tmp_path)


def test_another_format_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path, 1)
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | {"format": 99}))
    message = refusal(folder)
    assert "format 99" in message and "reads 2" in message and "run.resume=never" in message


def test_a_missing_rank_file_is_told_at_once(tmp_path: Path) -> None:
    """Before the data are read: the folder names its files when it is opened."""
    cut = {"shard": dataclasses.asdict(REPLICATED), "tp": 1, "ep": 1}
    tensors = {"a": cut | {"shape": [2], "pieces": [[0, 0, 0, 1], [1, 0, 1, 1]]}}
    (tmp_path / "state.json").write_text(json.dumps({"format": checkpoint.FORMAT, "step": 1, "tensors": tensors}))
    (tmp_path / "rank_00000.safetensors").touch()
    with pytest.raises(ValueError, match=r"rank_00001\.safetensors missing.*run\.resume=PATH"):
        checkpoint.Checkpoint(tmp_path)
