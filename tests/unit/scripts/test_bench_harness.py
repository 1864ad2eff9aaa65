"""The benchmark harness: its arithmetic by hand, and turns played by a toy contender in its own process."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import pytest

from scripts.bench.harness import Contender, Record, append_results, compete, median_ratio, table
from scripts.bench.turns import Schedule, Turn, Turns

TOY = """
    import sys, time
    from scripts.bench.turns import Turns, parse_args

    args, schedule = parse_args()
    turns = Turns(args.address, schedule)
    for step in range(schedule.total):
        BODY
        turns.step(10, float(step))
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Makes a contender whose step does what it is told; returns the contender."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def make(name: str, body: str) -> Contender:
        (tmp_path / f"toy_{name}.py").write_text(textwrap.dedent(TOY).replace("BODY", body))
        return Contender(name, f"toy_{name}")

    return make


def a_turn(rank: int, tokens: int, cpu_s: float, wall_s: float, peak_mib: float = 100.0, loss: float = 1.0) -> Turn:
    return Turn(rank, tokens, cpu_s, wall_s, peak_mib, loss)


def test_rates_add_tokens_and_cpu_over_processes_and_take_the_slowest_wall() -> None:
    record = Record(Contender("x", "m", processes=2))
    record.rounds.append([a_turn(0, 100, 1.0, 4.0, 300.0, 2.0), a_turn(1, 200, 2.0, 5.0, 310.0, 4.0)])
    assert record.tokens_per_cpu_s() == [100.0]
    assert record.tokens_per_wall_s() == [60.0]
    assert record.peak_mib() == 310.0
    assert record.loss() == 3.0


def test_ratio_is_taken_round_by_round() -> None:
    # A machine that halves its speed in round 2 leaves the ratio alone; the ratio of the medians would be 1.5.
    assert median_ratio([200.0, 100.0, 300.0], [100.0, 50.0, 300.0]) == 2.0


def test_table_holds_the_ratio_to_the_first() -> None:
    base, other = Record(Contender("base", "m")), Record(Contender("other", "m"))
    base.rounds = [[a_turn(0, 100, 1.0, 1.0)]]
    other.rounds = [[a_turn(0, 100, 0.8, 2.0)]]
    row = table([base, other]).splitlines()[2].split()
    assert row[0] == "other"
    assert row[2] == "125"
    assert "1.250" in row
    assert "0.500" in row


def test_results_are_appended_with_every_turn(tmp_path: Path) -> None:
    record = Record(Contender("x", "m"), [[a_turn(0, 5, 1.0, 1.0)]])
    for _ in range(2):
        append_results(tmp_path / "new" / "x.jsonl", "bench", Schedule(1, 1, 1), [record])
    lines = [json.loads(line) for line in (tmp_path / "new" / "x.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    assert lines[0]["contenders"][0]["rounds"][0][0]["tokens"] == 5


def test_warm_up_does_not_count(capsys: pytest.CaptureFixture[str]) -> None:
    turns = Turns(None, Schedule(warmup=2, rounds=2, steps=3))
    for step in range(8):
        turns.step(10, float(step))
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition("(")[0] for line in lines] == ["Ready", "Turn", "Turn"]
    assert all("tokens=30" in line for line in lines[1:])
    assert "loss=4.0" in lines[1]
    assert "loss=7.0" in lines[2]


def test_contenders_take_turns_and_their_cpu_is_their_own(toy) -> None:
    sleeps = toy("sleeps", "time.sleep(0.2)")
    works = toy("works", "end = time.process_time() + 0.2\n    while time.process_time() < end: pass")
    records = compete([sleeps, works], Path("unused"), Schedule(warmup=1, rounds=2, steps=2))
    for record in records:
        assert [turn[0].tokens for turn in record.rounds] == [20, 20]
        assert [turn[0].loss for turn in record.rounds] == [2.0, 4.0]
        assert all(turn[0].wall_s >= 0.4 for turn in record.rounds)
    # Sleeping costs nothing although it takes as long; waiting for the other's turn costs neither.
    assert all(turn[0].cpu_s < 0.1 for turn in records[0].rounds)
    assert all(0.4 <= turn[0].cpu_s < 0.5 for turn in records[1].rounds)


@pytest.mark.parametrize("when", ["step == 0", "step == 3"])
def test_a_contender_that_dies_is_named_with_its_last_words(toy, when: str) -> None:
    dies = toy("dies", f"if {when}: sys.exit('no more strength')")
    with pytest.raises(RuntimeError, match=r"(?s)contender 'dies'.*no more strength"):
        compete([dies], Path("unused"), Schedule(warmup=2, rounds=2, steps=1))
