"""What is asked of vLLM and made of its answers; a stand-in takes its place."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from models.generation import BeamConfig, Request, SamplingConfig
from tests.convert_cases import tiny
from tests.unit.data.conftest import make_tokenizer
from trainer.inference.loading import TextModel, open_text_model
from trainer.inference.vllm_backend import VllmBackend, check_vllm

END = 257


@dataclass
class Made:
    """As `vllm.outputs.CompletionOutput`, the fields that are read."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str
    stop_reason: int | str | None = None
    logprobs: list[dict[int, Any]] | None = None


class Engine:
    """As `vllm.LLM`."""

    def __init__(self, **settings: Any) -> None:
        self.settings, self.asked = settings, []

    def generate(self, prompts: list[Any], params: list[Any], *, use_tqdm: bool) -> list[Any]:
        assert not use_tqdm
        self.asked += zip(prompts, params, strict=True)
        text = make_tokenizer().encode("ok")
        logprobs = [{token: SimpleNamespace(logprob=-0.5 * token)} for token in [*text, END]]
        made = {
            1: [Made(0, "ok<|im_end|>", [*text, END], "stop", END, logprobs)],
            2: [Made(0, "o", text, "length"), Made(1, "", text, "stop", "ok")],
        }
        return [SimpleNamespace(outputs=made[each.n]) for each in params]


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    module = SimpleNamespace(LLM=Engine, SamplingParams=lambda **given: SimpleNamespace(**given))
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TextModel:
    folder = tmp_path_factory.mktemp("vllm") / "model"
    tiny("tiny_llama", folder)
    make_tokenizer().save_pretrained(folder)
    return open_text_model(folder)


@pytest.mark.usefixtures("vllm")
def test_requests_and_answers(model: TextModel) -> None:
    backend = VllmBackend(model, [2, 3], "bf16", 16)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2,3"
    settings = backend.engine.settings
    assert settings["model"] == str(model.opened.path) and settings["tokenizer"] == model.folder
    assert (settings["tensor_parallel_size"], settings["dtype"], settings["max_model_len"]) == (2, "bfloat16", 512)
    two = SamplingConfig(max_new_tokens=900, temperature=0.5, top_k=3, samples=2, stop=("ok",), stop_tokens=(5,))
    portions: list[list[Request] | None] = [
        [Request([1, 2], SamplingConfig(log_probs=True), seed=9), Request([1] * 512)],
        [],
        [Request([3], two), Request([3], BeamConfig())],
        None,
    ]
    made = list(backend.serve(lambda room, idle: portions.pop(0)))
    assert [(each.prompt, each.sample, each.finish, each.text) for each in made] == [
        (1, 0, "error", None),
        (0, 0, "stop", "ok"),  # without the stop token
        (3, 0, "error", None),
        (2, 0, "length", "o"),
        (2, 1, "stop", ""),
    ]
    assert "512 tokens and the model's context is 512" in made[0].error and "searches" in made[2].error
    want = tuple(-0.5 * token for token in (*make_tokenizer().encode("ok"), END))
    assert made[1].model_log_probs == want and made[1].log_probs is None
    assert [prompt for prompt, _ in backend.engine.asked] == [{"prompt_token_ids": [1, 2]}, {"prompt_token_ids": [3]}]
    one, other = (vars(params) for _, params in backend.engine.asked)
    assert one == {
        "n": 1,
        "max_tokens": 128,
        "temperature": 0.0,
        "top_k": -1,
        "top_p": 1.0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "frequency_penalty": 0.0,
        "seed": 9,
        "stop": [],
        "stop_token_ids": [END],
        "ignore_eos": True,
        "logprobs": 0,
    }
    assert (other["n"], other["max_tokens"], other["top_k"], other["stop"]) == (2, 511, 3, ["ok"])
    assert (other["stop_token_ids"], other["logprobs"]) == ([5], None)


def test_refusals(model: TextModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)  # as if it were not installed
    with pytest.raises(ValueError, match="--backend vllm: vLLM is not installed here"):
        check_vllm(model, None)


@pytest.mark.usefixtures("vllm")
def test_a_draft_is_not_handed_on(model: TextModel, tmp_path: Path) -> None:
    check_vllm(model, None)
    with pytest.raises(ValueError, match="--draft is for Loom's own generator"):
        check_vllm(model, model)
