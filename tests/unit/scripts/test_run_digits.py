"""The runs on digits: what is asked of each model, told in which order; torchrun and python are stood in for."""

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
STAND_IN = """#!/bin/bash
case "$*" in
    *prepare_digits*) exit 0 ;;
    *evaluate.py*held_out*) sleep 0.3 ;;
    *evaluate.py*"$FAILS"*) echo "no such model" >&2; exit 2 ;;
esac
echo "ran $*"
"""


def digits(folder: Path, *words: str, fails: str = "nothing is called so") -> tuple[int, list[str]]:
    """Exit code and the lines that were told."""
    for name in ("torchrun", "python"):
        (folder / name).write_text(STAND_IN)
        (folder / name).chmod(0o755)
    env = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "FAILS": fails}
    script = str(ROOT / "scripts" / "run_digits.sh")
    done = subprocess.run(["bash", script, *words], env=env, capture_output=True, text=True, timeout=60)
    return done.returncode, [line for line in done.stdout.splitlines() if line]


def test_answers_stand_under_their_headings_whoever_is_ready_first(tmp_path: Path) -> None:
    code, told = digits(tmp_path, "digits", "digits_blind", "--", "run.dir=somewhere")
    asked = "ran scripts/evaluate.py --model somewhere/{} --tasks assets/digits/{}.jsonl --chat --set max_new_tokens=8"
    assert code == 0
    assert told[-6:] == [
        "== digits, held_out",
        asked.format("digits", "held_out"),
        "== digits, mismatched",
        asked.format("digits", "mismatched"),
        "== digits_blind, blind_held_out",
        asked.format("digits_blind", "blind_held_out"),
    ]


def test_an_evaluation_that_fails_ends_it(tmp_path: Path) -> None:
    code, told = digits(tmp_path, "digits", "digits_blind", fails="mismatched.jsonl")
    assert (code, told[-1]) == (2, "== digits, mismatched")
