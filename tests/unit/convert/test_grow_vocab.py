"""New tokens: one id each, rows as asked for, and nothing else changed."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForSequenceClassification,
)

from convert.cli import told
from convert.grow_vocab import main as grow_vocab

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TEXT = "the quick brown fox jumps over the lazy dog, <b>then</b> it thinks about 12 foxes\n\n  and sleeps"
REAL = 320
"""Ids of the byte-level tokenizer before it grows."""
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


@cache
def tokenizer_json(metaspace: bool) -> str:
    """A byte-level BPE as GPT-2 and SmolLM2 have one, or one on words with spaces put before them."""
    made = Tokenizer(models.BPE(unk_token="<unk>" if metaspace else None))
    special = ["<s>", "</s>", "<unk>"]
    if metaspace:
        made.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
        made.decoder = decoders.Metaspace()
        trainer = trainers.BpeTrainer(vocab_size=REAL, special_tokens=special, show_progress=False)
    else:
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=REAL, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
    made.train_from_iterator([TEXT * 3, "hello hello world"] * 20, trainer)
    return made.to_str()


def model_folder(folder: Path, rows: int = REAL, tied: bool = False, metaspace: bool = False) -> Path:
    """A tiny model with random weights and its tokenizer."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer_json(metaspace)),
        bos_token="<s>",
        eos_token="</s>",
        chat_template="{{ messages }}",
        model_max_length=77,
    )
    assert metaspace or len(tokenizer) == REAL
    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=rows, tie_word_embeddings=tied))
    with torch.no_grad():
        for param in {model.model.embed_tokens.weight, model.lm_head.weight}:
            param.copy_(torch.randn(rows, 32))
    model.generation_config.max_new_tokens = 9
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def grow(folder: Path, *more: str) -> Path:
    out = folder.parent / "out"
    assert told(grow_vocab, ["--hf", str(folder), "--out", str(out), *more]) == 0
    return out


def refused(capsys: pytest.CaptureFixture[str], folder: Path, *more: str) -> str:
    capsys.readouterr()
    out = folder.parent / "out"
    assert told(grow_vocab, ["--hf", str(folder), "--out", str(out), *more]) == 2
    assert not out.exists() and not list(folder.parent.glob(".out*"))
    return capsys.readouterr().err


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("metaspace", [False, True])
@pytest.mark.parametrize("special", [False, True])
def test_old_text_is_as_before_and_a_new_token_is_one_id(
    tmp_path: Path, tied: bool, metaspace: bool, special: bool
) -> None:
    folder = model_folder(tmp_path / "model", tied=tied, metaspace=metaspace)
    old_tokenizer, old = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    more = ["--special"] if special else []
    out = grow(folder, "--tokens", "<think>", "</think>", "zebra", "--verify", *more)
    tokenizer, model = AutoTokenizer.from_pretrained(out), AutoModelForCausalLM.from_pretrained(out)
    assert tokenizer.encode(TEXT) == old_tokenizer.encode(TEXT)
    ids = [tokenizer.convert_tokens_to_ids(token) for token in ("<think>", "</think>", "zebra")]
    assert len(set(ids)) == 3 and min(ids) >= len(old_tokenizer)
    mixed = tokenizer.encode("the<think>fox zebra</think>", add_special_tokens=False)
    assert [i for i in mixed if i in ids] == [ids[0], ids[2], ids[1]]
    shown = tokenizer.decode(mixed, skip_special_tokens=True)
    assert ("<think>" in shown) is not special and "fox" in shown
    assert (ids[0] in tokenizer.all_special_ids) is special
    tokens = torch.tensor([old_tokenizer.encode(TEXT)])
    with torch.no_grad():
        wanted, found = old(tokens).logits, model(tokens).logits
    known = len(old_tokenizer)
    rows = REAL if known + 3 <= REAL else 384
    assert model.config.vocab_size == rows and found.shape[-1] == rows
    assert torch.equal(found[..., :known], wanted[..., :known])


@pytest.mark.parametrize("init", ["mean", "subtokens"])
def test_rows_of_new_tokens(tmp_path: Path, init: str) -> None:
    folder = model_folder(tmp_path / "model", rows=330)
    before = load_file(folder / "model.safetensors")
    pieces = AutoTokenizer.from_pretrained(folder).encode("<think>")
    assert len(pieces) > 2
    out = grow(folder, "--tokens", "<think>", "--init", init, "--dtype", "bf16")
    after = load_file(out / "model.safetensors")
    for name in (EMBED, HEAD):
        rows = before[name][pieces] if init == "subtokens" else before[name][:REAL]
        assert after[name].dtype is torch.bfloat16
        assert torch.equal(after[name][REAL], rows.double().mean(0).float().bfloat16())
        assert torch.equal(after[name][:REAL], before[name][:REAL].bfloat16())
        assert torch.equal(after[name][REAL + 1 :], before[name][REAL + 1 :].bfloat16())  # spare rows not used


