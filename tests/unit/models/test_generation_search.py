"""Beam search and contrastive search against plain references without a cache; ends of texts, batches, settings."""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch
from torch.nn import functional as F

from models import Decoder, ModelConfig
from models.generation import (
    BeamConfig,
    Completion,
    ContrastiveConfig,
    Generator,
    GeneratorConfig,
    Request,
    SamplingConfig,
    sampling_config,
)
from models.generation.cache import Cache
from tests.mla_cases import LATENT
from tests.unit.models.test_generation import PLAIN, SLIDING, Letters, model_of, prompts, tokens

MODELS = {"grouped": PLAIN, "sliding": SLIDING, "latent": dataclasses.replace(LATENT, vocab_size=96, init_std=0.3)}
STOPS = tuple(range(4, 96, 9))
DIVERSE = [
    BeamConfig(6, 8, 0.5, "heuristic", 3, 0.7, samples=6),
    BeamConfig(4, 8, 1.0, "full", 4, 3.0, samples=4),
    BeamConfig(4, 8, 2.0, "exact", 2, 0.3, samples=3),
    BeamConfig(3, 8, -1.0, "exact", samples=3),
]
CONTRASTIVE = [ContrastiveConfig(5, 0.6, 12), ContrastiveConfig(3, 0.9, 12), ContrastiveConfig(4, 0.0, 12)]


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> Decoder:
    return model_of(MODELS[request.param])


@pytest.fixture(scope="module")
def plain() -> Decoder:
    return model_of(PLAIN)


def run(model: Decoder, rows: Sequence[Sequence[int]], output: Any) -> list[torch.Tensor]:
    """Whole rows through the model, without a cache: of each the logits or states of all its tokens."""
    borders = [0, *itertools.accumulate(len(row) for row in rows)]
    with torch.no_grad():
        found = model(
            torch.tensor([token for row in rows for token in row]),
            torch.cat([torch.arange(len(row)) for row in rows]),
            borders,
            output=output,
        )
    return list(found.split([len(row) for row in rows]))


def plain_beams(model: Decoder, prompt: list[int], cfg: BeamConfig, stops: Sequence[int]) -> list[tuple[Any, float]]:
    """Texts and scores; every continuation of every beam is looked at."""
    size = cfg.num_beams // cfg.beam_groups
    running: list[list[tuple[float, float, tuple[int, ...]]]] = [[(0.0, 0.0, ())] for _ in range(cfg.beam_groups)]
    ended: list[list[tuple[float, float, tuple[int, ...]]]] = [[] for _ in running]
    for length in range(1, cfg.max_new_tokens + 1):
        taken: Counter[int] = Counter()
        for group, beams in enumerate(running):
            if not beams:
                continue
            every = []
            logits = run(model, [[*prompt, *text] for _, _, text in beams], "head")
            for (total, plain, text), own in zip(beams, logits, strict=True):
                for token, log_prob in enumerate(own[-1].log_softmax(-1).tolist()):
                    penalised = total + log_prob - cfg.diversity_penalty * taken[token]
                    every.append((penalised, plain + log_prob, (*text, token)))
            every.sort(reverse=True)
            last = length == cfg.max_new_tokens
            over = [last or text[-1] in stops for _, _, text in every]
            running[group] = [each for each, end in zip(every, over, strict=True) if not end][:size]
            done = [each for each, end in zip(every[:size], over, strict=False) if end]
            worth = length**cfg.length_penalty
            ended[group] += [(total / worth, plain / worth, text) for total, plain, text in done]
            ended[group] = sorted(ended[group], reverse=True)[:size]
            if len(ended[group]) == size and running[group]:
                longest = cfg.max_new_tokens if cfg.early_stopping == "exact" and cfg.length_penalty > 0 else length
                best = running[group][0][0] / longest**cfg.length_penalty
                if cfg.early_stopping == "full" or best <= ended[group][-1][0]:
                    running[group] = []
            taken.update(text[-1] for _, _, text in running[group])
    texts = sorted(((plain, text) for group in ended for _, plain, text in group), reverse=True)
    return [(text, plain) for plain, text in texts[: cfg.samples]]


