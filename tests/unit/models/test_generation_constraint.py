"""Texts that must be one of some, match an expression or have only some tokens: as found by trying everything."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import pytest
import regex as reference
import torch

from data.tokenizer import load_tokenizer
from models import Decoder, ModelConfig, build
from models.generation import Completion, Generator, GeneratorConfig, Request, SamplingConfig, sampling_config
from models.generation.expression import Expression
from models.init import InitSource
from parallel.materialise import materialise
from parallel.sharding import WHOLE
from tests.convert_cases import SMOLLM2
from tests.unit.models.test_generation_sampling import chi_square

WIDE = ModelConfig("llama", 49152 + 9, 16, 24, 1, 2, 1, 8, 128, init_std=0.4)
PROMPT = "The answer is"
COLOURS = (" red", " green", " blue", " red wine glass", " Grün und Weiß")


SMALL = ModelConfig("llama", 96, 32, 48, 2, 4, 2, 8, 64, init_std=0.3)
PAIR = ModelConfig("llama", 12, 16, 24, 1, 2, 1, 8, 16, init_std=0.4)


@pytest.fixture(scope="module")
def smol() -> Any:
    return load_tokenizer(str(SMOLLM2))


@pytest.fixture(scope="module")
def model() -> Decoder:
    """For the real tokenizer and some tokens more."""
    return model_of(WIDE)


@pytest.fixture(scope="module")
def generator(model: Decoder, smol: Any) -> Generator:
    return Generator(model, smol, GeneratorConfig(max_rows=32))


def model_of(cfg: ModelConfig) -> Decoder:
    """Random weights."""
    made = build(cfg)
    materialise(made, InitSource(cfg, 1), WHOLE, torch.device("cpu"))
    return made


def logits_after(model: Decoder, tokens: Sequence[int]) -> torch.Tensor:
    """fp64 [V], from a forward without a cache."""
    with torch.no_grad():
        return model(torch.tensor(tokens), torch.arange(len(tokens)), [0, len(tokens)], output="head")[-1].double()


def walked(
    model: Decoder, prompt: list[int], texts: Sequence[Sequence[int]], made: Sequence[int]
) -> list[torch.Tensor]:
    """The distribution at each of a text's tokens, over what some of the texts have there."""
    found = []
    for place in range(len(made)):
        left = {text[place] for text in texts if [*text[:place]] == [*made[:place]] and len(text) > place}
        logits = logits_after(model, [*prompt, *made[:place]])
        mask = torch.full_like(logits, float("-inf"))
        mask[list(left)] = 0
        found.append((logits + mask).softmax(-1))
    return found


def test_expressions_hold_at_high_temperature_and_other_rows_stay(generator: Generator) -> None:
    """Every finished text is a match in Python, the others begin one; rows without constraint stay as they are."""
    short, long = r'[^\W\d]{3,12}[.!]|\d{2}-[A-Z]{3}|"[^"\\]{2,9}"', r"(\w+ ){9}\W+"
    free = SamplingConfig(max_new_tokens=10, temperature=2.0)
    settings = [free, dataclasses.replace(free, regex=short), dataclasses.replace(free, regex=long)]
    asked = [Request(PROMPT, settings[i % 3], i) for i in range(36)]
    made = generator.generate(asked)
    for each in made[1::3]:
        assert each.finish == "stop" and re.fullmatch(short, each.text or "")
    for each in made[2::3]:
        assert each.finish == "length" and each.text
        assert reference.fullmatch(long, each.text.rstrip("\ufffd"), partial=True)
    plain = generator.generate(asked[::3])
    assert [each.tokens for each in made[::3]] == [each.tokens for each in plain]
    assert [each.tokens for each in generator.generate(asked[4:6])] == [each.tokens for each in made[4:6]]


def test_one_token_texts_have_the_models_chances(generator: Generator, smol: Any) -> None:
    """Those of the whole model, normalised over the list; the log-probabilities say so exactly."""
    texts = (" red", " green", " blue", " yes", " no")
    tokens = [smol.encode(text)[0] for text in texts]
    assert all(len(smol.encode(text)) == 1 for text in texts)
    logits = logits_after(generator.model, smol.encode(PROMPT))
    exact = (logits[tokens] / 2).log_softmax(-1)
    settings = SamplingConfig(max_new_tokens=3, temperature=2.0, samples=400, allowed=texts, log_probs=True)
    counts = torch.zeros(len(texts), dtype=torch.long)
    for each in generator.generate([PROMPT], settings):
        (token,) = each.tokens
        which = tokens.index(token)
        assert each.text == texts[which] and each.finish == "stop"
        assert each.log_probs == pytest.approx([exact[which].item()], abs=1e-4)
        assert each.model_log_probs == pytest.approx([logits.log_softmax(-1)[token].item()], abs=1e-4)
        counts[which] += 1
    assert chi_square(counts, exact.exp()) < 4
    assert chi_square(counts, (logits[tokens] * 2).softmax(-1)) > 4


