"""A draft changes how fast a text comes and never what it is drawn from."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from models import Decoder, ModelConfig, build
from models.generation import (
    BeamConfig,
    Completion,
    DraftStats,
    Generator,
    GeneratorConfig,
    Request,
    SamplingConfig,
    Step,
    drafting,
)
from models.generation.cache import Cache
from models.generation.drafting import Proposal
from models.generation.rows import Row
from models.generation.speculative import judged
from models.generation.team import Team
from models.init import InitSource
from parallel.materialise import materialise
from parallel.sharding import WHOLE
from tests.unit.models.test_generation import PLAIN, Letters, prompts, tokens
from tests.unit.models.test_generation_extend import CASES, model_of
from tests.unit.models.test_generation_sampling import SETTINGS, chi_square, theirs

SMALL = ModelConfig("qwen2", 96, 16, 24, 1, 2, 1, 8, 64, init_std=0.3, sliding_window=5)
SAMPLED = SamplingConfig(
    max_new_tokens=13, temperature=1.3, top_p=0.95, repetition_penalty=1.2, frequency_penalty=0.3, log_probs=True
)
GREEDY = SamplingConfig(max_new_tokens=13, log_probs=True)


def near(model: Decoder, by: float) -> Decoder:
    """A draft that often agrees: the model with its weights shaken."""
    made = model_of(model.cfg)
    draw = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for own, param in zip(made.parameters(), model.parameters(), strict=True):
            own.copy_(param * (1 + by * torch.randn(param.shape, generator=draw)))
    return made


def drafts_of(model: Decoder) -> dict[str, Decoder]:
    other = dataclasses.replace(SMALL, vocab_size=model.cfg.vocab_size)
    return {"itself": model, "near": near(model, 0.02), "unlike, with a window": model_of(other)}


def generator(
    model: Decoder, draft: Decoder | None, rows: int = 64, ahead: int = 4, letters: bool = False
) -> Generator:
    config = GeneratorConfig(max_rows=rows, prefill_tokens=13, draft_tokens=ahead)
    return Generator(model, Letters() if letters else None, config, draft=draft)


@pytest.mark.parametrize("case", CASES)
def test_greedy_texts_are_those_without_a_draft(case: str) -> None:
    """Rows of unequal lengths that come and go, drafts good and bad: the same tokens and log-probabilities."""
    model = model_of(CASES[case])
    asked = [
        Request(p, dataclasses.replace(GREEDY, max_new_tokens=n))
        for p, n in zip([[token % 60 for token in prompt] for prompt in prompts()], (13, 1, 2, 18, 9, 6), strict=True)
    ]
    want = Generator(model).generate(asked)
    for draft, rows, ahead in zip(drafts_of(model).values(), (64, 3, 2), (4, 7, 1), strict=True):
        made = generator(model, draft, rows, ahead).generate(asked)
        assert tokens(made) == tokens(want)
        for one, other in zip(made, want, strict=True):
            assert one.log_probs == other.log_probs
            assert one.model_log_probs == pytest.approx(other.model_log_probs, abs=1e-4)
            assert (one.finish, one.prompt_tokens) == (other.finish, other.prompt_tokens)


@pytest.fixture(scope="module")
def plain() -> Decoder:
    return model_of(PLAIN)


@pytest.mark.parametrize("name", ["near", "unlike, with a window"])
def test_a_row_does_not_depend_on_its_batch(plain: Decoder, name: str) -> None:
    draft = drafts_of(plain)[name]
    requests = [
        Request(prompt, dataclasses.replace(SAMPLED, samples=2, max_new_tokens=6 + seed), seed)
        for seed, prompt in enumerate(prompts((5, 1, 12, 20)))
    ]
    alone = [made for request in requests for made in generator(plain, draft).generate([request])]
    for rows in (3, 64):
        together = generator(plain, draft, rows).generate(requests)
        assert tokens(together) == tokens(alone)
        for one, other in zip(alone, together, strict=True):
            assert one.log_probs == pytest.approx(other.log_probs, abs=1e-4)
    assert len(set(tokens(alone))) == 8


def test_with_the_model_as_draft_a_text_is_the_one_without(plain: Decoder) -> None:
    """Every proposal is accepted, and it was drawn by the chance that the token itself would have been drawn by."""
    want = Generator(plain).generate(prompts(), SAMPLED)
    made = (own := generator(plain, plain)).generate(prompts(), SAMPLED)
    assert tokens(made) == tokens(want)
    # 13 tokens: one from the prompt, then turns of 5, 5 and what is left, 2.
    stats = own.draft_stats
    assert (stats.forwards, stats.tokens, stats.proposed, stats.accepted) == (18, 72, 54, 54)
    assert stats.acceptance_rate == 1 and stats.tokens_per_forward == 4


def test_what_a_draft_was_worth(plain: Decoder) -> None:
    rates = {}
    for name, draft in drafts_of(plain).items():
        made = (own := generator(plain, draft)).generate(prompts(), GREEDY)
        stats = own.draft_stats
        assert stats.tokens == sum(len(each.tokens) - 1 for each in made) == 72
        assert stats.forwards + stats.accepted == stats.tokens
        rates[name] = stats.acceptance_rate
    assert rates["unlike, with a window"] < 0.2 < rates["near"] < rates["itself"] == 1
    without = Generator(plain)
    without.generate(prompts(), GREEDY)
    assert without.draft_stats.forwards == 0 and without.draft_stats.tokens_per_forward == 0


VOCAB = 5
TINY = ModelConfig("llama", VOCAB, 16, 24, 1, 2, 1, 8, 16, init_std=0.5)
PROMPT = [4, 2]


def tiny(seed: int) -> Decoder:
    model = build(TINY)
    materialise(model, InitSource(TINY, seed), WHOLE, torch.device("cpu"))
    return model


def exact(model: Decoder, cfg: SamplingConfig, length: int) -> torch.Tensor:
    """The probability of every text of `length` tokens [V ** length], from forwards over whole texts and the filters of
    transformers."""
    probs = torch.ones(VOCAB**length, dtype=torch.float64)
    for number, text in enumerate(itertools.product(range(VOCAB), repeat=length)):
        ids = torch.tensor([*PROMPT, *text])
        with torch.no_grad():
            logits = model(ids, torch.arange(len(ids)), [0, len(ids)], output="head")[len(PROMPT) - 1 : -1]
        if cfg.repetition_penalty != 1:
            for place, logits_V in enumerate(logits):
                seen = sorted({*PROMPT, *text[:place]})
                logits_V[seen] = torch.where(
                    logits_V[seen] > 0, logits_V[seen] / cfg.repetition_penalty, logits_V[seen] * cfg.repetition_penalty
                )
        own = theirs(cfg)(torch.zeros(length, 1).long(), logits.double()).softmax(-1)
        probs[number] = own[torch.arange(length), list(text)].prod()
    return probs


FILTERS: dict[str, Any] = {"top_k": 4, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.3}


@pytest.mark.parametrize(("draft", "settings"), [("good", {}), ("bad", {}), ("bad", FILTERS)])
def test_texts_have_the_distribution_they_have_without_a_draft(draft: str, settings: dict[str, Any]) -> None:
    """2,000 samples of texts of three tokens, of which two may be proposals: below 4 standard deviations from what all
    texts' probabilities say, and the draft's are far from it."""
    model, other = tiny(3), near(tiny(3), 0.03) if draft == "good" else tiny(4)
    cfg = SamplingConfig(max_new_tokens=4, samples=2000, temperature=1.5, **settings)
    own = generator(model, other, rows=1000, ahead=2)
    made = own.generate([Request(PROMPT, cfg, 8)])
    counts = torch.zeros(VOCAB**3, dtype=torch.int64)
    for each in made:
        a, b, c = each.tokens[:3]
        counts[(a * VOCAB + b) * VOCAB + c] += 1
    assert chi_square(counts, exact(model, cfg, 3)) < 4
    rate = own.draft_stats.acceptance_rate
    if draft == "good":
        assert rate > 0.8
    else:
        assert 0.1 < rate < 0.7 and chi_square(counts, exact(other, cfg, 3) + 1e-9) > 10


@pytest.mark.parametrize("name", ["temperature", "all"])
def test_a_judged_token_has_the_models_distribution(name: str) -> None:
    """5,000 rows: the first token after each is the model's, whatever the draft proposes, and so is the second where
    the first was accepted."""
    cfg = SamplingConfig(**SETTINGS[name])
    draw = torch.Generator().manual_seed(2)
    ours, draft = torch.randn(2, 50, generator=draw), torch.randn(1, 50, generator=draw)
    draft += ours[:1]
    rows = [Row(0, 0, [1], Request([1], cfg, seed), 9) for seed in range(5000)]
    proposals = [Proposal([], [], []) for _ in rows]
    drafting.add(Team.of(tiny(3)), draft.expand(5000, -1), rows, proposals)
    texts = [[each.token for each in row] for row in judged(ours.repeat(5000, 1), rows, proposals)]
    want = theirs(cfg)(torch.zeros(2, 1).long(), ours.double()).softmax(-1)
    firsts, seconds = torch.tensor([text[0] for text in texts]), torch.tensor([t[1] for t in texts if len(t) > 1])
    assert chi_square(firsts.bincount(minlength=50), want[0]) < 4
    assert chi_square(seconds.bincount(minlength=50), want[1]) < 4
    proposed = torch.tensor([own.tokens[0] for own in proposals])
    filtered = theirs(cfg)(torch.zeros(1, 1).long(), draft.double()).softmax(-1)[0]
    assert chi_square(proposed.bincount(minlength=50), filtered) < 4
    # The most that can be accepted is what the two distributions have in common.
    assert len(seconds) / 5000 == pytest.approx(float(torch.minimum(want[0], filtered).sum()), abs=0.03)


def test_log_probs_are_those_of_one_forward(plain: Decoder) -> None:
    cfg = dataclasses.replace(SAMPLED, repetition_penalty=1.0, frequency_penalty=0.0, top_p=0.9, samples=3)
    for made in generator(plain, near(plain, 0.02), rows=4).generate(prompts(), cfg):
        ids = torch.tensor([*made.prompt_tokens, *made.tokens])
        with torch.no_grad():
            logits = plain(ids, torch.arange(len(ids)), [0, len(ids)], output="head")[len(made.prompt_tokens) - 1 : -1]
        own = theirs(cfg)(torch.zeros(len(made.tokens), 1).long(), logits.double())
        for scores, found in ((logits, made.model_log_probs), (own, made.log_probs)):
            want = scores.log_softmax(-1).gather(1, ids[len(made.prompt_tokens) :, None]).squeeze(1)
            assert found == pytest.approx(want.tolist(), abs=1e-4)


def test_a_stop_amid_accepted_tokens_ends_the_row_there(plain: Decoder) -> None:
    """Stop tokens and strings at every place of a turn; steps come one a token, and what followed is forgotten."""
    whole = generator(plain, plain, letters=True).generate(
        ["Hello"], SamplingConfig(max_new_tokens=12, stop_tokens=())
    )[0]
    assert whole.text is not None and len({*whole.tokens}) > 4
    for place, token in enumerate(whole.tokens):
        cfg = SamplingConfig(max_new_tokens=12, stop_tokens=(token,))
        first = whole.tokens.index(token)
        made = (own := generator(plain, plain, letters=True)).generate(["Hello", "abc"], cfg)[0]
        assert made.tokens == whole.tokens[: first + 1] and made.finish == "stop", place
        assert own.draft_stats.accepted == own.draft_stats.proposed  # nothing is proposed after an end
    for letter in whole.text:
        cfg = SamplingConfig(max_new_tokens=12, stop_tokens=(), stop=(letter,))
        steps = [
            step
            for step in generator(plain, plain, letters=True).stream_generate(["Hello", "abc"], cfg)
            if step.prompt == 0
        ]
        assert "".join(step.text for step in steps) == whole.text[: whole.text.index(letter)]
        assert [step.finish for step in steps] == [None] * (len(steps) - 1) + ["stop"]
        assert tuple(step.token for step in steps) == whole.tokens[: len(steps)]


def test_places_of_ended_rows_are_taken_at_once(plain: Decoder) -> None:
    """Each of a turn's rows takes its own number of tokens; the other place has one row after another."""
    wanted = (2, 16, 4, 3, 3)
    own = generator(plain, plain, rows=2, ahead=3)
    steps = list(own.stream_generate([Request([7], SamplingConfig(max_new_tokens=n)) for n in wanted]))
    assert [sum(step.prompt == i for step in steps) for i in range(5)] == list(wanted)
    # After the prompt's token: turns of 1; 4, 4, 4 and 3; 3; 2; 2.
    assert own.draft_stats.forwards == 8
    order = [step.prompt for step in steps]
    assert order.index(4) < max(i for i, prompt in enumerate(order) if prompt == 1)


