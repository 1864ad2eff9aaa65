"""Several new tokens a row against the cache: logits are those of one forward over the whole text, and what is not
committed leaves no trace."""

import dataclasses
from collections.abc import Sequence

import pytest
import torch

from models import Decoder, ModelConfig, RopeConfig, build
from models.config import MLAConfig, MoEConfig
from models.generation.cache import Cache
from models.generation.extend import commit, extend
from models.generation.forward import decode, prefill
from models.init import InitSource
from parallel.materialise import materialise
from parallel.sharding import WHOLE

PLAIN = ModelConfig("llama", 60, 32, 48, 2, 4, 2, 8, 128, init_std=0.3)
LATENT = MLAConfig(kv_rank=12, nope_dim=8, rope_dim=4, value_dim=6)
CAPACITY = MoEConfig(num_experts=4, top_k=2, expert_size=16, capacity=0.5)
CASES = {
    "full": PLAIN,
    "sliding": dataclasses.replace(PLAIN, family="qwen2", sliding_window=6, full_attention_layers=1),
    "narrow": dataclasses.replace(PLAIN, family="qwen2", sliding_window=2),
    "latent": dataclasses.replace(PLAIN, family="deepseek_v2", num_kv_heads=4, head_dim=12, mla=LATENT),
    "experts": dataclasses.replace(PLAIN, family="mixtral", moe=CAPACITY),
    "normed": dataclasses.replace(PLAIN, family="qwen3", qk_norm=True),
}
PROMPTS, NEW = (5, 1, 20, 7), (3, 5, 1, 4)


def model_of(cfg: ModelConfig) -> Decoder:
    model = build(cfg)
    materialise(model, InitSource(cfg, 1), WHOLE, torch.device("cpu"))
    return model


def texts(lengths: Sequence[int], seed: int = 5) -> list[list[int]]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 60, (n,), generator=draw).tolist() for n in lengths]


def filled(model: Decoder, prompts: Sequence[Sequence[int]]) -> Cache:
    cache = Cache(model, 4096)
    cache.fit(len(prompts), max(map(len, prompts)))
    prefill(model, prompts, range(len(prompts)), cache)
    return cache


def one_by_one(model: Decoder, prompts: Sequence[Sequence[int]], new: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """The logits after each new token of each row, by the plain step, row by row."""
    found = []
    for prompt, own in zip(prompts, new, strict=True):
        cache = filled(model, [prompt])
        cache.fit(1, len(prompt) + len(own))
        found.append(torch.cat([decode(model, [t], [len(prompt) + i], cache) for i, t in enumerate(own)]))
    return found


def whole(model: Decoder, text: Sequence[int]) -> torch.Tensor:
    """The logits after each token, without a cache."""
    with torch.no_grad():
        return model(torch.tensor(text), torch.arange(len(text)), [0, len(text)], output="head")


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_a_forward_over_the_whole_text(case: str) -> None:
    """Rows of unequal lengths and unequal numbers of new tokens; windows shorter than what is new."""
    model = model_of(CASES[case])
    prompts, new = texts(PROMPTS), texts(NEW, 8)
    logits, tail = extend(model, new, PROMPTS, filled(model, prompts))
    assert tail.counts == NEW and tail.cached == PROMPTS
    for got, prompt, own, stepped in zip(logits.split(NEW), prompts, new, one_by_one(model, prompts, new), strict=True):
        torch.testing.assert_close(got, stepped, rtol=0, atol=1e-4)
        if case != "experts":  # an expert of a whole text is full sooner than one of a single token
            torch.testing.assert_close(got, whole(model, [*prompt, *own])[-len(own) :], rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_some_are_kept_and_the_rest_leaves_no_trace(case: str) -> None:
    """After every number of tokens kept, steps and further new tokens go on as if the dropped ones had never been."""
    model = model_of(CASES[case])
    prompts, new, later = texts(PROMPTS), texts(NEW, 8), texts((3,) * 4, 9)
    for kept in ((3, 2, 1, 4), (1, 5, 0, 2)):
        cache = filled(model, prompts)
        _, tail = extend(model, new, PROMPTS, cache)
        lengths = [n + k for n, k in zip(PROMPTS, kept, strict=True)]
        cache.fit(4, max(lengths) + 1)
        commit(cache, tail, kept)
        dropped, _ = extend(model, later, lengths, cache)
        again, _ = extend(model, later, lengths, cache)
        assert torch.equal(dropped, again)
        stepped = decode(model, [own[0] for own in later], lengths, cache)
        want = one_by_one(model, prompts, [[*a[:k], *b] for a, b, k in zip(new, later, kept, strict=True)])
        for got, step, logits in zip(dropped.split(3), stepped, want, strict=True):
            torch.testing.assert_close(got, logits[-3:], rtol=0, atol=1e-4)
            torch.testing.assert_close(step, logits[-3], rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_a_tail_grows(case: str) -> None:
    """Token after token, none of them in the cache."""
    model = model_of(CASES[case])
    prompts, new = texts(PROMPTS), texts((5,) * 4, 8)
    cache, tail, steps = filled(model, prompts), None, []
    for i in range(5):
        logits, tail = extend(model, [own[i : i + 1] for own in new], PROMPTS, cache, tail)
        steps.append(logits)
    together, at_once = extend(model, new, PROMPTS, cache)
    torch.testing.assert_close(torch.stack(steps, 1).flatten(0, 1), together, rtol=0, atol=1e-4)
    assert tail is not None and tail.counts == (5,) * 4
    for grown, made in zip(tail.layers, at_once.layers, strict=True):
        for own, other in zip(grown, made, strict=True):
            torch.testing.assert_close(own, other, rtol=0, atol=1e-5)


def test_rotation_that_depends_on_the_length() -> None:
    """Dynamic scaling turns a token by the length at which it comes, however many come together."""
    rope = RopeConfig(scaling="dynamic", factor=2.0, original_max_seq_len=8)
    model = model_of(dataclasses.replace(PLAIN, rope=rope))
    prompts, new = texts(PROMPTS), texts(NEW, 8)
    logits, _ = extend(model, new, PROMPTS, filled(model, prompts))
    for got, stepped in zip(logits.split(NEW), one_by_one(model, prompts, new), strict=True):
        torch.testing.assert_close(got, stepped, rtol=0, atol=1e-4)
