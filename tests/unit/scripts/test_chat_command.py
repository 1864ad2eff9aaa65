"""scripts/chat.py refuses what it cannot load, and answers greedily what transformers answers."""

import sys

import chat
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEMPLATE = "{% for m in messages %}<{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"


@pytest.fixture
def folder(tmp_path):
    """A toy model with a character tokenizer, as an exported Hugging Face folder."""
    torch.manual_seed(0)
    vocab = {character: index for index, character in enumerate("#<>abcdefgh ")}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="#"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")  # type: ignore[assignment]
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="#", eos_token="#")
    wrapped.chat_template = TEMPLATE
    config = LlamaConfig(
        vocab_size=len(vocab), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=32, eos_token_id=0, bos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    wrapped.save_pretrained(tmp_path)
    return tmp_path


def run(monkeypatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["chat.py", *words])
    return chat.main()


def test_greedy_answer_is_the_argmax_of_the_model(folder, monkeypatch, capsys):
    talk = chat.Chat(folder, max_new_tokens=4, temperature=0.0)
    reply = talk.answer([{"role": "user", "content": "abc"}])
    tokens = talk.tokenizer("<abc>", return_tensors="pt")["input_ids"]
    for _ in range(4):
        tokens = torch.cat([tokens, talk.model(tokens).logits[:, -1:].argmax(-1)], dim=1)
        if tokens[0, -1] == 0:
            break
    assert reply == talk.tokenizer.decode(tokens[0, 5:], skip_special_tokens=True)
    assert reply.strip() in capsys.readouterr().out


def test_a_prompt_longer_than_the_context_is_refused_with_both_numbers(folder, monkeypatch, capsys):
    assert run(monkeypatch, "--model", str(folder), "--prompt", "a" * 40) == 1
    assert "42 tokens so far" in (message := capsys.readouterr().err) and "context of 32" in message


def test_a_tokenizer_without_template_is_refused(folder, monkeypatch, capsys):
    (folder / "chat_template.jinja").unlink()
    assert run(monkeypatch, "--model", str(folder), "--prompt", "a") == 1
    assert "no chat template" in capsys.readouterr().err


def test_broken_weights_are_a_message(folder, monkeypatch, capsys):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert run(monkeypatch, "--model", str(folder), "--prompt", "a") == 1
    assert "cannot be loaded" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (None, "no such folder"),
        ([], "no config.json"),
        (["config.json"], "no weights"),
        (["checkpoints/latest"], "Export it first"),
    ],
)
def test_folders_without_a_model_are_named(tmp_path, monkeypatch, capsys, files, expected):
    target = tmp_path / "target"
    for name in files or []:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_text("{}")
    if files == []:
        target.mkdir()
    assert run(monkeypatch, "--model", str(target), "--prompt", "a") == 1
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("words", [("--max-new-tokens", "0"), ("--temperature", "-1"), ("--prompt", " ")])
def test_impossible_options_are_refused(tmp_path, monkeypatch, words):
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, "--model", str(tmp_path), *words)
    assert ended.value.code == 2
