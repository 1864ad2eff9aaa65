"""What the run folder records of config, environment and source."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trainer import provenance


def git(folder: Path, *args: str) -> str:
    who = ["-c", "user.name=t", "-c", "user.email=t@example.com", "-c", "commit.gpgsign=false"]
    return subprocess.run(
        ["git", "-C", str(folder), *who, *args], check=True, capture_output=True, text=True
    ).stdout.strip()


def test_three_files_with_what_was_run(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "a"
    provenance.write(folder, "optim:\n  lr: 1.0e-4\n", "loss = sum / tokens", world=2)
    assert (folder / "config.yaml").read_text() == "optim:\n  lr: 1.0e-4\n"
    assert (folder / "contract.txt").read_text() == "loss = sum / tokens\n"
    facts = json.loads((folder / "environment.json").read_text())
    assert facts["world_size"] == 2
    assert facts["python"] == platform.python_version()
    assert facts["packages"]["torch"] == torch.__version__
    assert facts["packages"]["deepspeed"] == "0.19.8"
    assert facts["cpu"]["cores"] == os.cpu_count() and facts["cpu"]["model"]
    assert len(facts["gpus"]) == torch.cuda.device_count()
    assert facts["command"][1:] == sys.argv
    # Nothing half-written stays behind.
    assert sorted(path.name for path in folder.iterdir()) == ["config.yaml", "contract.txt", "environment.json"]


def test_resumed_run_keeps_the_earlier_config(tmp_path: Path) -> None:
    for yaml in ("a: 1", "a: 1", "a: 2", "a: 3"):
        provenance.write(tmp_path, yaml, "contract", world=1)
    assert (tmp_path / "config.yaml").read_text() == "a: 3\n"
    assert (tmp_path / "config.1.yaml").read_text() == "a: 1\n"
    assert (tmp_path / "config.2.yaml").read_text() == "a: 2\n"
    assert not (tmp_path / "config.3.yaml").exists()
    assert not (tmp_path / "contract.1.txt").exists()


def test_a_failed_write_leaves_the_old_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    provenance.write(tmp_path, "a: 1", "contract", world=1)

    def full(self: Path, content: bytes) -> int:
        with open(self, "wb") as half:
            half.write(content[:1])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match="No space left"):
            provenance.write(tmp_path, "a: 2", "contract", world=1)
    assert (tmp_path / "config.yaml").read_text() == "a: 1\n"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_git_commit_and_dirty_flag(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    (tmp_path / "file.py").write_text("x = 1\n")
    git(tmp_path, "add", "file.py")
    git(tmp_path, "commit", "-q", "-m", "first")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert provenance.git_state(tmp_path) == {"commit": head, "dirty": False, "changed_files": []}
    (tmp_path / "file.py").write_text("x = 2\n")
    (tmp_path / "new.py").write_text("")
    state = provenance.git_state(tmp_path)
    assert state == {"commit": head, "dirty": True, "changed_files": ["file.py", "new.py"]}
    # A copy of the source inside another repository is not that repository's commit.
    inner = tmp_path / "copy"
    inner.mkdir()
    assert provenance.git_state(inner) == {"commit": None, "reason": "the source is not the top of a git work tree"}


def test_without_repository_or_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    state = provenance.git_state(tmp_path)
    assert state["commit"] is None and "not a git repository" in str(state["reason"])
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.git_state(tmp_path) == {"commit": None, "reason": "git is not installed"}
