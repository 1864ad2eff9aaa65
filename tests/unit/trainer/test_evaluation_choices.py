"""Multiple choice against a plain transformers loop, and every kind of row that cannot be used."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from convert.opening import open_weights
from data.cache_files import BadRow
from data.chat import template_renderer
from data.tokenizer import load_tokenizer
from tests.convert_cases import tiny
from tests.unit.data.conftest import TEMPLATE
from trainer.evaluation import choices, questions
from trainer.evaluation.choices import Answered, QuestionEncoder, Tally
from trainer.evaluation.questions import Question
from trainer.evaluation.rows import RowFile
from trainer.evaluation.scorer import Scorer, load_scorer

WORDS = ["north", "south", "east", "west and a little north", "up", "n", "the sea", "日本"]


def bpe() -> PreTrainedTokenizerFast:
    """Byte-level with merges, a begin token before plain text, and a chat template."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    backend.train_from_iterator([f"where is the {word} sea north of" for word in WORDS], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="<|im_end|>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def with_bos(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


@pytest.fixture(scope="module", params=["plain", "bos"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    tiny("tiny_qwen2", folder)
    (bpe() if request.param == "plain" else with_bos(bpe())).save_pretrained(folder)
    return folder


def some_questions(count: int = 12) -> list[Question]:
    random = np.random.default_rng(3)
    asked = []
    for number in range(count):
        picked = random.permutation(len(WORDS))[: random.integers(2, 6)]
        prompt = "where is it" + " where is the north" * int(random.integers(0, 9)) + ("\n" if number % 3 == 0 else "?")
        answer = int(random.integers(len(picked)))
        asked.append(Question("f", number, f"c{number % 2}", prompt, tuple(WORDS[i] for i in picked), answer))
    return [*asked, Question("f", 99, "c0", "pick a letter:", ("A", "B", "C", "D"), 2)]


def answers(
    folder: Path, asked: Iterable[Question | BadRow], batch_tokens: int, chat: bool = False
) -> tuple[list[Answered], list[BadRow]]:
    scorer, tokenizer, bad = load_scorer(open_weights(folder), torch.device("cpu")), load_tokenizer(str(folder)), []
    render = template_renderer(tokenizer, None, str(folder)) if chat else None
    encoder = QuestionEncoder(tokenizer, str(folder), scorer, render)
    return list(choices.answer(scorer, asked, encoder, batch_tokens, bad.append)), bad


def plain_loop(folder: Path, asked: list[Question], chat: bool) -> list[list[tuple[float, int]]]:
    """(log-likelihood, tokens) of each choice: prompt and choice tokenised apart, one forward pass for each choice."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    found = []
    for question in asked:
        if chat:
            turn = [{"role": "user", "content": question.prompt}]
            text: Any = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
            prompt, gap = tokenizer(text, add_special_tokens=False)["input_ids"], ""
        else:
            gap = "" if question.prompt.endswith("\n") else " "
            prompt = tokenizer(question.prompt)["input_ids"]
        row = []
        for choice in question.choices:
            ids = torch.tensor([*prompt, *tokenizer(gap + choice, add_special_tokens=False)["input_ids"]])
            with torch.no_grad():
                scores = model(ids[None]).logits[0].double().log_softmax(-1)
            own = range(len(prompt), len(ids))
            row.append((sum(scores[i - 1, ids[i]].item() for i in own), len(own)))
        found.append(row)
    return found


@pytest.mark.parametrize("chat", [False, True])
def test_scores_are_those_of_a_plain_loop_at_any_batch_size(folder: Path, chat: bool) -> None:
    asked = some_questions()
    expected = plain_loop(folder, asked, chat)
    for batch_tokens in (1, 70, 100_000):
        found, bad = answers(folder, asked, batch_tokens, chat)
        assert not bad and [each.question for each in found] == asked
        for each, row in zip(found, expected, strict=True):
            assert each.tokens == tuple(count for _, count in row)
            assert each.log_likelihood == pytest.approx([score for score, _ in row], abs=1e-5)
            sizes = [len(choice.encode()) for choice in each.question.choices]
            scores = [s / n for (s, _), n in zip(row, sizes, strict=True)]
            assert each.scores()["per_byte"] == pytest.approx(scores, abs=1e-5)
            assert each.scores()["per_token"] == pytest.approx([s / n for s, n in row], abs=1e-5)


def test_choices_of_one_token_share_their_prompt(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[int] = []
    asked_before = Scorer.asked

    def counting(self: Scorer, documents: list[np.ndarray], *rest: Any) -> torch.Tensor:
        computed.extend(len(document) for document in documents)
        return asked_before(self, documents, *rest)

    monkeypatch.setattr(Scorer, "asked", counting)
    found, _ = answers(folder, some_questions(0), 1000)
    begin = int("bos" in str(folder))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    letters = [tokenizer(f"pick a letter: {letter}", add_special_tokens=False)["input_ids"] for letter in "ABCD"]
    assert found[0].tokens == (2, 2, 2, 2)  # the space and the letter: no merge was learnt
    assert computed == [len(letters[0]) - 1 + begin]


def test_windows_do_not_change_the_order(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = some_questions()
    whole, _ = answers(folder, asked, 500)
    monkeypatch.setattr(choices, "WINDOW", 3)
    parts, _ = answers(folder, asked, 500)
    assert [each.question.line for each in parts] == [each.question.line for each in whole]
    for a, b in zip(parts, whole, strict=True):
        assert a.log_likelihood == pytest.approx(b.log_likelihood, abs=1e-5)


def test_a_question_longer_than_the_context_is_passed_over(folder: Path) -> None:
    asked = some_questions(2)
    asked.insert(1, replace(asked[0], line=50, prompt="north " * 600))
    found, bad = answers(folder, asked, 500)
    assert [each.question.line for each in found] == [0, 1, 99]
    assert [(row.line, "and the model's context is 512" in row.reason) for row in bad] == [(50, True)]


def test_ids_without_an_embedding_are_refused(folder: Path) -> None:
    scorer, tokenizer = load_scorer(open_weights(folder), torch.device("cpu")), load_tokenizer(str(folder))
    tokenizer.add_tokens([f"word{i}" for i in range(300)])
    encoder = QuestionEncoder(tokenizer, str(folder), scorer)
    with pytest.raises(ValueError, match=r"makes ids up to \d+ on this data, and the model has 512"):
        encoder.encode(replace(some_questions(0)[0], choices=("word299", "B")))


GOOD: dict[str, Any] = {"question": "q", "choices": ["red", "B", "blue"], "answer": 2}
ROWS: list[tuple[object, object]] = [
    (GOOD, 2),
    ({"prompt": "q", "choices": ["red", "green"], "answer": "green", "channel": "colours"}, 1),
    (GOOD | {"answer": "c"}, 2),
    (GOOD | {"answer": "B"}, 1),
    (GOOD | {"answer": "A"}, 0),
    ({"choices": ["a", "b"], "answer": 0}, "there is no question or prompt among its fields (choices, answer)"),
    (GOOD | {"question": " "}, "question is empty"),
    (GOOD | {"question": ["q"]}, "question is ['q'], not a string"),
    ({"question": "q", "choices": ["a", "b"]}, "there is no answer"),
    (GOOD | {"answer": 3}, "answer 3 is no index of 3 choices: the first is 0"),
    (GOOD | {"answer": -1}, "answer -1 is no index of 3 choices: the first is 0"),
    (GOOD | {"answer": True}, "answer True is not among the choices"),
    (GOOD | {"answer": "D"}, "answer 'D' is not among the choices"),
    (GOOD | {"answer": "yellow"}, "answer 'yellow' is not among the choices"),
    (GOOD | {"choices": []}, "choices is [], not a list of at least two"),
    (GOOD | {"choices": "abc"}, "choices is 'abc', not a list of at least two"),
    (GOOD | {"choices": ["a", ""]}, "choice 1 is empty"),
    (GOOD | {"choices": ["a", 2]}, "choice 1 is 2, not a string"),
    (GOOD | {"choices": ["a", "a"]}, "the choice 'a' is there twice"),
    (GOOD | {"channel": 7}, "channel is 7, not a name"),
    (GOOD | {"question": "\ud800"}, "question has half a surrogate pair"),
    ([1, 2], "the row is list, not an object"),
    (b'{"question": "\xff"}', "not UTF-8: byte 0xff at offset 14 of the line"),
    (b"{", "not JSON"),
]


def test_every_row_is_a_question_or_has_a_reason(tmp_path: Path) -> None:
    path = tmp_path / "quiz.jsonl"
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row, _ in ROWS]
    path.write_bytes(b"\n\n".join(lines))  # blank lines are no rows, but they count
    found = list(questions.read(RowFile(str(path))))
    assert len(found) == len(ROWS)
    for number, (got, (_, expected)) in enumerate(zip(found, ROWS, strict=True)):
        assert (got.file, got.line) == (str(path), 2 * number + 1)
        if isinstance(expected, int):
            assert isinstance(got, Question) and got.answer == expected
        else:
            assert isinstance(got, BadRow) and got.reason.startswith(str(expected)), (got, expected)
    assert [each.channel for each in found[:2] if isinstance(each, Question)] == ["quiz", "colours"]
    named = next(iter(questions.read(RowFile(str(path), "named"))))
    assert isinstance(named, Question) and named.channel == "named"


def test_lines_are_counted_over_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.readers.BLOCK_BYTES", 100)
    path = tmp_path / "quiz.jsonl"
    path.write_text("".join(json.dumps(GOOD | {"answer": i % 4}) + "\n" for i in range(40)))
    found = list(questions.read(RowFile(str(path))))
    assert [each.line for each in found] == list(range(1, 41))
    assert [each.line for each in found if isinstance(each, BadRow)] == list(range(4, 41, 4))


def test_the_tally_by_hand() -> None:
    def answered(channel: str, answer: int, scores: list[float], tokens: list[int], texts: list[str]) -> Answered:
        question = Question("f", 1, channel, "q", tuple(texts), answer)
        return Answered(question, tuple(scores), tuple(tokens))

    tally = Tally()
    tally.add(answered("all", 0, [-4.0, -3.0], [4, 1], ["abcdefgh", "b"]))  # wrong; per token and byte right
    tally.add(answered("x", 1, [-4.0, -3.0], [2, 1], ["abcd", "b"]))  # right; per token and byte wrong
    tally.add(answered("x", 2, [-5.0, -4.0, -3.0], [1, 1, 2], ["a", "b", "é"]))  # right all ways
    first, x, whole = tally.results()
    assert (first.channel, first.questions, first.accuracy["sum"], first.error["sum"]) == ("all", 1, 0.0, None)
    assert first.accuracy == {"sum": 0.0, "per_token": 1.0, "per_byte": 1.0}
    assert x.accuracy == {"sum": 1.0, "per_token": 0.5, "per_byte": 0.5}
    assert x.error == {"sum": 0.0, "per_token": pytest.approx(0.5), "per_byte": pytest.approx(0.5)}
    assert whole.chance == pytest.approx((1 / 2 + 1 / 2 + 1 / 3) / 3)
    assert whole.accuracy["sum"] == pytest.approx(2 / 3)
    assert whole.error["sum"] == pytest.approx(math.sqrt(2 / 9 / 2))