def plain_contrastive(model: Decoder, prompt: list[int], cfg: ContrastiveConfig, stops: Sequence[int]) -> list[int]:
    made: list[int] = []
    while len(made) < cfg.max_new_tokens and not (made and made[-1] in stops):
        before = [*prompt, *made]
        probs, options = run(model, [before], "head")[0][-1].softmax(-1).topk(cfg.top_k)
        scores = []
        for prob, option in zip(probs.tolist(), options.tolist(), strict=True):
            states = run(model, [[*before, option]], "hidden")[0]
            likeness = F.cosine_similarity(states[:-1], states[-1:]).max().item()
            scores.append((1 - cfg.degeneration_penalty) * prob - cfg.degeneration_penalty * likeness)
        made.append(options.tolist()[scores.index(max(scores))])
    return made


@pytest.mark.parametrize("cfg", DIVERSE, ids=lambda cfg: f"{cfg.beam_groups}groups")
def test_beams_are_those_of_a_search_without_a_cache(model: Decoder, cfg: BeamConfig) -> None:
    asked = prompts((5, 1, 12))
    made = Generator(model, stop_tokens=STOPS, config=GeneratorConfig(max_rows=13)).generate(asked, cfg)
    for index, prompt in enumerate(asked):
        own = [each for each in made if each.prompt == index]
        want = plain_beams(model, prompt, cfg, STOPS)
        assert tokens(own) == [text for text, _ in want]
        assert [each.score for each in own] == pytest.approx([score for _, score in want], abs=1e-4)


def test_groups_find_different_texts(plain: Decoder) -> None:
    """Plain beams begin alike for long; with one beam a group and a large penalty no token comes twice at a place."""
    asked = prompts((5, 9))
    alike = Generator(plain).generate(asked, BeamConfig(4, 8, samples=4))
    apart = Generator(plain).generate(asked, BeamConfig(4, 8, beam_groups=4, diversity_penalty=100.0, samples=4))
    for index in range(2):
        own = [each.tokens for each in apart if each.prompt == index]
        assert all(len(set(column)) == 4 for column in zip(*own, strict=True))
        assert len({each.tokens[0] for each in alike if each.prompt == index}) < 4


def test_enough_beams_find_the_most_probable_texts_of_all() -> None:
    """With as many beams as tokens nothing is left out of texts of two: all 144 of them, put in order."""
    model = model_of(ModelConfig("llama", 12, 16, 24, 1, 2, 1, 8, 16, init_std=0.4))
    first = run(model, [[5, 2]], "head")[0][-1].log_softmax(-1)
    second = torch.stack([own[-1] for own in run(model, [[5, 2, t] for t in range(12)], "head")]).log_softmax(-1)
    best = (first[:, None] + second).flatten().topk(12)
    made = Generator(model).generate([[5, 2]], BeamConfig(12, 2, samples=12, log_probs=True))
    assert tokens(made) == [divmod(index, 12) for index in best.indices.tolist()]
    assert [each.score for each in made] == pytest.approx((best.values / 2).tolist(), abs=1e-5)
    for each in made:
        assert each.log_probs == (0.0, 0.0)
        assert each.model_log_probs == pytest.approx([first[each.tokens[0]].item(), second[each.tokens].item()])


@pytest.mark.parametrize("cfg", CONTRASTIVE, ids=lambda cfg: f"{cfg.degeneration_penalty}")
def test_contrastive_search_is_that_of_whole_forwards(model: Decoder, cfg: ContrastiveConfig) -> None:
    asked = prompts((5, 1, 12, 20))
    made = Generator(model, stop_tokens=STOPS[:3], config=GeneratorConfig(max_rows=11)).generate(asked, cfg)
    assert [list(each.tokens) for each in made] == [plain_contrastive(model, each, cfg, STOPS[:3]) for each in asked]
    assert all(each.score is None for each in made)
    if cfg.degeneration_penalty == 0:
        greedy = Generator(model, stop_tokens=STOPS[:3]).generate(asked, SamplingConfig(max_new_tokens=12))
        assert tokens(made) == tokens(greedy)