def test_longer_texts_are_chosen_token_by_token(generator: Generator, smol: Any) -> None:
    """Greedy and drawn, against the distributions over all beginnings of the list; ' red' needs its stop token."""
    prompt, end = smol.encode(PROMPT), smol.eos_token_id
    written = [smol.encode(text) for text in COLOURS]
    written[0] = [*written[0], end]
    assert len(written[3]) > 2 and written[3][0] == written[0][0]
    settings = SamplingConfig(max_new_tokens=12, allowed=COLOURS, log_probs=True)
    some = dataclasses.replace(settings, temperature=1.0, samples=20)
    greedy, *drawn = generator.generate([Request(PROMPT, settings), Request(PROMPT, some)])
    seen = {each.text for each in drawn}
    assert len(seen) > 3 and seen <= {*COLOURS}
    for each in (greedy, *drawn):
        assert (
            [*each.tokens] in written and each.text == COLOURS[written.index([*each.tokens])] and each.finish == "stop"
        )
        distributions = walked(generator.model, prompt, written, each.tokens)
        assert each.log_probs is not None
        if each is greedy:
            assert [*each.tokens] == [int(probs.argmax()) for probs in distributions]
        else:
            want = [probs[token].log().item() for probs, token in zip(distributions, each.tokens, strict=True)]
            assert each.log_probs == pytest.approx(want, abs=1e-4)


def test_greedy_expressions_take_the_best_token_that_can_match(generator: Generator, smol: Any) -> None:
    """Brute force over the whole vocabulary, with another engine's partial matches."""
    pattern = r"[A-Z][a-z]+ \d{2}"
    full = reference.compile(pattern)
    texts = {i: t for i in range(17, 49152) if "\ufffd" not in (t := smol.decode([i]))}
    (made,) = generator.generate([PROMPT], SamplingConfig(max_new_tokens=9, regex=pattern))
    before, tokens = "", smol.encode(PROMPT)
    for token in made.tokens[:4]:
        left = [i for i, text in texts.items() if full.fullmatch(before + text, partial=True)]
        best = max(left, key=logits_after(generator.model, tokens).tolist().__getitem__)
        assert token == best
        before, tokens = before + texts[best], [*tokens, best]


def test_only_some_tokens_have_their_own_chances() -> None:
    """Without a tokenizer: samples of two tokens against the exact distribution over the pairs that are left."""
    model, some = model_of(PAIR), (1, 5, 7, 11)
    settings = SamplingConfig(max_new_tokens=2, temperature=1.0, samples=2000, allowed_tokens=some)
    counts = torch.zeros(12, 12)
    for each in Generator(model, config=GeneratorConfig(max_rows=500)).generate([[3, 2]], settings):
        counts[each.tokens] += 1
    inside = torch.full((12,), float("-inf"))
    inside[list(some)] = 0
    first = (logits_after(model, [3, 2]) + inside).softmax(-1)
    second = torch.stack([(logits_after(model, [3, 2, t]) + inside).softmax(-1) for t in range(12)])
    assert chi_square(counts.flatten().long(), (first[:, None] * second).flatten()) < 4


def test_filters_and_penalties_work_on_the_tokens_that_are_left() -> None:
    model, some = model_of(SMALL), (5, 17, 40, 41, 95)
    narrow = SamplingConfig(max_new_tokens=6, temperature=1.0, top_k=1, allowed_tokens=some, log_probs=True)
    greedy = SamplingConfig(max_new_tokens=6, allowed_tokens=some, repetition_penalty=1.3, frequency_penalty=0.5)
    nucleus = SamplingConfig(max_new_tokens=6, temperature=9.0, top_p=0.5, min_p=0.1, allowed_tokens=some)
    last = dataclasses.replace(narrow, allowed_tokens=(40,))
    asked = [Request([7, 8], each) for each in (narrow, greedy, nucleus, last)]
    one, *others, stopped = Generator(model, stop_tokens=[40]).generate(asked)
    assert all({*each.tokens} <= {*some} for each in (one, *others))
    best = logits_after(model, [7, 8])[list(some)].argmax()
    assert one.tokens[0] == some[int(best)] and one.log_probs == (0.0,) * len(one.tokens)
    assert stopped.tokens == (40,) and stopped.finish == "stop"


def test_a_draft_leaves_guided_rows_as_they_are(generator: Generator, smol: Any) -> None:
    """A draft proposes for the others alone."""
    settings = [SamplingConfig(max_new_tokens=5), SamplingConfig(max_new_tokens=5, regex=r"\w{9,}")]
    asked = [Request(PROMPT, each) for each in (*settings, dataclasses.replace(settings[1], temperature=1.0))]
    helped = Generator(generator.model, smol, draft=generator.model)
    assert [each.tokens for each in helped.generate(asked)] == [each.tokens for each in generator.generate(asked)]
    assert helped.draft_stats.proposed > 0


def finished(made: Completion) -> tuple[str | None, str, int]:
    return made.text, made.finish, len(made.tokens)


