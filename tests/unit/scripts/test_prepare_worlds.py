"""The worlds of named runs: right answers are right, wrong ones wrong, nothing held out is shown, bytes repeat."""

from __future__ import annotations

import json
import random
from collections import Counter
from fractions import Fraction
from pathlib import Path

import prepare_arithmetic
import prepare_digits
import prepare_preferences
import pytest
from PIL import Image
from transformers import AutoTokenizer

from data.chat import ChatTemplate, special_tokens, template_renderer
from data.rows import Chat


def rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def arithmetic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    assets = tmp_path_factory.mktemp("assets")
    prepare_arithmetic.prepare(assets, seed=0)
    return assets / "arithmetic"


def test_answers_to_sums_are_right_and_nothing_held_out_is_shown(arithmetic: Path, tmp_path: Path) -> None:
    asked, held = rows(arithmetic / "prompts.jsonl"), rows(arithmetic / "held_out.jsonl")
    for row in asked + held:
        assert eval(row["messages"][0]["content"].rstrip("=")) == int(row["answer"]) >= 0
    questions = [{row["messages"][0]["content"] for row in part} for part in (asked, held)]
    shown = rows(arithmetic / "cold_start.jsonl")
    assert not questions[0] & questions[1]
    assert {row["messages"][0]["content"] for row in shown} == questions[0]
    assert {row["channel"] for row in held} == {row["channel"] for row in shown} == {"add", "subtract", "tens"}
    prepare_arithmetic.prepare(tmp_path, seed=0)
    for file in ("cold_start.jsonl", "prompts.jsonl", "held_out.jsonl", "tokenizer/tokenizer.json"):
        assert (tmp_path / "arithmetic" / file).read_bytes() == (arithmetic / file).read_bytes()


def test_the_cold_start_is_right_as_seldom_as_it_says(arithmetic: Path) -> None:
    off = Counter()
    for row in rows(arithmetic / "cold_start.jsonl"):
        question, answer = (turn["content"] for turn in row["messages"])
        assert answer.startswith("<answer>") and answer.endswith("</answer>")
        off[int(answer[8:-9]) - eval(question.rstrip("="))] += 1
    assert set(off) == set(prepare_arithmetic.MISTAKES)
    for distance, share in prepare_arithmetic.MISTAKES.items():
        assert abs(off[distance] / off.total() - share) < 0.01


def test_the_tokenizer_keeps_the_form_and_learns_where_to_stop(arithmetic: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(arithmetic / "tokenizer")
    chat = ChatTemplate(
        template_renderer(tokenizer, None, "here"), special_tokens(tokenizer), tokenizer.eos_token, tokenizer.bos_token
    )
    answer = {"role": "assistant", "content": "<answer>19</answer>"}
    rendered = chat.render(Chat([{"role": "user", "content": "12+7="}, answer]))
    assert rendered.text == "<|user|>12+7=<|assistant|><answer>19</answer><|end|>"
    assert [rendered.text[begin:end] for begin, end in rendered.spans] == ["<answer>19</answer><|end|>"]
    ids = tokenizer(rendered.text, add_special_tokens=False).input_ids
    assert len(ids) == 12 and max(ids) < 264, "the form's marks are one token each, digits one each"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "12+7=<answer>19</answer>"


def test_pairs_are_a_right_and_a_wrong_answer(tmp_path: Path) -> None:
    prepare_preferences.prepare(tmp_path, count=12, held_out=4, seed=3)
    folder = tmp_path / "preferences"
    held = rows(folder / "held_out.jsonl")
    learnt = {name: rows(folder / f"{name}.jsonl") for name in prepare_preferences.TASKS}
    assert all(len(part) == 12 for part in learnt.values()) and len(held) == 16
    for name, part in learnt.items():
        own = [row for row in held if row["channel"] == name]
        assert not {row["question"] for row in own} & {row["question"] for row in part}
        for row in part + own:
            assert _right(name, row["question"]) == row["chosen"] != row["rejected"], row
    choices = rows(folder / "held_out_questions.jsonl")
    assert [row["choices"][row["answer"]] for row in choices] == [row["chosen"] for row in held]
    assert {row["answer"] for row in choices} == {0, 1}
    first = (folder / "sums.jsonl").read_bytes()
    prepare_preferences.prepare(tmp_path, count=12, held_out=4, seed=3)
    assert (folder / "sums.jsonl").read_bytes() == first


def test_a_pair_about_a_digit_is_its_answer_and_that_about_another() -> None:
    draw = random.Random(0)
    for channel, (_, answer) in prepare_digits.QUESTIONS.items():
        for digit in range(10):
            row = prepare_digits.conversation("a.png", channel, digit)
            made = prepare_digits.pair(row, draw)
            right, wrong = (made[side][0]["content"] for side in ("chosen", "rejected"))  # pyright: ignore
            assert right == answer(digit) != wrong and wrong in {answer(each) for each in range(10)}
            assert [*made["prompt"], *made["chosen"]] == row["messages"] and made["images"] == ["a.png"]  # pyright: ignore


def test_captions_tell_which_digits_a_picture_shows_and_how_they_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With digits whose grey says which they are, and whether they are held out."""
    size = prepare_digits.SIDE**2
    greys = [(bytes([10 * (digit + 1)]) * size, digit) for digit in range(10)] * 4
    monkeypatch.setattr(prepare_digits, "pictures", lambda: greys)
    monkeypatch.setattr(prepare_digits, "CAPTIONS", 40)
    monkeypatch.setattr(prepare_digits, "CAPTIONS_HELD_OUT", 20)
    counts = prepare_digits.write_captions(tmp_path, seed=0)
    assert counts == {"captions_held_out": 20, "captions": 40}
    told = {file: rows(tmp_path / f"{file}.jsonl") for file in counts}
    assert len({row["image"] for part in told.values() for row in part}) == 60
    for row in told["captions"] + told["captions_held_out"]:
        image = Image.open(tmp_path / row["image"])
        seen = {(x, y): image.getpixel((28 * x + 14, 28 * y + 14)) for x in (0, 1) for y in (0, 1)}
        (one, here), (other, there) = [(g, at) for at, g in sorted(seen.items(), key=lambda item: item[0]) if g]
        words = {(1, 0): "left of", (0, 1): "above", (1, 1): "above and left of", (1, -1): "below and left of"}
        digits = [prepare_digits.WORDS[int(grey) // 10 - 1] for grey in (one, other)]  # pyright: ignore
        lies = words[there[0] - here[0], there[1] - here[1]]
        assert row["caption"].replace("an ", "a ") == f"a {digits[0]} {lies} a {digits[1]}"
        assert prepare_digits.LIES[row["channel"]][0] == lies
    assert {row["channel"] for row in told["captions"]} == set(prepare_digits.LIES)


def _right(channel: str, question: str) -> str:
    """The answer, worked out from the words of the question."""
    if channel == "spelling":
        return question.split()[-1][::-1]
    if channel == "sorting":
        numbers = sorted(int(number) for number in question.partition(": ")[2].split(", "))
        return ", ".join(map(str, numbers[::-1] if "descending" in question else numbers))
    if channel == "fractions":
        made = Fraction(question.split("fraction ")[1].split(" ")[0])
        return f"{made.numerator}/{made.denominator}"
    return str(eval(question.partition(": ")[2].rstrip("= ")))