def test_log_probs_of_contrastive_search(plain: Decoder) -> None:
    made = Generator(plain).generate(prompts((6,)), ContrastiveConfig(4, 0.6, 5, log_probs=True))[0]
    logits = run(plain, [[*made.prompt_tokens, *made.tokens]], "head")[0][5:-1].log_softmax(-1)
    want = logits.gather(1, torch.tensor(made.tokens)[:, None]).squeeze(1)
    assert made.model_log_probs == pytest.approx(want.tolist(), abs=1e-4) and made.log_probs == (0.0,) * 5


def test_all_kinds_in_one_list_and_in_small_batches(plain: Decoder) -> None:
    """What a prompt gets depends neither on the others nor on how many are worked on at once."""
    kinds = [BeamConfig(5, 9, samples=2), ContrastiveConfig(4, 0.5, 7), SamplingConfig(6), BeamConfig(2, 12)]
    kinds.append(BeamConfig(4, 5, beam_groups=2, diversity_penalty=0.5, samples=4))
    asked = [Request(p, kinds[i % 5]) for i, p in enumerate(prompts((5, 1, 12, 7, 20, 3, 9, 2, 30, 4)))]
    alone = [each for request in asked for each in Generator(plain, stop_tokens=STOPS).generate([request])]
    for config in (GeneratorConfig(max_rows=5), GeneratorConfig(max_rows=9, prefill_tokens=8), GeneratorConfig()):
        made = Generator(plain, stop_tokens=STOPS, config=config).generate(asked)
        assert tokens(made) == tokens(alone)
        assert [(each.prompt, each.sample) for each in made] == [
            (i, sample) for i, each in enumerate(asked) for sample in range(each.sampling.samples)
        ]


def test_only_what_differs_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompt once to each other row of a search; then a candidate's one token, and beams from where they part."""
    copied: list[tuple[int, int]] = []
    real = Cache.move

    def recorded(self: Cache, source: int, target: int, count: int, first: int = 0) -> None:
        copied.append((first, count))
        real(self, source, target, count, first)

    monkeypatch.setattr(Cache, "move", recorded)
    model = model_of(PLAIN)
    Generator(model).generate(prompts((20,)), ContrastiveConfig(4, 0.6, 5))
    # The candidates of the first token share the prompt; those of the n-th differ in the one before.
    assert copied == [(0, 20)] * 3 + [(n, n + 1) for n in range(20, 24) for _ in range(3)]
    copied.clear()
    Generator(model).generate(prompts((20,)), BeamConfig(4, 12))
    assert copied[:3] == [(0, 20)] * 3 and all(20 <= first < count for first, count in copied[3:])
    assert 0 < sum(count - first for first, count in copied[3:]) < sum(count - 20 for _, count in copied[3:])
    assert len(copied) < 3 * 12


