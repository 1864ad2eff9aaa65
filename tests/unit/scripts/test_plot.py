"""The plot command on run folders written by the run log itself."""

from __future__ import annotations

import base64
import io
import math
import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib import colors, pyplot
from PIL import Image

from scripts import plot
from trainer.logging.config import LogConfig
from trainer.logging.history import read
from trainer.logging.log import RunLog

CHANNELS = ("chat", "code", "cost in $", "math")


def make_run(folder: Path, offset: float = 0.0, steps: int = 40) -> Path:
    log = RunLog(folder, LogConfig(wandb="disabled", tensorboard=False), "r", {}, steps, 0, stream=io.StringIO())
    for step in range(1, steps + 1):
        losses = {f"channel/{name}/loss": 2.0 + offset + 5 / (step + i) for i, name in enumerate(CHANNELS)}
        loss = math.nan if step == 20 else 3.0 + offset + 5 / step
        log.step(
            step,
            {"train/loss": loss, **losses, "train/lr": 1e-4, "train/grad_norm": 1e3 / step, "perf/tokens_per_s": 900.0},
        )
    log.evaluation(steps, {"eval/loss": 3.5 + offset, "eval/chat/loss": 2.5})
    log.close()
    return folder


def colour_share(image: np.ndarray, colour: str) -> float:
    """Share of pixels close to ``colour``."""
    wanted = 255 * np.array(colors.to_rgb(colour))
    return float((np.abs(image.astype(float) - wanted).max(axis=2) < 12).mean())


def test_png_of_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "a")
    assert plot.main([str(run)]) == 0
    image = np.asarray(Image.open(run / "plot.png").convert("RGB"))
    assert image.shape[1] == 1690 and image.shape[0] > 1000
    assert colour_share(image, "#ffffff") > 0.8  # a plot, not a blot
    assert colour_share(image, plot._COLOURS[0]) > 1e-3
    assert colour_share(image, plot._COLOURS[1]) < 1e-5  # no second run
    assert colour_share(image, "#CC0000") > 1e-6  # the loss that was not finite
    words = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["a", "training", "1-40", "8.0000", "3.1250"] in words
    assert ["a", "code", "1-40", "4.5000", f"{2 + 5 / 41:.4f}"] in words
    assert ["a", "held", "out", "40-40", "3.5000", "3.5000"] in words


def test_html_is_one_page_that_compares_two_runs(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b<i>", offset=0.5)]
    out = tmp_path / "deep" / "compare.html"
    assert plot.main([*map(str, runs), "--out", str(out), "--smooth", "0.5"]) == 0
    page = out.read_text()
    assert "b&lt;i&gt;" in page and "b<i>" not in page
    assert not re.search(r'(src|href)="(?!data:)', page)  # needs no other file
    found = re.search(r"data:image/png;base64,([^\"]+)", page)
    assert found is not None
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(found[1]))).convert("RGB"))
    assert min(colour_share(image, colour) for colour in plot._COLOURS[:2]) > 1e-3


def test_every_panel_is_labelled_and_every_channel_drawn(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", offset=0.5)]
    figure = plot.draw([read(run) for run in runs], ["a", "b"])
    panels = {axes.get_title(loc="left"): axes for axes in figure.axes}
    assert set(panels) == {
        "Loss",
        "Throughput",
        "Channel chat",
        "Channel code",
        r"Channel cost in \$",
        "Channel math",
        "Gradient norm",
        "Learning rate",
        "Memory",
    }
    assert all(axes.get_xlabel() == "step" and axes.get_ylabel() for axes in figure.axes)
    assert [text.get_text() for text in panels["Memory"].texts] == ["not measured"]
    assert panels["Gradient norm"].get_yscale() == "linear"  # 1000 to 25: less than two decades
    drawn = panels["Channel code"].get_lines()
    assert [np.asarray(line.get_ydata())[0] for line in drawn] == [4.5, 5.0]
    legend = panels["Loss"].get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["a", "not finite", "a, held out", "b", "b, held out"]
    pyplot.close(figure)


def make_rl_run(folder: Path, steps: int = 12) -> Path:
    log = RunLog(folder, LogConfig(wandb="disabled", tensorboard=False), "r", {}, steps, 0, stream=io.StringIO())
    for step in range(1, steps + 1):
        rewards = {"rollout/reward": step / steps, "channel/add/reward": 0.5, "channel/add/loss": 0.0}
        parts = {"rollout/reward/exact": 0.25, "rollout/reward/form": 1.0, "rollout/length": 5.0 + step}
        log.step(step, rewards | parts | {"train/loss": 0.0, "train/entropy": 1.0 / step, "train/lr": 1e-4})
    log.evaluation(steps, {"eval/reward": 0.75, "eval/add/reward": 0.5, "eval/reward/exact": 0.125})
    log.close()
    return folder


def test_of_reinforcement_learning_the_reward_and_its_parts_are_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_rl_run(tmp_path / "rl")
    figure = plot.draw([read(run)], ["rl"])
    panels = {axes.get_title(loc="left"): axes for axes in figure.axes}
    own = ["Reward: exact", "Reward: form", "Length of answers", "Entropy"]
    assert list(panels) == ["Reward", "Throughput", "Channel add", *own, "Gradient norm", "Learning rate", "Memory"]
    drawn = [np.asarray(line.get_ydata()) for line in panels["Reward"].get_lines()]
    assert drawn[0][-1] == 1.0 and drawn[1].tolist() == [0.75]
    assert [np.asarray(line.get_ydata())[-1] for line in panels["Reward: exact"].get_lines()] == [0.25, 0.125]
    pyplot.close(figure)
    assert plot.main([str(run)]) == 0
    words = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert words[0] == ["run", "reward", "of", "steps", "first", "last"]
    assert ["rl", "held", "out", "12-12", "0.7500", "0.7500"] in words
    both = [read(run), read(make_run(tmp_path / "sft"))]
    assert plot.goal_of(both).name == "loss", "what they have in common"


def test_smoothing_by_hand() -> None:
    # Weight 0.5: averages of (2), (2, 4) with weights 1:2, then NaN passed through, then (2, 4, 8) with 1:2:4.
    found = plot.smooth([2.0, 4.0, math.nan, 8.0], 0.5)
    assert found[:2] == pytest.approx([2.0, (2 + 2 * 4) / 3])
    assert math.isnan(found[2])
    assert found[3] == pytest.approx((2 + 2 * 4 + 4 * 8) / 7)
    assert plot.smooth([2.0, 4.0], 0.0) == [2.0, 4.0]


def test_runs_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    assert plot.run_names([tmp_path / "x" / "run", tmp_path / "y" / "run"]) == ["x/run", "y/run"]
    assert plot.run_names([tmp_path / "x" / "run", tmp_path / "y" / "walk"]) == ["run", "walk"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["{tmp}/nothing"], "no such folder"),
        (["{tmp}/empty"], "has no metrics.jsonl"),
        (["{tmp}/a", "--out", "{tmp}/x.gif"], "is a .png or a .html file"),
        (["{tmp}/a", "--smooth", "1"], "--smooth 1.0: a weight lies in [0, 1)"),
    ],
)
def test_mistakes_end_with_a_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    (tmp_path / "empty").mkdir()
    make_run(tmp_path / "a", steps=2)
    assert plot.main([argument.format(tmp=tmp_path) for argument in arguments]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("plot.py: ") and says in shown and len(shown.splitlines()) == 1
