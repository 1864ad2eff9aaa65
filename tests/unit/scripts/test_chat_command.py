"""scripts/chat.py: answers are those of transformers, and a conversation stays sane whatever is typed."""

from __future__ import annotations

import builtins
import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import chat
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from models.generation.dialogue import Dialogue
from tests.convert_cases import SMOLLM2
from trainer.inference.conversation import Conversation

TEMPLATE = (
    "{% for m in messages %}{{ '[' if m['role'] == 'system' else '<' }}{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}>{% endif %}"
)
CONTEXT = 48


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy model with a character tokenizer, as an exported Hugging Face folder."""
    path = tmp_path_factory.mktemp("toy")
    torch.manual_seed(0)
    vocab = {character: index for index, character in enumerate("#<>[abcdefgh/ ")}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="#"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")  # type: ignore[assignment]
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="#", eos_token="#")
    wrapped.chat_template = TEMPLATE
    config = LlamaConfig(
        vocab_size=len(vocab), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=CONTEXT, eos_token_id=0, bos_token_id=None, pad_token_id=None, initializer_range=0.5,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    wrapped.save_pretrained(path)
    return path


def theirs(folder: Path, messages: list[dict[str, str]], new: int) -> str:
    """The greedy answer of transformers."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    given = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        made = model.generate(**given, max_new_tokens=new, do_sample=False, pad_token_id=0)
    return tokenizer.decode(made[0, given["input_ids"].shape[1] :], skip_special_tokens=True)


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["chat.py", *map(str, words)])
    return chat.main()


Talk = Callable[..., tuple[list[str], str]]


@pytest.fixture
def talk(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Talk:
    """A conversation with these lines from a pipe: its answers, and what was told beside them."""

    def of(*lines: str, options: tuple[object, ...] = ("--max-new-tokens", 4)) -> tuple[list[str], str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
        assert run(monkeypatch, "--model", folder, *options) == 0
        out, err = capsys.readouterr()
        return out.splitlines(), err

    return of


def test_a_real_model_answers_as_transformers_does(monkeypatch, capsys) -> None:
    question = "What is the capital of France?"
    assert run(monkeypatch, "--model", SMOLLM2, "--prompt", question, "--max-new-tokens", 16) == 0
    out, err = capsys.readouterr()
    assert out == theirs(SMOLLM2, [{"role": "user", "content": question}], 16) + "\n" and "Paris" in out
    assert err == ""


def test_each_turn_is_the_models_greedy_answer_to_all_before_it(folder: Path, talk: Talk) -> None:
    answers, told = talk("abc", "", "ha\\", "hb", "/help", " /e", options=("--max-new-tokens", 4, "--system", "g"))
    messages = [{"role": "system", "content": "g"}]
    for question, answer in zip(("abc", "ha\nhb", "/e"), answers, strict=True):
        messages.append({"role": "user", "content": question})
        assert answer == theirs(folder, messages, 4)
        messages.append({"role": "assistant", "content": answer})
    assert len(set(answers)) > 1 and "/retry" in told


def test_commands(folder: Path, talk: Talk) -> None:
    first = theirs(folder, [{"role": "user", "content": "abc"}], 4)
    longer = theirs(folder, [{"role": "user", "content": "abc"}], 6)
    system = theirs(folder, [{"role": "system", "content": "hg"}, {"role": "user", "content": "abc"}], 6)
    lines = ("abc", "/undo", "abc", "/set max_new_tokens=6", "/retry", "/reset", "/system hg", "abc", "/show")
    answers, told = talk(*lines)
    assert answers == [first, first, longer, system]
    assert "(taken back: abc)" in told and "(forgotten)" in told and "max_new_tokens=6" in told
    assert "system prompt: hg" in told and "cut at max_new_tokens=4; more: /set max_new_tokens=16" in told
    used = len(f"[hg<abc<{system}")
    assert f"conversation: 1 turns, {used} of {CONTEXT} tokens" in told


def test_sampled_answers_follow_the_seed_and_differ_between_tries(talk: Talk) -> None:
    hot = ("--max-new-tokens", 12, "--temperature", 2)
    answers, _ = talk("abc", "/retry", "/retry", options=(*hot, "--seed", 5))
    assert len(set(answers)) == 3
    assert talk("abc", "/retry", "/retry", options=(*hot, "--seed", 5))[0] == answers
    assert talk("abc", "/retry", options=(*hot, "--seed", 6))[0] == answers[1:]  # a try draws with seed + its number


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/sett", "/sett: no such command; there are /help, /set"),
        ("/set", "/set needs settings"),
        ("/set temperature", "'temperature' is no setting; write KEY=VALUE"),
        ("/set heat=1", "heat: there is no such setting"),
        ("/set temperature=warm", "temperature='warm': give a number"),
        ("/set top_p=0.5", "top_p=0.5: has no effect at temperature=0"),
        ("/set warm temperature=1", "'warm' is no setting; write KEY=VALUE"),
        ("/set samples=2", "samples: has no effect on a conversation"),
        ("/set num_beams=2", "cannot be shown as it comes"),
        ("/undo", "nothing was said yet"),
        ("/retry", "nothing was said yet"),
        ("a" * 60, f"62 tokens with this question, and the model's context is {CONTEXT}; shorten it"),
        ("ab\udcff", "not UTF-8 and was passed over"),
    ],
)
def test_a_line_that_cannot_be_done_is_told_and_changes_nothing(talk: Talk, line: str, message: str) -> None:
    answers, told = talk(line, "abc")
    assert message in told and answers == talk("abc")[0]


