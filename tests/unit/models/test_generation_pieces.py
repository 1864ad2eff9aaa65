"""Prompts held once for their rows: attention against plain softmax, and texts against the model's own forward."""

import dataclasses
from typing import Any

import pytest
import torch

from models import Decoder, ModelConfig
from models.generation import Completion, Generator, GeneratorConfig, Request, SamplingConfig, batch, cache
from models.generation.pieces import Common, attend_both
from tests.unit.models.test_generation import PLAIN, SLIDING, model_of

WIDE = dataclasses.replace(PLAIN, max_seq_len=128)
WIDE_SLIDING = dataclasses.replace(SLIDING, max_seq_len=128)


@pytest.mark.parametrize("prompt_B", [(0, 0, 1, 1), (0, 0, 0, 2, 1), (2, 0, 2, 1, 0, 2), (1, 1)])
@pytest.mark.parametrize("tokens", [(5, 5, 5), (4, 9, 1)])
def test_one_softmax_goes_over_prompt_and_own_tokens(prompt_B: tuple[int, ...], tokens: tuple[int, ...]) -> None:
    """Rows in any order, prompts of any lengths, against every row by itself."""
    draw = torch.Generator().manual_seed(1)

    def made(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw)

    rows, own = len(prompt_B), 3
    common = Common.of(prompt_B, tokens, torch.device("cpu"))
    some = slice(common.start, common.stop)
    queries, own_keys, own_values = made(rows, 2, 3, 8), made(rows, 2, own, 8), made(rows, 2, own, 6)
    keys, values = made(3, 2, 12, 8), made(3, 2, 12, 6)
    theirs = (x[some, :, : common.longest] for x in (keys, values))
    got = attend_both(queries, queries @ own_keys.mT, own_values, common, *theirs)
    for row, prompt in enumerate(prompt_B):
        seen = [
            torch.cat([x[prompt, :, : tokens[prompt]], y[row]], 1) for x, y in ((keys, own_keys), (values, own_values))
        ]
        want = (queries[row] @ seen[0].mT).softmax(-1) @ seen[1]
        torch.testing.assert_close(got[row], want)


def log_probs(model: Decoder, made: Completion) -> list[float]:
    """What the model says of the new tokens in one forward of the whole text."""
    tokens = torch.tensor(made.prompt_tokens + made.tokens)
    with torch.no_grad():
        logits = model(tokens, torch.arange(len(tokens)), [0, len(tokens)], output="head").log_softmax(-1)
    at = range(len(made.prompt_tokens), len(tokens))
    return [logits[place - 1, tokens[place]].item() for place in at]


@pytest.mark.parametrize("cfg", [WIDE, WIDE_SLIDING], ids=["full", "sliding"])
@pytest.mark.parametrize("rows", [3, 7, 64])
def test_texts_of_shared_prompts(cfg: ModelConfig, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows end anywhere and others take their places, so that rows of several prompts are mixed, and single ones."""
    met: list[int] = []
    real = cache.attend_both

    def counted(queries: torch.Tensor, *rest: Any) -> torch.Tensor:
        met.append(len(queries))
        return real(queries, *rest)

    monkeypatch.setattr(cache, "attend_both", counted)
    model, draw = model_of(cfg), torch.Generator().manual_seed(5)
    drawn = SamplingConfig(max_new_tokens=20, temperature=1.5, stop_tokens=(*range(10),), log_probs=True)
    requests = [
        Request(torch.randint(10, 96, (n,), generator=draw).tolist(), dataclasses.replace(drawn, samples=samples), n)
        for n, samples in ((60, 8), (90, 4), (7, 1), (52, 6), (5, 2), (100, 5))
    ]
    made = Generator(model, config=GeneratorConfig(max_rows=rows)).generate(requests)
    assert met and max(met) > 1 and len({len(each.tokens) for each in made}) > 8
    for each in made:
        assert each.model_log_probs == pytest.approx(log_probs(model, each), abs=1e-4)
    monkeypatch.setattr(batch, "APART", 10**9)
    met.clear()
    apart = Generator(model, config=GeneratorConfig(max_rows=rows)).generate(requests)
    assert not met and [each.tokens for each in apart] == [each.tokens for each in made]