def test_spare_rows_are_used_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = model_folder(tmp_path / "model", rows=322)
    before = load_file(folder / "model.safetensors")
    out = grow(folder, "--tokens", "<a>", "<b>", "<c>", "--multiple-of", "7")
    after = load_file(out / "model.safetensors")
    mean = before[HEAD][:REAL].double().mean(0).float()
    assert after[HEAD].shape == (329, 32)
    assert torch.equal(after[HEAD][:REAL], before[HEAD][:REAL])
    assert all(torch.equal(row, mean) for row in after[HEAD][REAL:])
    assert set(after) == set(before)
    assert all(torch.equal(after[name], before[name]) for name in before if name not in (EMBED, HEAD))
    said = capsys.readouterr().out
    assert "2 of the new tokens have rows that were spare; vocab_size grew from 322 to 329" in said
    assert "'<c>' has id 322 (mean of all rows)" in said and "6 rows beyond the last token" in said
    config = json.loads((out / "config.json").read_text())
    assert config == json.loads((folder / "config.json").read_text()) | {"vocab_size": 329}


def test_enough_spare_rows_leave_the_sizes(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", rows=330, tied=True)
    out = grow(folder, "--tokens", "<a>", "<b>")
    assert load_file(out / "model.safetensors")[EMBED].shape == (330, 32)
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 330


def test_a_routers_bias_stays_fp32(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    tensors = load_file(folder / "model.safetensors") | {name: torch.full((4,), 1 + 2.0**-20)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    after = load_file(grow(folder, "--tokens", "<a>", "--dtype", "bf16") / "model.safetensors")
    assert torch.equal(after[name], tensors[name]) and after["model.norm.weight"].dtype is torch.bfloat16


def test_the_other_files(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    (folder / "special_tokens_map.json").write_text('{"bos_token": "<s>"}')
    (folder / "LICENSE").write_text("terms")
    out = grow(folder, "--tokens", "<a>")
    assert (out / "generation_config.json").read_bytes() == (folder / "generation_config.json").read_bytes()
    assert (out / "LICENSE").read_text() == "terms" and not (out / "special_tokens_map.json").exists()
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"
    theirs, ours = (json.loads((place / "tokenizer_config.json").read_text()) for place in (folder, out))
    assert ours["tokenizer_class"] == theirs["tokenizer_class"] and ours["model_max_length"] == 77


def test_known_tokens_are_named_and_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = model_folder(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer.encode(" fox")) == 1
    out = grow(folder, "--tokens", "</s>", " fox", "<a>")
    said = capsys.readouterr().out
    assert f"'</s>' was known already, id {tokenizer.eos_token_id}: left alone" in said
    assert f"' fox' was known already, id {tokenizer.encode(' fox')[0]}" in said
    assert len(AutoTokenizer.from_pretrained(out)) == REAL + 1
    out.rename(tmp_path / "grown")
    assert "knows every token already:\n  '<a>' is 320" in refused(capsys, tmp_path / "grown", "--tokens", "<a>")


def test_a_file_of_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, file = model_folder(tmp_path / "model"), tmp_path / "tokens.txt"
    file.write_bytes("\ufeff<a>\r\nß–x\r\n two words\n".encode())
    out = grow(folder, "--tokens-file", str(file))
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.encode("<a>ß–x two words") == [320, 321, 322]
    out.rename(tmp_path / "done")
    file.write_text("<a>\n\n<a>\n   \n")
    said = refused(capsys, folder, "--tokens-file", str(file))
    assert "line 2: empty" in said and "line 3: '<a>' is there already" in said and "line 4: empty" in said
    file.write_bytes(b"<a>\n\xff\xfe")
    assert "is not UTF-8 (byte 4)" in refused(capsys, folder, "--tokens-file", str(file))
    file.write_bytes(b"")
    assert "empty" in refused(capsys, folder, "--tokens-file", str(file))
    assert "cannot be read" in refused(capsys, folder, "--tokens-file", str(tmp_path / "gone"))


@pytest.mark.parametrize(
    ("tokens", "words"), [(["<a>", ""], "--tokens, number 2: empty"), (["x", "x"], "'x' is there already")]
)
def test_senseless_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str], tokens: list[str], words: str) -> None:
    assert words in refused(capsys, model_folder(tmp_path / "model"), "--tokens", *tokens)


def spoil(folder: Path, **changes: Any) -> None:
    content = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(content))


def test_models_that_do_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = model_folder(tmp_path / "model", tied=True)
    spoil(folder, vocab_size=321)
    assert "has 320 rows, vocab_size of config.json is 321" in refused(capsys, folder, "--tokens", "<a>")
    spoil(folder, vocab_size=320, tie_word_embeddings=False)
    assert "have no lm_head.weight" in refused(capsys, folder, "--tokens", "<a>")
    spoil(folder, vocab_size=None)
    assert "no vocab_size" in refused(capsys, folder, "--tokens", "<a>")
    spoil(folder, vocab_size=320, tie_word_embeddings=True)
    (folder / "tokenizer.json").write_text("{")
    assert f"the tokenizer in {folder} cannot be read" in refused(capsys, folder, "--tokens", "<a>")


def test_a_reward_model_grows_its_embedding_only(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    Qwen2ForSequenceClassification(Qwen2Config(**SIZES, vocab_size=REAL)).save_pretrained(folder)
    out = grow(folder, "--tokens", "<a>")
    assert load_file(out / "model.safetensors")[EMBED].shape == (384, 32)


def test_a_token_within_another_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = model_folder(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([AddedToken("<a", normalized=False)])
    tokenizer.save_pretrained(folder)
    out = grow(folder, "--tokens", "<a>")
    assert AutoTokenizer.from_pretrained(out).encode("<a>") == [321]  # the longest is found
    assert "'<a>' has id 321" in capsys.readouterr().out