def test_a_full_context_and_the_ways_out(talk: Talk) -> None:
    answers, told = talk("a" * 40, "b", "/undo", "b", options=("--max-new-tokens", 20))
    assert f"the context of {CONTEXT} tokens is full: /reset forgets" in told
    assert "forget some of it: /undo takes back the last turn, /reset forgets all" in told
    assert [len(answers), answers[-1]] == [2, talk("b", options=("--max-new-tokens", 20))[0][0]]


def test_stop_strings_and_settings_are_typed_like_words(folder: Path, talk: Talk) -> None:
    whole = theirs(folder, [{"role": "user", "content": "abc"}], 8)
    end = whole.split()[2]
    answers, _ = talk(f"/set max_new_tokens=8 stop={end}", "abc", f'/set stop=["{end}", "x y"]', "/retry")
    assert answers == [whole[: whole.index(end)]] * 2
    _, told = talk('/set allowed=["h g", "b"] seed=1', "/set allowed=null regex='a [bc]'")
    assert 'seed=1 allowed=["h g", "b"])' in told and 'seed=1 regex="a [bc]")' in told


def test_ctrl_c_stops_an_answer_and_the_conversation_goes_on(folder: Path, monkeypatch, capsys) -> None:
    """At a terminal: once in the middle of an answer, once before its first token, once at the prompt."""
    stream, stop_at = Dialogue.stream, iter([2, 0, 99])

    def interrupted(*given: Any) -> Iterator[Any]:
        last = next(stop_at)
        for number, step in enumerate(stream(*given)):
            if number == last:
                raise KeyboardInterrupt
            yield step

    lines: Iterator[Any] = iter(["abc", "d", KeyboardInterrupt(), "/show", "h", EOFError()])

    def typed(_: str) -> str:
        line = next(lines)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr(Dialogue, "stream", interrupted)
    monkeypatch.setattr(builtins, "input", typed)
    monkeypatch.setattr(sys, "stdin", type("Terminal", (io.StringIO,), {"isatty": lambda self: True})())
    assert run(monkeypatch, "--model", folder, "--max-new-tokens", 5) == 0
    out, err = capsys.readouterr()
    whole = theirs(folder, [{"role": "user", "content": "abc"}], 2)
    said = [{"role": "user", "content": "abc"}, {"role": "assistant", "content": whole}]
    after = theirs(folder, [*said, {"role": "user", "content": "h"}], 5)
    assert out.splitlines() == [whole, "", after]
    assert err.index("what came of the answer stays") < err.index("the question is forgotten") < err.index("(Ctrl-D")
    assert "conversation: 1 turns" in err


def test_a_template_without_a_place_for_a_system_prompt(folder: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    template = tmp_path / "other.jinja"
    template.write_text("{% for m in messages if m.role != 'system' %}<{{ m.content }}{% endfor %}>")
    words = ("--model", folder, "--prompt", "a", "--chat-template", template)
    assert run(monkeypatch, *words) == 0
    assert run(monkeypatch, *words, "--system", "b") == 1
    assert "no place for a system prompt" in capsys.readouterr().err


def test_a_template_that_refuses_is_told(folder: Path) -> None:
    def refuse(*_: Any) -> str:
        from data.formats import RowError

        raise RowError("the chat template refuses the conversation: no")

    opened, _ = chat.open_talk(chat.arguments(["--model", str(folder)]))
    with pytest.raises(ValueError, match="refuses the conversation: no"):
        list(Conversation(opened.dialogue, refuse).answer("a"))


def test_a_prompt_longer_than_the_context_is_refused_with_both_numbers(folder: Path, monkeypatch, capsys) -> None:
    assert run(monkeypatch, "--model", folder, "--prompt", "a" * 60) == 1
    assert "62 tokens" in (message := capsys.readouterr().err) and f"context is {CONTEXT}" in message


def test_a_tokenizer_without_template_is_refused(folder: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    for file in folder.iterdir():
        if file.name != "chat_template.jinja":
            (tmp_path / file.name).symlink_to(file)
    assert run(monkeypatch, "--model", tmp_path, "--prompt", "a") == 1
    assert "no chat template" in capsys.readouterr().err


def test_broken_weights_are_a_message(folder: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes()[: 100 if file.suffix == ".safetensors" else None])
    assert run(monkeypatch, "--model", tmp_path, "--prompt", "a") == 1
    assert "model.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("files", "expected"),
    [(None, "is not there"), ([], "holds no checkpoint"), (["config.json"], "model_type=None")],
)
def test_folders_without_a_model_are_named(tmp_path: Path, monkeypatch, capsys, files, expected) -> None:
    target = tmp_path / "target"
    for name in files or []:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_text("{}")
    if files == []:
        target.mkdir()
    assert run(monkeypatch, "--model", target, "--prompt", "a") == 1
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [("--max-new-tokens", "0"), ("--temperature", "-1"), ("--prompt", " "), ("--system", "")]
)
def test_impossible_options_are_refused(tmp_path: Path, monkeypatch, words) -> None:
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, "--model", tmp_path, *words)
    assert ended.value.code == 2
