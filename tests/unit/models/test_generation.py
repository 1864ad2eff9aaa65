"""Many rows through one model: who is in when, what a row may depend on, ends of rows, bad prompts, streams."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import psutil
import pytest
import torch

from models import Decoder, ModelConfig, build
from models.generation import Completion, Generator, GeneratorConfig, Request, SamplingConfig, batch
from models.generation.cache import Cache, pieces_of
from models.generation.text import TextStream
from models.init import InitSource
from parallel.materialise import materialise
from parallel.sharding import WHOLE

PLAIN = ModelConfig("llama", 96, 32, 48, 2, 4, 2, 8, 64, init_std=0.3)
SLIDING = dataclasses.replace(PLAIN, family="qwen2", sliding_window=6, full_attention_layers=1)
LENGTHS = (5, 1, 12, 7, 20, 3)


class Letters:
    """A tokenizer of one character a token: id 0 is the end, 1 a special token, 2 and 3 the halves of 'é'."""

    eos_token_id = 0

    def encode(self, text: str, /) -> list[int]:
        return [ord(letter) - 28 for letter in text]

    def decode(self, token_ids: Any, /, *, skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        raw = b"".join({0: b"", 1: b"", 2: b"\xc3", 3: b"\xa9"}.get(i) or bytes([i + 28]) for i in token_ids if i > 1)
        return raw.decode("utf-8", errors="replace")


def model_of(cfg: ModelConfig) -> Decoder:
    model = build(cfg)
    materialise(model, InitSource(cfg, 1), WHOLE, torch.device("cpu"))
    return model


@pytest.fixture(scope="module")
def plain() -> Decoder:
    return model_of(PLAIN)


def prompts(lengths: Sequence[int] = LENGTHS) -> list[list[int]]:
    draw = torch.Generator().manual_seed(5)
    return [torch.randint(4, 96, (n,), generator=draw).tolist() for n in lengths]


def tokens(made: Sequence[Completion]) -> list[tuple[int, ...]]:
    return [each.tokens for each in made]


SAMPLED = SamplingConfig(
    max_new_tokens=9, temperature=1.3, top_p=0.95, repetition_penalty=1.2, frequency_penalty=0.3, seed=4, log_probs=True
)


@pytest.mark.parametrize("cfg", [PLAIN, SLIDING], ids=["full", "sliding"])
@pytest.mark.parametrize("rows", [1, 2, 64])
def test_a_row_does_not_depend_on_its_batch(cfg: ModelConfig, rows: int) -> None:
    model = model_of(cfg)
    requests = [Request(prompt, SAMPLED, seed) for seed, prompt in enumerate(prompts())]
    alone = [Generator(model).generate([request])[0] for request in requests]
    together = Generator(model, config=GeneratorConfig(max_rows=rows, prefill_tokens=13)).generate(requests)
    assert tokens(together) == tokens(alone)
    assert [each.prompt for each in together] == list(range(6))
    for one, other in zip(alone, together, strict=True):
        assert one.log_probs == pytest.approx(other.log_probs, abs=1e-4)


def test_samples_are_the_rows_of_their_seeds(plain: Decoder) -> None:
    """Prefill is shared and rows begin at different times, yet each sample is what it would be alone."""
    several = dataclasses.replace(SAMPLED, samples=5)
    for rows in (1, 2, 3, 64):
        got = Generator(plain, config=GeneratorConfig(max_rows=rows)).generate(prompts((5, 9)), several)
        assert [(each.prompt, each.sample) for each in got] == [(p, s) for p in (0, 1) for s in range(5)]
        if rows == 1:
            want = tokens(got)
        assert tokens(got) == want
    assert len(set(want)) == 10
    single = Generator(plain).generate(prompts((5, 9)), SAMPLED)
    assert tokens(single) == [want[0], want[5]]
    assert tokens(Generator(plain).generate([Request(prompts((5,))[0], SAMPLED, 99)])) != [want[0]]


def test_samples_share_one_prefill(plain: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sliding windows too: the prompt's cache is kept until the last sample has begun."""
    seen: list[int] = []
    real = batch.prefill

    def counted(model: Any, many: Any, *rest: Any) -> Any:
        seen.append(sum(map(len, many)))
        return real(model, many, *rest)

    monkeypatch.setattr(batch, "prefill", counted)
    several = dataclasses.replace(SAMPLED, samples=7)
    model = model_of(SLIDING)
    Generator(model, config=GeneratorConfig(max_rows=2)).generate(prompts((11,)), several)
    assert seen == [11]


