"""Rollouts on disk: what a line holds, files by step, a disk that is full."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from data.prompt import Prompt
from trainer.rollout import records
from trainer.rollout.records import Records
from trainer.rollout.types import Rollout, Turn


class Bytes:
    """A byte a token."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        return bytes(token_ids).decode(errors="replace")


def rollout(sample: int = 0, text: str = "hé\u2028!", chat: bool = True) -> Rollout:
    """Asked, written, answered by a tool, written again."""
    first, second = text.encode(), b"<ok>"
    tokens = (65, 66, *first, 67, 68, *second)
    learn = (False, False, *[True] * len(first), False, False, *[True] * len(second))
    turns = (
        Turn("assistant", text, 2, 2 + len(first)),
        Turn("tool", "12", 2 + len(first), 4 + len(first)),
        Turn("assistant", "<ok>", 4 + len(first), len(tokens)),
    )
    messages = ({"role": "user", "content": "a?"},) if chat else None
    prompt = Prompt(7, 1, "maths", (65, 66), "AB", messages, {"answer": 3, "when": Path("x")})
    log_probs = tuple(-0.5 * learnt for learnt in learn)
    rewards, errors = {"format": 1.0, "length": -0.25}, {"length": "it took longer than 5 s"}
    return Rollout(prompt, sample, tokens, learn, log_probs, "<ok>", "stop", turns, rewards, 0.75, errors)


def test_a_line_says_all_of_a_sample(tmp_path: Path) -> None:
    Records(tmp_path, Bytes(), pieces=True).write(12, [rollout(), rollout(1)], {(7, 1): 0.5})
    first, second = records.read(tmp_path / "rollouts" / "step_000012.jsonl")
    text = "hé\u2028!"
    assert first == {
        "step": 12, "evaluation": False, "prompt": 7, "sample": 0, "channel": "maths",
        "messages": [{"role": "user", "content": "a?"}], "fields": {"answer": 3, "when": "x"},
        "turns": [
            {"role": "assistant", "text": text, "learnt": True, "tokens": 7,
             "pieces": [["h", -0.5], ["", -0.5], ["é", -0.5], ["", -0.5], ["", -0.5], ["\u2028", -0.5], ["!", -0.5]]},
            {"role": "tool", "text": "12", "learnt": False, "tokens": 2},
            {"role": "assistant", "text": "<ok>", "learnt": True, "tokens": 4,
             "pieces": [["<", -0.5], ["o", -0.5], ["k", -0.5], [">", -0.5]]},
        ],
        "rewards": {"format": 1.0, "length": -0.25}, "reward": 0.75, "advantage": None,
        "prompt_tokens": 2, "new_tokens": 11, "finish": "stop", "log_prob": -5.5,
        "errors": {"length": "it took longer than 5 s"},
    }  # fmt: skip
    assert (second["sample"], second["advantage"]) == (1, 0.5)


def test_plain_prompts_without_pieces(tmp_path: Path) -> None:
    (line,) = [Records(None, Bytes(), pieces=False).record(rollout(chat=False), math.nan)]
    assert line["text"] == "AB" and "messages" not in line
    assert all("pieces" not in turn for turn in line["turns"]) and line["advantage"] is None


def test_tokens_of_one_character_are_told_together() -> None:
    assert records.pieces(Bytes(), "aé🎈b".encode()) == ["a", "", "é", "", "", "", "🎈", "b"]
    assert records.pieces(Bytes(), b"a\xf0\x9f") == ["a", "", "\ufffd"], "the text ended within a character"
    assert records.pieces(Bytes(), b"\xff" * 5) == ["", "", "", "\ufffd" * 4, "\ufffd"]


def test_steps_done_again_replace_their_file_and_held_out_ones_lie_apart(tmp_path: Path) -> None:
    made = Records(tmp_path, Bytes(), pieces=False)
    for step in (2, 10, 2):
        made.write(step, [rollout(sample) for sample in range(step)])
    made.write(10, [rollout()], evaluation=True)
    assert list(records.files(tmp_path)) == [2, 10] and list(records.files(tmp_path, evaluation=True)) == [10]
    assert len(records.read(records.files(tmp_path)[2])) == 2
    assert not list((tmp_path / "rollouts").glob("*.tmp"))


def test_other_ranks_and_runs_without_records_write_nothing(tmp_path: Path) -> None:
    Records(None, Bytes(), pieces=False).write(1, [rollout()])
    assert not list(tmp_path.iterdir())


def test_a_disk_that_cannot_be_written_costs_no_run(tmp_path: Path) -> None:
    (tmp_path / "rollouts").write_text("a file is in the way")
    made = Records(tmp_path, Bytes(), pieces=False)
    with pytest.warns(UserWarning, match="cannot write"):
        made.write(1, [rollout()])
    made.write(2, [rollout()])  # told once


@pytest.mark.parametrize(("text", "said"), [("{", "line 1 is not JSON"), ('{"a": 1}', "line 1 is no rollout")])
def test_other_files_are_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(ValueError, match=said):
        records.read(tmp_path / "x.jsonl")
    with pytest.raises(ValueError, match="cannot be read"):
        records.read(tmp_path / "none.jsonl")
