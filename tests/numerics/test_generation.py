"""Greedy texts against `transformers.generate`, token for token, weights crossing a saved folder."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from data.tokenizer import load_tokenizer
from models import ModelConfig, Runtime, config_from_hf_folder
from models.generation import Generator, GeneratorConfig, Request, SamplingConfig
from tests.convert_cases import SMOLLM2
from tests.numerics.test_hf_parity import DEEPSEEK3, LLAMA, OPTIONS, ROPES, TINY, load_ours, save_theirs

MODELS = [*TINY, "qwen2_all_sliding", "qwen3_sliding", "llama_biases", "llama_multi_head", "deepseek2_latent_queries"]
NEW = 16
LENGTHS = (3, 40, 1, 17, 90, 8, 25)
"""Of the prompts: shorter and longer than the windows of the tiny models."""
SMALL = GeneratorConfig(max_rows=3, prefill_tokens=50)
"""Rows come and go: seven prompts, three places."""


def prompts_of(cfg: ModelConfig) -> list[list[int]]:
    draw = torch.Generator().manual_seed(3)
    return [torch.randint(0, cfg.vocab_size, (n,), generator=draw).tolist() for n in LENGTHS]


def theirs_of(theirs: Any, prompt: list[int], new: int, stop: int | None = None) -> list[int]:
    """What transformers makes of one prompt alone."""
    settings = theirs.generation_config
    settings.eos_token_id, settings.pad_token_id = stop, 0
    ids = torch.tensor([prompt])
    with torch.no_grad():
        found = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
    return found[0, len(prompt) :].tolist()


@pytest.mark.parametrize("option", MODELS)
def test_greedy_equals_transformers(tmp_path: Path, option: str) -> None:
    """Rows of all lengths, packed and come one after another into the cache, against each prompt alone. The longest
    prompt is held once for several rows."""
    cfg = OPTIONS[option]
    theirs = save_theirs(cfg, tmp_path)
    ours = Generator(load_ours(tmp_path, cfg, Runtime()), config=SMALL)
    prompts, samples = prompts_of(cfg), [4 if n == max(LENGTHS) else 1 for n in LENGTHS]
    settings = [SamplingConfig(max_new_tokens=NEW, samples=many) for many in samples]
    found = ours.generate([Request(*each) for each in zip(prompts, settings, strict=True)])
    assert [made.sample for made in found] == [i for many in samples for i in range(many)]
    want = [theirs_of(theirs, prompt, NEW) for prompt in prompts]
    for made in found:
        assert list(made.tokens) == want[made.prompt]
        assert made.finish == "length" and made.prompt_tokens == tuple(prompts[made.prompt])
    assert len({made.tokens for made in found}) == len(prompts)


def test_greedy_equals_transformers_on_smollm2() -> None:
    """A real model and its tokenizer, texts in and out."""
    theirs = AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32).eval()
    tokenizer = load_tokenizer(str(SMOLLM2))
    model = load_ours(SMOLLM2, config_from_hf_folder(SMOLLM2), Runtime())
    asked = [
        "The capital of France is",
        "def fib(n):",
        "Once upon a time there was a ship that sailed to the south and",
    ]
    found = Generator(model, tokenizer, SMALL).generate(asked, SamplingConfig(max_new_tokens=8))
    for prompt, made in zip(asked, found, strict=True):
        want = theirs_of(theirs, tokenizer.encode(prompt), 8, tokenizer.eos_token_id)
        assert list(made.tokens) == want
        assert made.text == tokenizer.decode(want, skip_special_tokens=True)
    assert found[0].text is not None and "Paris" in found[0].text


@pytest.mark.parametrize("family", [LLAMA, DEEPSEEK3], ids=lambda cfg: cfg.family)
@pytest.mark.parametrize("rope", ["dynamic", "yarn"])
def test_texts_that_grow_past_the_trained_length(tmp_path: Path, rope: str, family: ModelConfig) -> None:
    """Dynamic scaling turns each new token by the length of its own row."""
    trained = dataclasses.replace(ROPES[rope], original_max_seq_len=32)
    cfg = dataclasses.replace(family, rope=trained, max_seq_len=32 if rope == "dynamic" else 512)
    theirs = save_theirs(cfg, tmp_path)
    wider = dataclasses.replace(cfg, max_seq_len=512)
    ours = load_ours(tmp_path, cfg, Runtime())
    ours.cfg = wider  # what may be generated; the rotation keeps the trained length
    prompts = prompts_of(cfg)[:3]
    found = Generator(ours, config=SMALL).generate(prompts, SamplingConfig(max_new_tokens=NEW))
    for prompt, made in zip(prompts, found, strict=True):
        assert list(made.tokens) == theirs_of(theirs, prompt, NEW)


def test_a_stop_token_ends_a_row_where_it_ends_theirs(tmp_path: Path) -> None:
    theirs = save_theirs(LLAMA, tmp_path)
    prompts = prompts_of(LLAMA)
    model = load_ours(tmp_path, LLAMA, Runtime())
    whole = Generator(model, config=SMALL).generate(prompts, SamplingConfig(max_new_tokens=NEW))
    stop = whole[2].tokens[4]
    found = Generator(model, config=SMALL, stop_tokens=[stop]).generate(prompts, SamplingConfig(max_new_tokens=NEW))
    assert found[2].tokens == whole[2].tokens[:5] and found[2].finish == "stop"
    for prompt, made in zip(prompts, found, strict=True):
        assert list(made.tokens) == theirs_of(theirs, prompt, NEW, stop)
        assert made.finish == ("stop" if made.tokens[-1] == stop else "length")


def test_bf16_weights(tmp_path: Path) -> None:
    """The cache is bf16 too; the first tokens are those of a forward without a cache, in bf16."""
    save_theirs(LLAMA, tmp_path)
    model = load_ours(tmp_path, LLAMA, Runtime()).to(torch.bfloat16)
    prompt = prompts_of(LLAMA)[1]
    settings = SamplingConfig(max_new_tokens=NEW, log_probs=True)
    made = Generator(model, config=SMALL).generate([prompt], settings)[0]
    tokens = [*prompt, *made.tokens[:-1]]
    with torch.no_grad():
        logits = model(torch.tensor(tokens), torch.arange(len(tokens)), [0, len(tokens)], output="head").float()
    want = logits.log_softmax(-1)[len(prompt) - 1 :].gather(1, torch.tensor(made.tokens)[:, None]).squeeze(1)
    assert made.model_log_probs is not None
    torch.testing.assert_close(torch.tensor(made.model_log_probs), want, rtol=0, atol=0.1)


@pytest.mark.parametrize("option", MODELS)
def test_log_probs_are_those_of_one_forward(tmp_path: Path, option: str) -> None:
    """1e-4 nats, for every drawn token of every row, against the model over prompt and text at once (no cache)."""
    cfg = OPTIONS[option]
    save_theirs(cfg, tmp_path)
    model = load_ours(tmp_path, cfg, Runtime(attention="eager"))
    settings = SamplingConfig(max_new_tokens=NEW, temperature=1.0, samples=2, log_probs=True)
    for made in Generator(model, config=SMALL).generate(prompts_of(cfg), settings):
        tokens = torch.tensor([*made.prompt_tokens, *made.tokens])
        with torch.no_grad():
            logits = model(tokens, torch.arange(len(tokens)), [0, len(tokens)], output="head")
        scores = logits[len(made.prompt_tokens) - 1 : -1].log_softmax(-1)
        want = scores.gather(1, torch.tensor(made.tokens)[:, None]).squeeze(1)
        assert made.model_log_probs is not None and made.log_probs is not None
        torch.testing.assert_close(torch.tensor(made.model_log_probs), want, rtol=0, atol=1e-4)
        torch.testing.assert_close(torch.tensor(made.log_probs), want, rtol=0, atol=1e-4)
