"""Texts after prompts with pictures: those of whole forwards without a cache, alone, in batches and over ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from data.pictures.types import Pictures
from models import Decoder
from models.generation import Completion, Generator, Request, SamplingConfig, Sight
from models.generation.dialogue import Dialogue
from parallel.sharding import SINGLE
from tests.pool import Pool
from tests.sight_cases import MODELS, NEW, SMALL, decoder, requests_of, texts

Pools = Callable[[int], Pool]
GREEDY = SamplingConfig(max_new_tokens=NEW)


def next_logits(model: Decoder, prompt: Sequence[Any], new: Sequence[int], sight: Sight | None) -> torch.Tensor:
    """After the last of all tokens, from one forward over them."""
    tokens = [*prompt, *new]
    positions, rotary = torch.arange(len(tokens)), None
    if sight is not None and sight.rotary_3L is not None:
        after = sight.rotary_3L.max() + 1 + torch.arange(len(new))
        rotary = torch.cat([sight.rotary_3L, after.repeat(3, 1)], 1)
    pictures = None if sight is None else sight.pictures
    with torch.no_grad():
        logits = model(
            torch.tensor(tokens), positions, [0, len(tokens)], output="head", pictures=pictures, rotary_3T=rotary
        )
    return logits[-1]


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_are_those_of_whole_forwards_and_batches_change_nothing(name: str) -> None:
    model, requests = decoder(name, SINGLE), requests_of(name)
    greedy = [Request(each.prompt, GREEDY, 0, each.sight) for each in requests]
    together = Generator(model, config=SMALL).generate(greedy)
    for request, made in zip(greedy, together, strict=True):
        new: list[int] = []
        for _ in range(NEW):
            new.append(int(next_logits(model, request.prompt, new, request.sight).argmax()))
        assert made.tokens == tuple(new)
    blind = Generator(model, config=SMALL).generate([replace(each, sight=None) for each in greedy])
    differs = [a.tokens != b.tokens for a, b in zip(together, blind, strict=True)]
    assert differs[0] and differs[2] and not differs[1]


@pytest.mark.parametrize("name", MODELS)
def test_samples_and_searches_are_those_of_prompts_alone(name: str) -> None:
    model, requests = decoder(name, SINGLE), requests_of(name)
    together = Generator(model, config=SMALL).generate(requests)
    alone = [each for request in requests for each in Generator(model).generate([request])]
    assert [each.tokens for each in together] == [each.tokens for each in alone]
    drafted = Generator(model, config=SMALL, draft=model).generate([replace(r, sampling=GREEDY) for r in requests])
    plain = Generator(model, config=SMALL).generate([replace(r, sampling=GREEDY) for r in requests])
    assert [each.tokens for each in drafted] == [each.tokens for each in plain]


@pytest.mark.parametrize("size", [2])
def test_texts_over_ranks(pool: Pools, size: int) -> None:
    for name in MODELS:
        want = texts(name, pooled=False)
        for found in pool(size).run(texts, name):
            assert [each.tokens for each in found] == [each.tokens for each in want]


def test_a_dialogue_looks_once() -> None:
    model = decoder("qwen2_vl", SINGLE)
    request = requests_of("qwen2_vl")[2]
    assert request.sight is not None and request.sight.rotary_3L is not None
    dialogue = Dialogue(Generator(model))
    first = [step.token for step in dialogue.stream(Request(request.prompt, GREEDY, 0, request.sight))]
    prompt = [*request.prompt, *(t for t in first if t is not None), 4, 9]
    more = torch.arange(len(prompt) - len(request.prompt)) + request.sight.rotary_3L.max() + 1
    sight = replace(request.sight, rotary_3L=torch.cat([request.sight.rotary_3L, more.repeat(3, 1)], 1))
    (want,) = Generator(model).generate([Request(prompt, GREEDY, 0, sight)])
    assert model.vision is not None
    looks: list[int] = []
    hook = model.vision.register_forward_hook(lambda *_: looks.append(1))
    assert tuple(step.token for step in dialogue.stream(Request(prompt, GREEDY, 0, sight))) == want.tokens
    assert not looks
    assert isinstance(sight.pictures, Pictures)
    other = replace(sight, pictures=replace(sight.pictures, patches_PX=-sight.pictures.patches_PX))
    found = tuple(step.token for step in dialogue.stream(Request(prompt, GREEDY, 0, other)))
    hook.remove()
    assert looks and found == Generator(model).generate([Request(prompt, GREEDY, 0, other)])[0].tokens


def test_pictures_that_cannot_be_seen() -> None:
    request = requests_of("llava")[0]
    assert request.sight is not None
    blind = decoder("llava", SINGLE)
    blind.cfg = replace(blind.cfg, vision=None)
    made: list[Completion] = Generator(blind).generate([request, [3, 4]], GREEDY)
    assert "sees none" in made[0].error and made[1].finish == "length"
    short = Request(request.prompt[:6], GREEDY, 0, request.sight)
    assert "of a prompt of 6" in Generator(decoder("llava", SINGLE)).generate([short])[0].error