def test_a_text_ends_with_the_context_and_may_outgrow_the_drafts(plain: Decoder) -> None:
    want = Generator(plain).generate(prompts((40, 60)), SamplingConfig(max_new_tokens=50))
    assert [len(each.tokens) for each in want] == [24, 4]
    for context in (20, 45, 60, 64):
        draft = model_of(dataclasses.replace(PLAIN, max_seq_len=context))
        own = generator(plain, draft)
        assert tokens(own.generate(prompts((40, 60)), SamplingConfig(max_new_tokens=50))) == tokens(want)
        proposed = own.draft_stats.proposed
        assert (proposed == 0) if context == 20 else (proposed > 0)


def test_the_draft_runs_a_prompt_once_for_its_samples(plain: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    real = drafting.prefill

    def counted(model: Decoder, batch: Sequence[Sequence[int]], *rest: object) -> torch.Tensor:
        seen.append(sum(map(len, batch)))
        return real(model, batch, *rest)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(drafting, "prefill", counted)
    generator(plain, near(plain, 0.02)).generate(prompts((11, 7)), dataclasses.replace(SAMPLED, samples=5))
    assert seen == [11, 7]  # together they would be above the 13 tokens of one prefill


def test_searches_go_on_without_it(plain: Decoder) -> None:
    search = BeamConfig(max_new_tokens=6, num_beams=3)
    own = generator(plain, plain)
    assert tokens(own.generate(prompts((5, 7)), search)) == tokens(Generator(plain).generate(prompts((5, 7)), search))
    assert own.draft_stats == DraftStats()


def test_both_caches_stay_within_their_limit(plain: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: dict[Cache, int] = {}
    real = Cache.fit

    def recorded(self: Cache, rows: int, places: int) -> None:
        real(self, rows, places)
        sizes[self] = max(sizes.get(self, 0), self.rows * self.tokens)

    monkeypatch.setattr(Cache, "fit", recorded)
    asked = [
        Request(p, SamplingConfig(max_new_tokens=n)) for p, n in zip(prompts(), (3, 40, 5, 20, 9, 30), strict=True)
    ]
    config = GeneratorConfig(max_cached_tokens=60, draft_tokens=6)
    made = Generator(plain, config=config, draft=near(plain, 0.02)).generate(asked)
    assert len(sizes) == 2 and max(sizes.values()) <= 60
    assert tokens(made) == tokens(Generator(plain).generate(asked))


def test_drafts_that_do_not_fit(plain: Decoder) -> None:
    with pytest.raises(ValueError, match="draft's vocabulary has 97 tokens and the model's 96"):
        Generator(plain, draft=model_of(dataclasses.replace(SMALL, vocab_size=97)))
    with pytest.raises(ValueError, match="head='scalar'"):
        Generator(plain, draft=build(dataclasses.replace(SMALL, head="scalar")))
    with pytest.raises(ValueError, match="draft lies on meta"):
        Generator(plain, draft=build(SMALL))
    with pytest.raises(ValueError, match="draft_tokens=0"):
        Generator(plain, draft=plain, config=GeneratorConfig(draft_tokens=0))


def test_bad_prompts_are_reported_and_the_rest_goes_on(plain: Decoder) -> None:
    steps: list[Step] = list(generator(plain, near(plain, 0.02)).stream_generate([[], [5, 9]], GREEDY))
    assert steps[0].finish == "error" and len(steps) == 1 + 13
    made: list[Completion] = generator(plain, near(plain, 0.02)).generate([[96], [5, 9]], GREEDY)
    assert made[0].finish == "error" and len(made[1].tokens) == 13
    assert all(math.isfinite(p) for p in made[1].model_log_probs or ())
