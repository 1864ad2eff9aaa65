"""The closing table of a run, against numbers worked out by hand."""

import pytest
import summary

from trainer.logging import history


def write(run_dir, rows):
    lines = [history.encode(kind, step, 1.0, metrics) for kind, step, metrics in rows]
    (run_dir / history.FILE_NAME).write_text("\n".join(lines) + "\n")
    return history.read(run_dir)


def train(step, loss, tokens, **channels):
    metrics = {"train/loss": loss, "channel/a/loss": loss, "channel/a/tokens": float(tokens)}
    return "train", step, metrics | {name.replace("__", "/"): value for name, value in channels.items()}


def test_first_and_last_quarter_are_weighted_by_tokens(tmp_path):
    losses_tokens = [(4.0, 1), (2.0, 3), (9.0, 5), (9.0, 5), (9.0, 5), (9.0, 5), (1.0, 10), (3.0, 30)]
    run = write(tmp_path, [train(step, *pair) for step, pair in enumerate(losses_tokens, start=1)])
    channel = summary.table(run)[0]
    assert channel.first == pytest.approx((4.0 * 1 + 2.0 * 3) / 4)  # 2.5
    assert channel.last == pytest.approx((1.0 * 10 + 3.0 * 30) / 40)  # 2.5
    assert channel.tokens == 64
    assert channel.held_out is None and channel.held_out_before is None
    assert "held out" not in summary.render(run)


def test_held_out_before_is_the_evaluation_of_step_zero_only(tmp_path):
    evaluation = {"eval/loss": 3.0, "eval/a/loss": 3.0}
    better = {"eval/loss": 1.5, "eval/a/loss": 1.5}
    run = write(tmp_path, [("eval", 0, evaluation), train(1, 2.0, 1), ("eval", 1, better)])
    assert [(line.held_out_before, line.held_out) for line in summary.table(run)] == [(3.0, 1.5), (3.0, 1.5)]
    assert "-50 %" in summary.render(run)
    late = write(tmp_path, [train(1, 2.0, 1), ("eval", 1, better)])
    assert [(line.held_out_before, line.held_out) for line in summary.table(late)] == [(None, 1.5), (None, 1.5)]


def test_a_channel_that_appears_late_has_no_first(tmp_path):
    rows = [train(step, 2.0, 1) for step in range(1, 8)]
    rows.append(train(8, 2.0, 1, channel__b__loss=5.0, channel__b__tokens=2.0))
    late = summary.table(write(tmp_path, rows))[1]
    assert (late.name, late.first, late.last) == ("b", None, 5.0)


def test_a_folder_that_is_no_run_is_a_message(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["summary.py", str(tmp_path / "nothing")])
    assert summary.main() == 1
    assert "no such folder" in capsys.readouterr().err
