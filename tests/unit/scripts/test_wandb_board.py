"""The board's content, and the same content in the objects of wandb's workspace library."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
import wandb

from scripts import wandb_board
from trainer.logging.config import LogConfig
from trainer.logging.log import RunLog


def metrics_on(spec: dict) -> list[str]:
    return [metric for section in spec["sections"] for panel in section["panels"] for metric in panel["metrics"]]


def test_dry_run_has_every_channel_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(tmp_path, LogConfig(wandb="disabled", tensorboard=False), "r", {}, 2, 0, stream=io.StringIO())
    log.step(1, {"train/loss": 1.0, "channel/code/loss": 1.0, "channel/code/tokens": 5.0})
    log.step(2, {"train/loss": 1.0, "channel/a b/c/loss": 1.0})
    log.close()
    assert wandb_board.main(["--project", "p", "--run", str(tmp_path), "--dry-run"]) == 0
    spec = json.loads(capsys.readouterr().out)
    assert (spec["project"], spec["x"]) == ("p", "step")
    for name in ("code", "a b/c"):
        assert {f"channel/{name}/loss", f"channel/{name}/tokens", f"eval/{name}/loss"} <= set(metrics_on(spec))
    fixed = {"train/loss", "train/grad_norm", "train/lr", "eval/loss", "eval/perplexity", "perf/tokens_per_s"}
    assert fixed | {"perf/memory_gib", "perf/tflops", "perf/mfu"} <= set(metrics_on(spec))


def test_workspace_library_gets_the_same_panels() -> None:
    sections = wandb_board.board(["code", "math"])
    workspace = wandb_board.to_workspace(sections, "p", "me")
    assert (workspace.entity, workspace.project) == ("me", "p")
    assert [section.name for section in workspace.sections] == [section.name for section in sections]
    panels = [panel for section in workspace.sections for panel in section.panels]
    assert [tuple(panel.y) for panel in panels] == [panel.metrics for section in sections for panel in section.panels]
    assert {panel.x for panel in panels} == {"step"}
    for section in workspace.sections:
        # All panels of a section on one page.
        assert section.layout_settings.columns * section.layout_settings.rows >= len(section.panels)


def test_a_board_without_channels_has_no_empty_section() -> None:
    workspace = wandb_board.to_workspace(wandb_board.board([]), "p", "me")
    assert [section.name for section in workspace.sections] == ["Loss", "Held out", "Throughput and memory"]


def test_saving_returns_the_address(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from wandb_workspaces import workspaces

    saved: list[workspaces.Workspace] = []

    class Saved(workspaces.Workspace):
        def save(self) -> Saved:
            saved.append(self)
            return self

        @property
        def url(self) -> str:
            return "https://example.com/board"

    monkeypatch.setattr(wandb, "login", lambda prompt: True)
    monkeypatch.setattr(workspaces, "Workspace", Saved)
    assert wandb_board.main(["--project", "p", "--entity", "me", "--channels", "code, math"]) == 0
    assert capsys.readouterr().out == "wandb board: https://example.com/board\n"
    assert "Channels" in [section.name for section in saved[0].sections]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "which channels?"),
        (["--channels", " ,"], "names no channel"),
        (["--channels", "a,b,a"], "a is named twice"),
        (["--run", "no/such/run"], "no such folder"),
    ],
)
def test_mistakes_end_with_a_message(capsys: pytest.CaptureFixture[str], arguments: list[str], says: str) -> None:
    assert wandb_board.main(["--project", "p", *arguments]) == 2
    assert says in capsys.readouterr().err


def test_missing_login_and_missing_package(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(wandb, "login", lambda prompt: False)
    assert wandb_board.main(["--project", "p", "--channels", "a"]) == 2
    assert "run `wandb login` once" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    assert wandb_board.main(["--project", "p", "--channels", "a"]) == 2
    assert "pip install wandb wandb-workspaces" in capsys.readouterr().err
