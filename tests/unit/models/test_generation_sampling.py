"""What a token is drawn from: filters and penalties as in transformers, frequencies against exact probabilities."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from models import ModelConfig, build
from models.generation import Generator, GeneratorConfig, Request, SamplingConfig, sampling_config
from models.generation.sampling import Source, choose, draw, filtered, penalised, uniform_of
from models.init import InitSource
from parallel.materialise import materialise
from parallel.sharding import WHOLE

SETTINGS = {
    "temperature": {"temperature": 0.7},
    "top_k": {"temperature": 1.4, "top_k": 5},
    "top_p": {"temperature": 1.0, "top_p": 0.8},
    "tiny_top_p": {"temperature": 1.0, "top_p": 1e-4},
    "min_p": {"temperature": 2.0, "min_p": 0.2},
    "all": {"temperature": 1.5, "top_k": 30, "top_p": 0.9, "min_p": 0.05},
}


def theirs(cfg: SamplingConfig) -> Any:
    made: list[Any] = [TemperatureLogitsWarper(float(cfg.temperature))]
    made += [TopKLogitsWarper(cfg.top_k)] if cfg.top_k else []
    made += [TopPLogitsWarper(cfg.top_p)] if cfg.top_p < 1 else []
    made += [MinPLogitsWarper(cfg.min_p)] if cfg.min_p else []
    return LogitsProcessorList(made)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("vocab", [50, 5000])
@pytest.mark.parametrize("spread", [0.3, 4.0])
def test_filters_are_those_of_transformers(name: str, vocab: int, spread: float) -> None:
    """Flat and peaked distributions; top-p looks among the first 1,024 tokens only where these suffice."""
    cfg = SamplingConfig(**SETTINGS[name])
    logits = spread * torch.randn(7, vocab, generator=torch.Generator().manual_seed(1))
    want = theirs(cfg)(torch.zeros(7, 1).long(), logits.double())  # in fp32 their sums are off by a token
    got, want = (x.softmax(-1).double() for x in (filtered(logits, cfg), want))
    assert torch.equal(got.argmax(-1), want.argmax(-1))
    unequal = (got > 0) != (want > 0)  # of two tokens with the same fp32 probability either may be the last
    assert unequal.sum() <= 2 and got[unequal].sum() == pytest.approx(want[unequal].sum())
    torch.testing.assert_close(got[~unequal], want[~unequal], rtol=1e-5, atol=1e-7)


def test_repetition_penalty_is_that_of_transformers() -> None:
    logits = torch.randn(2, 20, generator=torch.Generator().manual_seed(1))
    cfg = SamplingConfig(repetition_penalty=1.7)
    rows = [Source(0, 0, [3, 4, 4], [7]), Source(0, 0, [19], [0, 3, 3])]
    ids = torch.tensor([[3, 4, 4, 7], [19, 0, 3, 3]])
    theirs_penalised: Any = RepetitionPenaltyLogitsProcessor(1.7)
    want = theirs_penalised(ids, logits.clone())
    before = logits.clone()
    torch.testing.assert_close(penalised(logits, cfg, rows), want)
    assert torch.equal(logits, before)


def test_frequency_penalty_counts_the_text_alone() -> None:
    cfg = SamplingConfig(frequency_penalty=0.5)
    rows = [Source(0, 0, [1, 1], [2, 3, 2]), Source(0, 0, [1], [])]
    got = penalised(torch.zeros(2, 5), cfg, rows)
    assert got.tolist() == [[0, 0, -1.0, -0.5, 0], [0.0] * 5]


@given(st.lists(st.floats(0, 10), min_size=1, max_size=700), st.floats(0, 1, exclude_max=True))
def test_draws_are_the_inverse_of_the_cumulated_probabilities(weights: list[float], uniform: float) -> None:
    probs = torch.tensor([weights, [1.0] * len(weights)])
    if probs[0].sum() < 1e-3:
        return
    got = draw(probs, torch.tensor([uniform, uniform], dtype=torch.float64)).tolist()
    for row, token in zip(probs.double(), got, strict=True):
        assert row[token] > 0
        target, before = uniform * row.sum().item(), row[:token].sum().item()
        slack = 1e-9 * row.sum().item()
        assert before - slack <= target <= before + row[token].item() + slack


def test_the_last_tokens_of_zero_probability_are_never_drawn() -> None:
    probs = torch.zeros(1, 1000)
    probs[0, 3], probs[0, 300] = 0.25, 1e-30
    assert draw(probs, torch.tensor([math.nextafter(1.0, 0)], dtype=torch.float64)).item() in (3, 300)


def chi_square(counts: torch.Tensor, probs: torch.Tensor) -> float:
    """Pearson's statistic over the cells that expect five or more, the others joined; in standard deviations above its
    mean, by the cube-root rule (Wilson and Hilferty 1931)."""
    expected = probs.double() * counts.sum()
    big = expected >= 5
    seen = torch.cat([counts[big].double(), counts[~big].sum()[None].double()])
    want = torch.cat([expected[big], expected[~big].sum()[None]])
    assert seen[want == 0].sum() == 0  # nothing that cannot come has come
    seen, want = seen[want > 0], want[want > 0]
    statistic, freedom = float(((seen - want) ** 2 / want).sum()), len(want) - 1
    spread = 2 / (9 * freedom)
    return ((statistic / freedom) ** (1 / 3) - (1 - spread)) / spread**0.5


@pytest.mark.parametrize("name", SETTINGS)
def test_frequencies_are_the_probabilities(name: str) -> None:
    """20,000 draws of rows with seeds 0, 1, ...: below 4 standard deviations."""
    if name == "tiny_top_p":
        return
    cfg = SamplingConfig(**SETTINGS[name])
    logits = 1.5 * torch.randn(1, 300, generator=torch.Generator().manual_seed(2))
    rows = [Source(seed, 0, [], []) for seed in range(20000)]
    tokens = choose(logits.expand(20000, -1), cfg, rows).tokens
    counts = torch.tensor(tokens).bincount(minlength=300)
    exact = theirs(cfg)(torch.zeros(1, 1).long(), logits.double()).softmax(-1)[0]
    assert chi_square(counts, exact) < 4
    assert chi_square(counts, logits.div(3.0).softmax(-1)[0]) > 10


def test_frequencies_of_a_whole_model() -> None:
    """Samples of one prompt against the model's exact distribution over texts of two tokens."""
    cfg = ModelConfig("llama", 12, 16, 24, 1, 2, 1, 8, 16, init_std=0.4)
    model = build(cfg)
    materialise(model, InitSource(cfg, 3), WHOLE, torch.device("cpu"))
    asked = Request([5, 2], SamplingConfig(max_new_tokens=2, temperature=1.0, samples=3000), seed=8)
    made = Generator(model, config=GeneratorConfig(max_rows=500)).generate([asked])
    counts = torch.zeros(12, 12)
    for each in made:
        counts[each.tokens] += 1
    with torch.no_grad():
        first = model(torch.tensor([5, 2]), torch.arange(2), [0, 2], output="head")[-1].softmax(-1)
        second = torch.stack(
            [model(torch.tensor([5, 2, t]), torch.arange(3), [0, 3], output="head")[-1] for t in range(12)]
        ).softmax(-1)
    assert chi_square(counts.flatten().long(), (first[:, None] * second).flatten()) < 4


