"""Golden lines of the terminal, and the remaining time."""

from __future__ import annotations

import math

import pytest

from trainer.logging.line import Eta, duration, eval_line, step_line

FULL = {
    "train/loss": 2.34567,
    "train/grad_norm": 0.8421,
    "train/lr": 0.00012345,
    "channel/code/loss": 1.2,
    "channel/code/tokens": 900.0,
    "channel/math/loss": 2.11119,
    "channel/chat/loss": 3.0,
    "perf/tokens_per_s": 1234.4,
    "perf/tflops": 0.0852,
    "perf/memory_gib": 0.71,
}


def test_golden_step_line() -> None:
    assert step_line(7, 2000, FULL, 750.0) == (
        "step    7/2000  loss 2.3457  [code 1.2000  math 2.1112  chat 3.0000]  norm 0.842  lr 1.23e-04"
        "  1,234 tok/s  85.2 GFLOP/s  mem 0.7G  left 12m30s"
    )


@pytest.mark.parametrize(
    ("width", "line"),
    [
        (
            128,
            "step    7/2000  loss 2.3457  [code 1.2000  +2]  norm 0.842  lr 1.23e-04  1,234 tok/s  85.2 GFLOP/s"
            "  mem 0.7G  left 12m30s",
        ),
        (
            112,
            "step    7/2000  loss 2.3457  [+3]  norm 0.842  lr 1.23e-04  1,234 tok/s  85.2 GFLOP/s  mem 0.7G"
            "  left 12m30s",
        ),
        (79, "step    7/2000  loss 2.3457  norm 0.842  lr 1.23e-04  1,234 tok/s  left 12m30s"),
        (45, "step    7/2000  loss 2.3457  left 12m30s"),
        (10, "step    7/2000  loss 2.3457"),
    ],
)
def test_narrow_terminals_lose_the_least_important(width: int, line: str) -> None:
    assert step_line(7, 2000, FULL, 750.0, width) == line
    assert len(line) <= width or width == 10


@pytest.mark.parametrize("width", range(40, 200, 7))
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    wide = {**FULL, **{f"channel/詩{i}/loss": 1.0 for i in range(30)}}
    columns = sum(2 if char == "詩" else 1 for char in step_line(7, 2000, wide, 750.0, width))
    assert columns <= width


def test_mfu_replaces_flops_and_large_numbers_are_short() -> None:
    line = step_line(1, 9, {"perf/mfu": 0.4123, "perf/tflops": 407.0, "perf/tokens_per_s": 123456.0}, None)
    assert line == "step 1/9  123.5k tok/s  MFU 41.2%"
    assert step_line(1, 9, {"perf/tflops": 407.04, "perf/tokens_per_s": 2.5e7}, None) == (
        "step 1/9  25.0M tok/s  407.0 TFLOP/s"
    )


def test_what_is_not_finite_is_shown_plainly() -> None:
    assert step_line(1, 9, {"train/loss": math.nan, "channel/a/loss": math.inf}, None) == "step 1/9  loss NAN  [a INF]"


def test_control_characters_of_a_name_do_not_reach_the_terminal() -> None:
    assert step_line(1, 9, {"channel/a\x1b[2J\n/loss": 1.0}, None) == "step 1/9  [a?[2J? 1.0000]"


def test_golden_eval_line() -> None:
    metrics = {"eval/loss": 2.0, "eval/perplexity": math.exp(2.0), "eval/code/loss": 1.5, "eval/code/perplexity": 4.48}
    assert eval_line(10, 200, metrics) == "eval  10/200  loss 2.0000  ppl 7.389  [code 1.5000]"


def test_eta_ignores_the_first_step_and_stalls() -> None:
    eta = Eta(total_steps=100)
    assert eta.seconds_left() is None
    eta.observe(1, now=60.0)  # a minute of compilation before the first step ends
    assert eta.seconds_left() is None
    now = 60.0
    for step in range(2, 11):
        now += 500.0 if step == 5 else 2.0  # one stall
        eta.observe(step, now)
    assert eta.seconds_left() == pytest.approx(90 * 2.0)
    eta.observe(20, now + 10 * 2.0)  # ten steps in one logged interval
    assert eta.seconds_left() == pytest.approx(80 * 2.0)
    eta.observe(100, now + 200.0)
    assert eta.seconds_left() == 0


def test_eta_after_resume_counts_from_the_first_step_it_sees() -> None:
    eta = Eta(total_steps=100)
    eta.observe(91, now=30.0)
    eta.observe(92, now=33.0)
    assert eta.seconds_left() == pytest.approx(8 * 3.0)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (59.6, "1m00s"), (750, "12m30s"), (11100, "3h05m"), (187200, "2d04h"), (-3, "0s")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