def test_where_rows_end(generator: Generator) -> None:
    """With the last token where nothing can follow, by a stop token where something can, or at the limit."""

    def made(limit: int, **asked: Any) -> tuple[str | None, str, int]:
        return finished(generator.generate([PROMPT], SamplingConfig(max_new_tokens=limit, **asked))[0])

    assert made(9, regex=r"\d{3}", allowed_tokens=None)[1] == "stop"
    assert made(1, regex="x") == ("x", "stop", 1)
    assert made(3, regex="x{8}y")[1:] == ("length", 3)
    assert made(5, allowed=(" red",)) == (" red", "stop", 1)
    assert made(5, allowed=(" red", " red wine"), stop_tokens=(0,))[0] in (" red", " red wine")
    assert made(4, regex="x*", stop_tokens=())[1:] == ("length", 4)
    text, finish, _ = made(30, regex="a\x04?\x04b")
    assert text == "a" and finish == "error"
    steps = list(generator.stream_generate([PROMPT], SamplingConfig(regex="[ab]{3}é")))
    whole = generator.generate([PROMPT], SamplingConfig(regex="[ab]{3}é"))[0]
    assert "".join(step.text for step in steps) == whole.text and steps[-1].finish == "stop"
    assert re.fullmatch("[ab]{3}é", whole.text or "")
    broken = list(generator.stream_generate([PROMPT], SamplingConfig(regex="a\x04?\x04b")))[-1]
    assert broken.finish == "error" and "no token can follow" in broken.error


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"allowed": ()}, "allowed=()"),
        ({"allowed": ("a", "")}, "empty text"),
        ({"regex": ""}, "regex=''"),
        ({"allowed_tokens": ()}, "allowed_tokens=()"),
        ({"allowed_tokens": (-1,)}, "no token"),
        ({"allowed_tokens": (3, 49161)}, "49161"),
        ({"regex": "a("}, "unterminated subpattern"),
        ({"regex": "\x04"}, "no text of the model's"),
        ({"regex": "a", "allowed": ("a",)}, "does not go together with allowed"),
        ({"regex": "a", "stop": ("b",)}, "cut short"),
        ({"allowed": ("hello<|im_end|>",)}, "makes it 'hello'"),
        ({"allowed": ("a\n",), "stop_tokens": (198,)}, "stop token 198"),
        ({"allowed": (" red", " red wine"), "stop_tokens": ()}, "no stop token to end"),
        (
            {"allowed": (" red wine glass", " Grün und Weiß"), "max_new_tokens": 2},
            "shortest of the allowed texts takes 3",
        ),
    ],
)
def test_what_cannot_be_is_told_before_anything_starts(generator: Generator, asked: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match="generation cannot start") as caught:
        generator.stream_generate([[5]], SamplingConfig(**asked))
    (line,) = str(caught.value).split("\n")[1:]
    assert words in line and "; " in line


def test_constraints_stay_ready(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests of a batch come one by one: what they have in common is made once."""
    made: list[str] = []
    real = Expression.__init__

    def counted(self: Expression, regex: str, *rest: Any) -> None:
        made.append(regex)
        real(self, regex, *rest)

    monkeypatch.setattr(Expression, "__init__", counted)
    for regex in ("kept|ready", "other", "kept|ready"):
        generator.stream_generate([[5]], SamplingConfig(regex=regex))
    assert made == ["kept|ready", "other"]
    generator.stream_generate([[5]], SamplingConfig(regex="other", stop_tokens=(0,)))
    assert made == ["kept|ready", "other", "other"]


def test_texts_need_a_tokenizer(model: Decoder) -> None:
    for asked in (SamplingConfig(allowed=("a",)), SamplingConfig(regex="a")):
        with pytest.raises(ValueError, match="no tokenizer; give one"):
            Generator(model).generate([[5]], asked)


def test_constraints_of_a_mapping() -> None:
    assert sampling_config({"allowed": ["a", "b"], "regex": None}) == SamplingConfig(allowed=("a", "b"))
    assert sampling_config({"regex": "a+"}) == SamplingConfig(regex="a+")
    assert sampling_config({"allowed_tokens": [1, 2]}) == SamplingConfig(allowed_tokens=(1, 2))
    with pytest.raises(
        ValueError, match=r"(?s)allowed='a': give a list of strings.*regex=3: give a string.*list of token ids"
    ):
        sampling_config({"allowed": "a", "regex": 3, "allowed_tokens": ["a"]})


def test_texts_are_written_without_what_stands_around_every_text(model: Decoder, smol: Any) -> None:
    """Tokenizers that begin every text with a token of their own."""

    class Opening:
        eos_token_id = smol.eos_token_id

        def encode(self, text: str, /) -> list[int]:
            return [1, *smol.encode(text), 0]

        def decode(self, token_ids: Any, /, *, skip_special_tokens: bool) -> Any:
            return smol.decode(token_ids, skip_special_tokens=skip_special_tokens)

    (made,) = Generator(model, Opening()).generate([[5]], SamplingConfig(allowed=COLOURS[3:]))
    assert [*made.tokens] in [smol.encode(text) for text in COLOURS[3:]]