def test_uniform_numbers_depend_on_seed_sample_and_place() -> None:
    every = {uniform_of(seed, sample, place) for seed in range(10) for sample in range(10) for place in range(10)}
    assert len(every) == 1000 and min(every) >= 0 and max(every) < 1
    assert uniform_of(1, 2, 3) == uniform_of(1, 2, 3)
    assert abs(sum(every) / 1000 - 0.5) < 0.04


def test_log_probs() -> None:
    """Under the distribution that was drawn from, and under the model's own; 0 for greedy."""
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    row = [Source(3, 0, [3], [])]
    cfg = SamplingConfig(temperature=0.5, top_k=2, repetition_penalty=1.5, log_probs=True)
    drawn = choose(logits, cfg, row)
    # The penalty makes 3 a 2, so that top-k leaves tokens 2 and 3 with equal chances.
    assert drawn.tokens[0] in (2, 3)
    assert drawn.log_probs == pytest.approx([math.log(0.5)])
    assert drawn.model_log_probs == pytest.approx([logits.log_softmax(-1)[0, drawn.tokens[0]].item()])
    greedy = choose(logits, SamplingConfig(log_probs=True), row)
    assert greedy.tokens == [3] and greedy.log_probs == [0.0]
    assert greedy.model_log_probs == pytest.approx([logits.log_softmax(-1)[0, 3].item()])
    assert choose(logits, SamplingConfig(), row).log_probs is None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_new_tokens", 0), ("temperature", -0.1), ("temperature", math.nan), ("top_k", -1), ("top_p", 0.0),
        ("top_p", 1.1), ("min_p", -0.1), ("min_p", 1.1), ("repetition_penalty", 0.0), ("samples", 0), ("stop", ("",)),
        ("stop_tokens", (-1,)), ("frequency_penalty", math.inf),
    ],
)  # fmt: skip
def test_impossible_values(key: str, value: Any) -> None:
    base = {"temperature": 1.0, key: value}
    assert [problem[0] for problem in SamplingConfig(**base).problems()] == [key]


def test_settings_without_effect_are_told() -> None:
    assert [problem[0] for problem in SamplingConfig(top_k=5, top_p=0.9, min_p=0.1).problems()] == [
        "top_k", "top_p", "min_p",
    ]  # fmt: skip
    assert SamplingConfig().problems() == []


def test_settings_from_a_mapping() -> None:
    given_ = {"temperature": 1, "stop": ["a"], "stop_tokens": None, "max_new_tokens": 3, "log_probs": True}
    assert sampling_config(given_) == SamplingConfig(3, temperature=1.0, stop=("a",), log_probs=True)
    assert sampling_config({"stop_tokens": [1, 2]}).stop_tokens == (1, 2)
    bad = {"temprature": 1, "top_k": 2.5, "stop": "a", "seed": True, "log_probs": 1, "stop_tokens": ["a"], "top_p": "x"}
    with pytest.raises(ValueError) as caught:
        sampling_config(bad)
    message = str(caught.value)
    assert all(f"  {key}" in message for key in bad)
    with pytest.raises(ValueError, match=r"top_p=2.0: is a probability"):
        sampling_config({"temperature": 1, "top_p": 2})
