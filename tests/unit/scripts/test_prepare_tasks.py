"""Prompts from reasoning-gym: rows that its own verifier scores after a way through a file, and the reward of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import prepare_tasks
import pytest

from data.prompt import Prompt
from trainer.rollout.reward_functions import reasoning_gym


def command(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["prepare_tasks.py", *words])
    return prepare_tasks.main()


def test_rows_are_prompts_with_their_verifier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, words = tmp_path / "deep" / "products.jsonl", ["--size", "4", "min_digits=1", "max_digits=1", "max_terms=2"]
    assert command(monkeypatch, "products", "--out", str(out), *words) == 0
    made = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(made) == 4
    for row in made:
        (turn,) = row["messages"]
        assert turn["role"] == "user" and turn["content"].endswith("Give the answer as <answer>...</answer>.")
        factors = row["reasoning_gym"]["metadata"]["expression"].split("*")
        assert int(row["answer"]) == int(factors[0]) * int(factors[1])
        asked = Prompt(0, 0, "products", (), "", None, {"reasoning_gym": row["reasoning_gym"]})
        assert reasoning_gym(f"so <answer> {row['answer']}</answer>", asked) == 1
        assert reasoning_gym(f"<answer>{int(row['answer']) + 1}</answer>", asked) < 0.2
    before = out.read_bytes()
    assert command(monkeypatch, "products", "--out", str(out), *words) == 0 and out.read_bytes() == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["product"], "there is no task product; did you mean products?"),
        (["products", "min_digit=1"], "products does not take these settings"),
        (["products", "min_digits=0"], "products does not take these settings"),
        (["products", "min_digits"], "write KEY=VALUE"),
        (["arc_agi", "--size", "1"], "no item can be scored from a file"),
        (["products", "--size", "0"], "give a task and --out FILE"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, *words, "--out", str(tmp_path / "x.jsonl")) == 1
    complaint = capsys.readouterr().err
    assert said in complaint and len(complaint.splitlines()) == 1
