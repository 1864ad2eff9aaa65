"""Weights, tokenizer, chat template and stop tokens found together, or one sentence that says what does not fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from models.generation import Request, SamplingConfig
from models.generation.serving import serve
from tests import inference_cases
from tests.convert_cases import tiny
from tests.pool import Pool
from tests.unit.data.conftest import make_tokenizer
from trainer.inference.loading import load_generator, open_text_model, tp_problem

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with random weights and a tokenizer of bytes."""
    folder = tmp_path_factory.mktemp("loaded") / "model"
    tiny("tiny_llama", folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def other(folder: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(folder, tmp_path / "other"))


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_texts_are_those_of_transformers(folder: Path) -> None:
    generator = load_generator(folder, device=CPU)
    (made,) = generator.generate(["once upon a time"], SamplingConfig(max_new_tokens=8))
    theirs: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([make_tokenizer().encode("once upon a time")])
    stop = make_tokenizer().eos_token_id
    want = theirs.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=stop, pad_token_id=stop)
    assert list(made.tokens) == want[0, ids.shape[1] :].tolist()


def test_bf16_weights(folder: Path) -> None:
    generator = load_generator(folder, device=CPU, dtype="bf16")
    assert {parameter.dtype for parameter in generator.model.parameters()} == {torch.bfloat16}
    assert len(generator.generate(["once"], SamplingConfig(max_new_tokens=4))[0].tokens) == 4


def test_stop_tokens_of_tokenizer_files_and_template(other: Path) -> None:
    """<|im_end|> is 257 in the tokenizer of bytes; a model trained with a template that ends turns otherwise too."""
    change(other / "generation_config.json", eos_token_id=[7, 9])
    change(other / "config.json", eos_token_id=9)
    assert open_text_model(other).stop_tokens == (7, 9, 257)
    template = other / "turns.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}<|im_start|>{% endfor %}")
    found = open_text_model(other, chat_template=template)
    assert found.stop_tokens == (7, 9, 256, 257)
    assert found.tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "a<|im_start|>"


def test_without_a_template_texts_alone_can_be_written(other: Path) -> None:
    (other / "chat_template.jinja").unlink()
    assert open_text_model(other).render is None


def test_mistakes_are_told(other: Path, tmp_path: Path) -> None:
    def told(**given: Any) -> str:
        with pytest.raises(ValueError) as caught:
            open_text_model(other, **given)
        return str(caught.value)

    (tmp_path / "bad.jinja").write_text("{% for %}")
    (tmp_path / "latin.jinja").write_bytes(b"\xff")
    assert "bad.jinja is not valid jinja: line 1" in told(chat_template=tmp_path / "bad.jinja")
    assert "latin.jinja cannot be read" in told(chat_template=tmp_path / "latin.jinja")
    assert "holds no tokenizer" in told(tokenizer=str(tmp_path))
    change(other / "generation_config.json", eos_token_id=512)
    assert "names token 512 as end of text and the model has 512 tokens" in told()
    (other / "generation_config.json").unlink()
    wide = make_tokenizer()
    wide.add_tokens([f"word{i}" for i in range(300)])
    wide.save_pretrained(other)
    assert "has 558 tokens and the model only 512: it belongs to another model" in told()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (other / name).unlink()
    assert "has no tokenizer; name its folder with --tokenizer FOLDER" in told()


def test_tp_ranks_write_what_one_process_writes(folder: Path, pool: Callable[[int], Pool]) -> None:
    """Rank 0 alone knows what is asked, and gives it bit by bit."""
    asked = [
        Request([i + 3] * (5 * i + 1), SamplingConfig(max_new_tokens=9, temperature=i % 2, samples=1 + i % 2), seed=i)
        for i in range(7)
    ]
    asked.insert(2, Request([]))
    want = sorted(
        serve(load_generator(folder, device=CPU), inference_cases.giving(asked)),
        key=lambda made: (made.prompt, made.sample),
    )
    for found in pool(2).run(inference_cases.served, folder, asked):
        assert found == want


def test_a_draft_must_have_the_models_tokens(folder: Path, other: Path) -> None:
    assert load_generator(folder, device=CPU, draft=other).draft is not None
    more = make_tokenizer()
    more.add_tokens(["word"])
    more.save_pretrained(other)
    with pytest.raises(ValueError, match="has another vocabulary than"):
        load_generator(folder, device=CPU, draft=other)


def test_ranks_that_cannot_share_a_model(folder: Path) -> None:
    opened = open_text_model(folder).opened
    assert tp_problem(opened, 2) is None
    told = tp_problem(opened, 3) or ""
    assert "cannot be shared by 3 ranks: tp=3 does not divide" in told and told.endswith("; tp may be 1, 2, 4")
