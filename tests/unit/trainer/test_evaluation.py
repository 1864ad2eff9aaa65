"""Losses of an evaluation against the trainer's own, against transformers, and by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from convert.opening import open_weights
from data.config import SourceConfig
from tests import cases
from tests.convert_cases import SMOLLM2, tiny
from tests.unit.data.conftest import make_tokenizer
from trainer.evaluation import perplexity
from trainer.evaluation.perplexity import ChannelLoss
from trainer.evaluation.scorer import load_scorer
from trainer.evaluation.tokens import byte_lengths, tokenizer_folder

CPU = torch.device("cpu")
TEXTS = ["a tale of two cities", "ähnlich wie gestern, nur später", "x", "It was the best of times. " * 9, "日本語"]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with random weights and a tokenizer of bytes."""
    folder = tmp_path_factory.mktemp("evaluated")
    tiny("tiny_llama", folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    return folder


def losses_of(
    folder: Path, sources: list[SourceConfig], batch_tokens: int = 512, seq_len: int = 512, loss_on: str | None = None
) -> dict[str, ChannelLoss]:
    corpora = perplexity.files(sources, None, str(folder / "model"), loss_on, seq_len, str(folder / "cache"))
    scorer = load_scorer(open_weights(folder / "model"), CPU)
    return {each.channel: each for each in perplexity.evaluate(scorer, corpora, batch_tokens)}


def by_transformers(folder: Path, texts: list[str]) -> np.ndarray:
    """(loss sum, targets) of each text with its end token, alone in its batch."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "model")
    rows = []
    for text in texts:
        ids = torch.tensor([*tokenizer(text)["input_ids"], tokenizer.eos_token_id])
        with torch.no_grad():
            log_probabilities = model(ids[None]).logits[0, :-1].double().log_softmax(-1)
        rows.append((-log_probabilities.gather(1, ids[1:, None]).sum().item(), len(ids) - 1))
    return np.array(rows)


def test_losses_and_errors_are_those_of_a_plain_loop(folder: Path) -> None:
    path = write(folder / "texts.jsonl", [{"text": text} for text in TEXTS])
    ours = losses_of(folder, [SourceConfig(path)])["texts"]
    each_N2 = by_transformers(folder, TEXTS)
    loss = each_N2[:, 0].sum() / each_N2[:, 1].sum()
    residual_N = each_N2[:, 0] - loss * each_N2[:, 1]
    error = math.sqrt((residual_N**2).sum() * 5 / 4) / each_N2[:, 1].sum()
    assert (ours.documents, ours.tokens) == (5, each_N2[:, 1].sum())
    assert ours.loss == pytest.approx(loss, rel=1e-6)
    assert ours.loss_error == pytest.approx(error, rel=1e-4)
    assert ours.perplexity == pytest.approx(math.exp(loss), rel=1e-5)
    assert ours.perplexity_error == pytest.approx(math.exp(loss) * error, rel=1e-4)
    num_bytes = sum(len(text.encode()) - 1 for text in TEXTS)  # a byte is a token here, and the first has no loss
    assert ours.bits_per_byte == pytest.approx(each_N2[:, 0].sum() / math.log(2) / num_bytes, rel=1e-6)


def test_channels_do_not_depend_on_the_batch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [write(folder / f"part{i}.jsonl", [{"text": text * (i + 1)} for text in TEXTS[i:]]) for i in range(3)]
    book = folder / "book.txt"
    book.write_text("A long book that is cut into pieces. " * 40)
    sources = [*(SourceConfig(path, f"c{i}") for i, path in enumerate(files)), SourceConfig(str(book))]
    whole = losses_of(folder, sources, 10_000, 100)
    monkeypatch.setattr(perplexity, "WINDOW_TOKENS", 300)
    for batch_tokens in (1, 300):
        parts = losses_of(folder, sources, batch_tokens, 100)
        assert list(parts) == ["book", "c0", "c1", "c2", "all"] == list(whole)
        for name, each in parts.items():
            assert (each.documents, each.tokens) == (whole[name].documents, whole[name].tokens)
            assert each.loss == pytest.approx(whole[name].loss, rel=1e-6)
            assert each.loss_error == pytest.approx(whole[name].loss_error, rel=1e-4)
    tokens = len(book.read_text()) + 1
    assert whole["book"].tokens == tokens - whole["book"].documents == tokens - -(-tokens // 100)


def test_only_answers_of_conversations_count(folder: Path) -> None:
    turns = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "that"}]
    path = write(folder / "chat.jsonl", [{"messages": turns}])
    assert losses_of(folder, [SourceConfig(path)])["chat"].tokens == len("that") + 1  # and the stop token
    rendered = "<|im_start|>user\nwhat?<|im_end|>\n<|im_start|>assistant\nthat<|im_end|>\n"
    count = len(make_tokenizer()(rendered)["input_ids"])
    assert losses_of(folder, [SourceConfig(path)], loss_on="all")["chat"].tokens == count - 1


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_qwen3_moe"])
def test_a_runs_held_out_part_gives_the_trainers_numbers(
    model: str, pool: Callable[[int], Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"say {i}"},
                {"role": "assistant", "content": f"it is {i}" * (i % 5)},
            ]
        }
        for i in range(1, 60)
        if i % 5
    ]
    sources = [f"{{path: {write(tmp_path / f'{name}.jsonl', rows[i::2])}}}" for i, name in enumerate(("even", "odd"))]
    settings = {
        "model": model,
        "data.sources": f"[{', '.join(sources)}]",
        "data.tokenizer": tmp_path / "tokenizer",
        "data.eval_fraction": 0.3,
        "data.seq_len": 96,
        "data.global_batch_rows": 4,
        "data.micro_batch_rows": 2,
        "data.cache_dir": tmp_path / "cache",
        "run.dir": tmp_path,
        "run.name": "run",
        "run.steps": 3,
        "run.seed": 5,
        "optim.lr": 1e-2,
        "log.wandb": "disabled",
        "log.tensorboard": "false",
    }
    pool(1).run(cases.run_config, [f"{key}={value}" for key, value in settings.items()])
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in lines if row["kind"] == "eval"][-1]
    out = tmp_path / "out.json"
    evaluate.main(["--run", str(tmp_path / "run"), "--out", str(out), "--batch-tokens", "200", "--device", "cpu"])
    ours = {each["channel"]: each for each in json.loads(out.read_text())["perplexity"]}
    assert list(ours) == ["even", "odd", "all"]
    for name, key in (("even", "eval/even"), ("odd", "eval/odd"), ("all", "eval")):
        assert ours[name]["tokens"] == last[f"{key}/tokens"] > 10
        assert ours[name]["loss"] == pytest.approx(last[f"{key}/loss"], rel=1e-6)
        assert ours[name]["perplexity"] == pytest.approx(last[f"{key}/perplexity"], rel=1e-6)
    assert "even" in capsys.readouterr().out


def test_bytes_of_byte_level_tokens() -> None:
    bytes_V = byte_lengths(make_tokenizer())
    assert bytes_V is not None and bytes_V.tolist() == [1] * 256 + [0, 0]


def test_bytes_of_sentencepiece_tokens() -> None:
    vocab = {"<unk>": 0, "\u2581": 1, "\u2581the": 2, "é": 3, **{f"<0x{i:02X}>": 4 + i for i in range(256)}}
    backend = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "\u2581")
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(parts)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    bytes_V = byte_lengths(tokenizer)
    assert bytes_V is not None and bytes_V[:5].tolist() == [0, 1, 4, 2, 1]
    text = " é 日x"
    assert bytes_V[tokenizer(text)["input_ids"]].sum() == len(text.encode())
    tokenizer.backend_tokenizer.decoder = decoders.WordPiece()
    assert byte_lengths(tokenizer) is None


def test_bytes_of_a_real_tokenizer() -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(SMOLLM2)
    bytes_V = byte_lengths(tokenizer)
    text = "def f(x): return 12345\n\tЧто это? 日本語 🙂 ähnlich  "
    assert bytes_V is not None and bytes_V[tokenizer(text)["input_ids"]].sum() == len(text.encode())


def test_another_models_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    opened = open_weights(folder / "model")
    assert tokenizer_folder(None, opened) == str(folder / "model")
    make_tokenizer().save_pretrained(tmp_path / "same")
    (tmp_path / "same" / "chat_template.jinja").write_text("another template")
    assert tokenizer_folder(str(tmp_path / "same"), opened) == str(tmp_path / "same")
    content = json.loads((folder / "model" / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (tmp_path / "same" / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"is not the model's, .*: 2 tokens have other ids"):
        tokenizer_folder(str(tmp_path / "same"), opened)


def test_ids_without_an_embedding_are_refused(folder: Path, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"word{i}" for i in range(300)])
    tokenizer.save_pretrained(tmp_path / "wide")
    path = write(tmp_path / "wide.jsonl", [{"text": "a word299"}])
    corpora = perplexity.files([SourceConfig(path)], None, str(tmp_path / "wide"), None, 64, str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="makes ids up to 557 on this data, and the model has 512"):
        perplexity.evaluate(load_scorer(open_weights(folder / "model"), CPU), corpora, 64)