def test_the_cache_stays_within_its_limit(plain: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[tuple[int, int]] = []
    real = Cache.fit

    def recorded(self: Cache, rows: int, places: int) -> None:
        real(self, rows, places)
        sizes.append((self.rows, self.tokens))

    monkeypatch.setattr(Cache, "fit", recorded)
    asked = [Request(p, BeamConfig(3, n)) for p, n in zip(prompts(), (3, 20, 5, 10, 9, 15), strict=True)]
    small = Generator(plain, config=GeneratorConfig(max_cached_tokens=110)).generate(asked)
    assert max(rows * places for rows, places in sizes) <= 110 and max(rows for rows, _ in sizes) > 3
    assert tokens(small) == tokens(Generator(plain).generate(asked))


def ends(made: Sequence[Completion]) -> list[str]:
    return [each.finish for each in made]


@pytest.mark.parametrize("cfg", [BeamConfig(4, 9, samples=2), ContrastiveConfig(4, 0.6, 9)], ids=["beams", "contrast"])
def test_bad_prompts_are_reported_and_the_rest_goes_on(plain: Decoder, cfg: BeamConfig | ContrastiveConfig) -> None:
    good = prompts((4,))[0]
    bad = [[], list(range(4, 70)), [5, 96], [5] * 50]
    made = Generator(plain, config=GeneratorConfig(max_cached_tokens=230)).generate([good, *bad, good], cfg)
    assert [each.prompt for each in made] == [0] * cfg.samples + [1, 2, 3, 4] + [5] * cfg.samples
    reasons = ("empty", "66 tokens", "token 96", "9 new ones do not fit 4 times max_cached_tokens=230")
    for error, words in zip([each.error for each in made if each.error], reasons, strict=True):
        assert words in error
    assert made[0].tokens == made[-cfg.samples].tokens and ends(made[: cfg.samples]) == ["length"] * cfg.samples


@pytest.mark.parametrize("cfg", [BeamConfig(4, 50, samples=4), ContrastiveConfig(4, 0.6, 50)], ids=["beam", "contrast"])
def test_a_text_ends_with_the_context(plain: Decoder, cfg: BeamConfig | ContrastiveConfig) -> None:
    made = Generator(plain).generate(prompts((60,)), cfg)
    assert [len(each.tokens) for each in made] == [4] * cfg.samples and set(ends(made)) == {"length"}


@pytest.mark.parametrize(
    "cfg",
    [
        BeamConfig(4, 14, length_penalty=0.0, early_stopping="exact", samples=4, stop_tokens=()),
        ContrastiveConfig(4, 0.6, 30, stop_tokens=()),
    ],
    ids=["beams", "contrast"],
)
def test_stop_strings_end_a_text_wherever_they_come(plain: Decoder, cfg: BeamConfig | ContrastiveConfig) -> None:
    letters = Letters()
    whole = Generator(plain, letters).generate(["Hello"], cfg)
    text = whole[0].text
    assert text is not None
    stop = text[2:4]
    made = Generator(plain, letters).generate(["Hello"], dataclasses.replace(cfg, stop=(stop, "never there")))
    assert any(each.finish == "stop" for each in made)
    for each in made:
        full = letters.decode(each.tokens, skip_special_tokens=True)
        assert each.text == full.split(stop)[0]
        assert each.finish == ("stop" if stop in full else "length") and stop not in full[:-1]
    if isinstance(cfg, ContrastiveConfig):
        assert made[0].tokens == whole[0].tokens[: len(made[0].tokens)]
    assert len({each.tokens for each in made}) == cfg.samples


def test_the_end_of_text_is_no_part_of_the_text(plain: Decoder) -> None:
    letters = Letters()
    made = Generator(plain, letters, stop_tokens=STOPS).generate(["Hello"], BeamConfig(4, 20, samples=4))
    for each in made:
        ended = each.tokens[-1] in STOPS
        assert each.text == letters.decode(each.tokens[: len(each.tokens) - ended], skip_special_tokens=True)
    assert any(each.finish == "stop" for each in made)


@pytest.mark.parametrize(
    "cfg",
    [BeamConfig(4, 14, samples=3, stop=("e", "ab"), log_probs=True), ContrastiveConfig(4, 0.6, 20, log_probs=True)],
    ids=["beams", "contrast"],
)
def test_a_stream_joined_is_the_text(plain: Decoder, cfg: BeamConfig | ContrastiveConfig) -> None:
    asked = ["Hello", "abc", "Some words"]
    config = GeneratorConfig(max_rows=8)
    made = Generator(plain, Letters(), config).generate(asked, cfg)
    steps = list(Generator(plain, Letters(), config).stream_generate(asked, cfg))
    for row in made:
        own = [step for step in steps if (step.prompt, step.sample) == (row.prompt, row.sample)]
        assert "".join(step.text for step in own) == row.text
        assert tuple(step.token for step in own) == row.tokens
        assert [step.model_log_prob for step in own] == pytest.approx(row.model_log_probs, abs=1e-4)
        assert [step.finish for step in own] == [None] * (len(own) - 1) + [row.finish]


@pytest.mark.parametrize(
    ("made", "key"),
    [
        (BeamConfig(0), "num_beams"),
        (BeamConfig(max_new_tokens=0), "max_new_tokens"),
        (BeamConfig(length_penalty=float("nan")), "length_penalty"),
        (BeamConfig(length_penalty=99.0), "length_penalty"),
        (BeamConfig(early_stopping=cast(Any, True)), "early_stopping"),
        (BeamConfig(samples=5), "samples"),
        (BeamConfig(samples=0), "samples"),
        (BeamConfig(beam_groups=0), "beam_groups"),
        (BeamConfig(beam_groups=3, diversity_penalty=0.5), "beam_groups"),
        (BeamConfig(beam_groups=2), "diversity_penalty"),
        (BeamConfig(diversity_penalty=0.5), "diversity_penalty"),
        (BeamConfig(diversity_penalty=-1), "diversity_penalty"),
        (BeamConfig(stop=("",)), "stop"),
        (BeamConfig(stop_tokens=(-1,)), "stop_tokens"),
        (ContrastiveConfig(0), "top_k"),
        (ContrastiveConfig(4, 1.1), "degeneration_penalty"),
        (ContrastiveConfig(4, float("nan")), "degeneration_penalty"),
        (ContrastiveConfig(max_new_tokens=0), "max_new_tokens"),
    ],
)
def test_impossible_values(plain: Decoder, made: BeamConfig | ContrastiveConfig, key: str) -> None:
    assert {problem[0] for problem in made.problems()} == {key}
    with pytest.raises(ValueError, match=key):
        Generator(plain).generate([[5]], made)


def test_settings_that_do_not_fit_the_generator(plain: Decoder) -> None:
    assert BeamConfig().problems() == ContrastiveConfig().problems() == []
    with pytest.raises(ValueError, match=r"num_beams=9: takes more rows than max_rows=8"):
        Generator(plain, config=GeneratorConfig(max_rows=8)).generate([[5]], BeamConfig(9))
    with pytest.raises(ValueError, match=r"(?s)num_beams=97: the model knows 96.*stop strings need a tokenizer"):
        Generator(plain, config=GeneratorConfig(max_rows=99)).generate([[5]], BeamConfig(97, stop=("a",)))
    with pytest.raises(ValueError, match="top_k=97: the model knows 96 tokens"):
        Generator(plain, config=GeneratorConfig(max_rows=99)).generate([[5]], ContrastiveConfig(97))


def test_settings_from_a_mapping() -> None:
    beams = {"num_beams": 6, "beam_groups": 2, "diversity_penalty": 1, "early_stopping": "full", "stop": ["a"]}
    assert sampling_config(beams) == BeamConfig(6, 128, 1.0, "full", 2, 1.0, stop=("a",))
    assert sampling_config({"length_penalty": 0, "samples": 2}) == BeamConfig(length_penalty=0.0, samples=2)
    contrastive = {"top_k": 6, "degeneration_penalty": 0.5, "log_probs": True}
    assert sampling_config(contrastive) == ContrastiveConfig(6, 0.5, log_probs=True)
    assert sampling_config({"top_k": 6, "temperature": 1}) == SamplingConfig(top_k=6, temperature=1.0)
    mixed = {"num_beams": 4, "temperature": 0.5, "top_k": 3, "early_stopping": True, "samples": 1.5}
    with pytest.raises(ValueError) as caught:
        sampling_config(mixed)
    lines = str(caught.value).splitlines()[1:]
    assert [line.split(":")[0].split("=")[0].strip() for line in lines] == [
        "temperature", "top_k", "early_stopping", "samples",
    ]  # fmt: skip
    assert "no such setting in beam search; there are num_beams" in lines[0]
    assert "early_stopping=True: give one of full, heuristic, exact" in lines[2]
    with pytest.raises(ValueError, match="degeneration_penalty asks for contrastive search and num_beams for beam"):
        sampling_config({"num_beams": 4, "degeneration_penalty": 0.5})
    with pytest.raises(ValueError, match="temperature: there is no such setting in contrastive search"):
        sampling_config({"degeneration_penalty": 0.5, "temperature": 1})
    with pytest.raises(ValueError, match=r"samples=5: are more than num_beams=4"):
        sampling_config({"num_beams": 4, "samples": 5})
