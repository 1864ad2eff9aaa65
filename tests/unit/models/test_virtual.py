"""Virtual tokens before documents that share a beginning, before empty ones, and before what a generator writes."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from models import Decoder, build
from models.adapters.attach import attach
from models.adapters.virtual import VirtualSource
from models.adapters.virtual_config import PrefixConfig, PromptConfig, VirtualConfig
from models.generation import BeamConfig, Generator, SamplingConfig
from models.init import InitSource
from parallel.materialise import materialise
from parallel.sharding import WHOLE
from parallel.switch import switched_off
from tests.cases import TINY

WINDOW = dataclasses.replace(TINY, family="qwen2", qkv_bias=True, sliding_window=9, full_attention_layers=1)
PROMPT, PREFIX = PromptConfig(tokens=5, tokens_init="random"), PrefixConfig(tokens=5, tokens_init="random")
ROWS = [(TINY, PROMPT), (TINY, PREFIX), (WINDOW, PROMPT), (WINDOW, PREFIX)]
IDS = ["prompt", "prefix", "prompt, windows", "prefix, windows"]


def made(cfg: Any, adapter: VirtualConfig) -> Decoder:
    """The tiny model with fresh virtual tokens."""
    cfg = dataclasses.replace(cfg, init_std=0.2)
    model = build(cfg)
    attach(model, adapter)
    materialise(model, VirtualSource(InitSource(cfg, 3), cfg, adapter, 5), WHOLE, torch.device("cpu"))
    return model


@pytest.mark.parametrize(("cfg", "adapter"), ROWS, ids=IDS)
def test_documents_with_a_beginning_in_common(cfg: Any, adapter: VirtualConfig) -> None:
    """The same losses and gradients whether each document has its beginning itself or one of them holds it."""
    one, other = [7, 3, 9, 4, 1, 8, 2, 6, 5, 5, 7, 9], [7, 3, 9, 4, 1, 8, 2, 30, 31]
    targets = torch.tensor([-100] * 7 + [1, 2, 3, 4, 5])
    apart = (
        torch.tensor(one + other),
        torch.tensor([*range(12), *range(9)]),
        torch.cat([targets, torch.tensor([-100] * 7 + [6, 7])]),
        {"cu_seqlens": [0, 12, 21]},
    )
    together = (
        torch.tensor(one + other[7:]),
        torch.tensor([*range(12), 7, 8]),
        torch.cat([targets, torch.tensor([6, 7])]),
        {"cu_seqlens": [0, 12, 14], "branches": [(0, 0), (0, 7)]},
    )
    found = []
    for tokens, positions, wanted, about in (apart, together):
        model = made(cfg, adapter)
        loss, loss_T = model(tokens, positions, targets_T=wanted, **about)
        loss.backward()
        grads = {name: param.grad for name, param in model.named_parameters() if param.grad is not None}
        found.append((loss, loss_T[wanted != -100], grads))
        with switched_off([model]):
            assert abs(float(model(tokens, positions, targets_T=wanted, **about)[0].detach() - loss.detach())) > 1e-3
    (loss, loss_S, grads), (shared_loss, shared_S, shared_grads) = found
    assert float(loss.detach()) == pytest.approx(float(shared_loss.detach()), rel=1e-6)
    torch.testing.assert_close(loss_S, shared_S, rtol=1e-5, atol=1e-6)
    assert grads.keys() == shared_grads.keys() and len(grads) == (1 if adapter is PROMPT else 4)
    for name, grad in grads.items():
        assert float((grad - shared_grads[name]).abs().max() / grad.abs().max()) < 1e-5, name


@pytest.mark.parametrize(("cfg", "adapter"), ROWS, ids=IDS)
def test_a_generator_writes_what_the_model_says(cfg: Any, adapter: VirtualConfig) -> None:
    """Rows that come and go, samples of one prompt, a beam: against the model run whole for every token."""
    model = made(cfg, adapter).eval().requires_grad_(False)
    prompts, count = [[1, 2, 3], [5] * 20, [7], [9, 4, 3, 2, 1, 6, 6, 7, 8]], 9

    def written(prompt: list[int]) -> list[int]:
        tokens = list(prompt)
        for _ in range(count):
            logits = model(torch.tensor(tokens), torch.arange(len(tokens)), [0, len(tokens)], output="head")
            tokens.append(int(logits[-1].argmax()))
        return tokens[len(prompt) :]

    expected = [written(prompt) for prompt in prompts]
    generator = Generator(model, stop_tokens=())
    greedy = SamplingConfig(max_new_tokens=count, temperature=0)
    assert [list(each.tokens) for each in generator.generate(prompts, greedy)] == expected
    drawn = generator.generate([prompts[3]], dataclasses.replace(greedy, samples=3))
    assert [list(each.tokens) for each in drawn] == [expected[3]] * 3
    (best, *_) = generator.generate([prompts[0]], BeamConfig(max_new_tokens=4, num_beams=3))
    text = torch.tensor([*prompts[0], *best.tokens])
    logits = model(text, torch.arange(len(text)), [0, len(text)], output="head").log_softmax(-1)
    total = float(logits[torch.arange(2, len(text) - 1), text[3:]].sum())
    assert best.score is not None and best.score * 4 == pytest.approx(total, rel=1e-4)
    (long,) = generator.generate([[1] * (TINY.max_seq_len - 4)])
    assert long.error is not None and f"context is {TINY.max_seq_len - 5}" in long.error


def test_an_empty_document_has_no_virtual_tokens() -> None:
    model = made(TINY, PROMPT)
    tokens, positions, targets = torch.tensor([4, 7]), torch.arange(2), torch.tensor([7, 1])
    one = model(tokens, positions, [0, 2], targets_T=targets)[0]
    two = model(tokens, positions, [0, 0, 2, 2], targets_T=targets)[0]
    assert float(one.detach()) == pytest.approx(float(two.detach()), rel=1e-6)