def test_an_ended_rows_place_is_taken_at_once(plain: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two places and rows of 2, 9, 4, 3 and 3 tokens: one place has the 9, the other the rest in turn."""
    sizes: list[int] = []
    real = batch.decode

    def counted(model: Any, last: Any, *rest: Any) -> Any:
        sizes.append(len(last))
        return real(model, last, *rest)

    monkeypatch.setattr(batch, "decode", counted)
    wanted = (2, 9, 4, 3, 3)
    asked = [Request([7], SamplingConfig(max_new_tokens=n)) for n in wanted]
    made = list(Generator(plain, config=GeneratorConfig(max_rows=2)).stream_generate(asked))
    assert [sum(step.prompt == i for step in made) for i in range(5)] == list(wanted)
    # The first token of each comes from its prompt; steps of the short ones: 1 + 3 + 2 + 2 beside the 8 of the long.
    assert sizes == [2] * 8


def test_the_cache_stays_within_its_limit(plain: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[tuple[int, int]] = []
    real = Cache.fit

    def recorded(self: Cache, rows: int, places: int) -> None:
        real(self, rows, places)
        sizes.append((self.rows, self.tokens))
        assert self.rows >= rows and self.tokens >= places
        assert all(layer.keys.shape[0] == self.rows for layer in self.layers)

    monkeypatch.setattr(Cache, "fit", recorded)
    asked = [
        Request(p, SamplingConfig(max_new_tokens=n)) for p, n in zip(prompts(), (3, 40, 5, 20, 9, 30), strict=True)
    ]
    small = Generator(plain, config=GeneratorConfig(max_cached_tokens=60)).generate(asked)
    assert max(rows * places for rows, places in sizes) <= 60
    assert max(rows for rows, _ in sizes) > 1
    assert tokens(small) == tokens(Generator(plain).generate(asked))


def test_room_that_no_row_uses_takes_no_memory(plain: Decoder) -> None:
    """Two layers of keys and values of 2 heads of 8: 2048 x 1024 places are 128 MiB each, and few are written."""
    cache = Cache(plain, 2**30)
    before = psutil.Process().memory_info().rss
    cache.fit(2048, 1024)
    for layer in cache.layers:
        assert layer.keys.shape == (2048, 2, 1024, 8) and layer.keys.dtype is torch.float32
        layer.put(2047, torch.ones(4, 2, 8), torch.ones(4, 2, 8))
        assert layer.keys[2047, :, :5].sum() == 4 * 2 * 8 and layer.keys[5].count_nonzero() == 0
    assert psutil.Process().memory_info().rss - before < 64 * 2**20


def test_pieces_cover_all_rows_and_look_at_little_in_vain() -> None:
    lengths = [4000, 3900, 10, 12, 9, 2000, 7, 1]
    pieces = pieces_of(lengths, torch.device("cpu"))
    assert [row for p in pieces for row in range(p.start, p.stop)] == list(range(8))
    looked = sum((p.stop - p.start) * p.longest for p in pieces)
    assert sum(lengths) <= looked <= 1.25 * sum(lengths) + 512 * len(pieces)
    for p in pieces:
        for row in range(p.start, p.stop):
            seen = p.longest if p.mask is None else int((p.mask[row - p.start] == 0).sum())
            assert seen == lengths[row]


def test_bad_prompts_are_reported_and_the_rest_goes_on(plain: Decoder) -> None:
    good = prompts((4,))[0]
    bad = [[], list(range(4, 70)), [5, 96], [5, -1], [5] * 60]
    settings = SamplingConfig(max_new_tokens=9, samples=2, log_probs=True)
    made = Generator(plain, config=GeneratorConfig(max_cached_tokens=62)).generate([good, *bad, good], settings)
    assert [each.prompt for each in made] == [0, 0, 1, 2, 3, 4, 5, 6, 6]
    errors = [each.error for each in made if each.finish == "error"]
    for error, words in zip(
        errors, ("empty", "66 tokens", "token 96", "token -1", "max_cached_tokens=62"), strict=True
    ):
        assert words in error
    assert all(each.tokens == () for each in made if each.finish == "error")
    assert len(made[0].tokens) == len(made[-1].tokens) == 9 and made[0].error == ""
    steps = list(Generator(plain).stream_generate([[], good], settings))
    assert steps[0].finish == "error" and steps[0].token is None and "empty" in steps[0].error
    assert len(steps) == 1 + 2 * 9


def test_a_text_ends_with_the_context(plain: Decoder) -> None:
    made = Generator(plain).generate(prompts((60,)), SamplingConfig(max_new_tokens=50))[0]
    assert len(made.tokens) == 4 and made.finish == "length"
    assert Generator(plain).generate([], SamplingConfig()) == []


def test_settings_that_cannot_be(plain: Decoder) -> None:
    with pytest.raises(ValueError, match=r"(?s)temperature=-1.*top_p=0"):
        Generator(plain).generate([[5]], SamplingConfig(temperature=-1, top_p=0))
    with pytest.raises(ValueError, match="no tokenizer"):
        Generator(plain).generate(["text"])
    with pytest.raises(ValueError, match="stop strings need a tokenizer"):
        Generator(plain).stream_generate([[5]], SamplingConfig(stop=("x",)))
    with pytest.raises(ValueError, match="max_rows=0"):
        Generator(plain, config=GeneratorConfig(max_rows=0))


def test_stop_strings_end_a_row_wherever_they_come(plain: Decoder) -> None:
    letters = Letters()
    whole = Generator(plain, letters).generate(["Hello", "abc"], SamplingConfig(max_new_tokens=30, stop_tokens=()))
    text = whole[0].text
    assert text is not None and len(text) > 8
    settings = SamplingConfig(max_new_tokens=30, stop_tokens=(), stop=(text[4:7], "never there"))
    made = Generator(plain, letters).generate(["Hello", "abc"], settings)
    assert made[0].text == text[: text.index(text[4:7])] and made[0].finish == "stop"
    assert made[0].tokens == whole[0].tokens[: len(made[0].tokens)]
    assert letters.decode(made[0].tokens, skip_special_tokens=True).endswith(text[4:7])


def test_the_end_of_text_is_the_tokenizers(plain: Decoder) -> None:
    """A token that ends the row is the last of its tokens and no part of its text."""
    letters = Letters()
    free = Generator(plain, letters).generate(["Hello"], SamplingConfig(max_new_tokens=9, stop_tokens=()))[0]
    letters.eos_token_id = free.tokens[3]
    made = Generator(plain, letters).generate(["Hello"], SamplingConfig(max_new_tokens=9))[0]
    assert made.tokens == free.tokens[: free.tokens.index(free.tokens[3]) + 1] and made.finish == "stop"
    assert made.text == letters.decode(made.tokens[:-1], skip_special_tokens=True)


def test_a_stream_joined_is_the_text(plain: Decoder) -> None:
    settings = SamplingConfig(max_new_tokens=25, temperature=1.5, samples=3, log_probs=True, stop=("e", "ab"))
    asked = ["Hello", "abc", "Some words"]
    made = Generator(plain, Letters(), GeneratorConfig(max_rows=4)).generate(asked, settings)
    steps = list(Generator(plain, Letters(), GeneratorConfig(max_rows=4)).stream_generate(asked, settings))
    for row in made:
        own = [step for step in steps if (step.prompt, step.sample) == (row.prompt, row.sample)]
        assert "".join(step.text for step in own) == row.text
        assert tuple(step.token for step in own) == row.tokens
        assert [step.log_prob for step in own] == pytest.approx(row.log_probs, abs=1e-4)
        assert [step.finish for step in own] == [None] * (len(own) - 1) + [row.finish]


def test_a_stream_holds_back_half_characters_and_half_stops() -> None:
    stream = TextStream(Letters(), ("stop",))
    given = []
    for token in [*Letters().encode("as"), 2, 3, *Letters().encode("st"), 1, *Letters().encode("ostoper")]:
        if stream.stopped:
            break
        stream.push(token)
        given.append(stream.new(stream.stopped))
    assert given == ["a", "", "", "sé", "", "", "", "", "sto", "", "", ""]
    assert stream.text == "aséstostop".removesuffix("stop") and stream.stopped
    cut = TextStream(Letters(), ())
    cut.push(2)
    assert cut.new(False) == ""
    cut.finish()
    assert cut.new(True) == "\ufffd"
