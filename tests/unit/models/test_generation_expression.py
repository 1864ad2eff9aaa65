"""Which tokens a regular expression leaves: against partial matches of another engine, and against Python's `re`."""

import random
import re
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import regex as reference
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from data.tokenizer import load_tokenizer
from models.generation.config import SamplingConfig
from models.generation.constraint import Constraints, Guide
from models.generation.expression import Expression, Lettering
from models.generation.text import decoded
from tests.convert_cases import SMOLLM2

END = 2
"""The stop token of SmolLM2, which is special."""
VOCAB = 49152 + 9
"""A model has more tokens than its tokenizer."""


@pytest.fixture(scope="module")
def smol() -> Any:
    return load_tokenizer(str(SMOLLM2))


@pytest.fixture(scope="module")
def letters(smol: Any) -> Lettering:
    return Lettering.of(smol, VOCAB)


def tokenizer_of(vocab: list[str], decoder: Any, fallback: bool = True, **special: str) -> Any:
    """A tokenizer of whole words and bytes, as sentencepiece makes them."""
    every = [*special.values(), *(f"<0x{byte:02X}>" for byte in range(256) if fallback), *vocab]
    made = Tokenizer(models.BPE({word: i for i, word in enumerate(every)}, [], byte_fallback=fallback))
    made.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)


def sentencepiece() -> Any:
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    words = ["▁", "▁▁", "▁▁▁yes", "▁yes", "yes", "▁no", "no", "▁é", "é", "n", "o", "y", "e", "s", "!"]
    return tokenizer_of(words, decoders.Sequence(steps), bos_token="<s>", eos_token="</s>")


def tokens_left(guide: Guide, vocab: int = VOCAB) -> list[int]:
    allowed = np.zeros(vocab, dtype=bool)
    guide.fill(allowed)
    return allowed.nonzero()[0].tolist()


def walks(made: Expression, ends: frozenset[int], vocab: int, count: int, longest: int) -> Iterator[list[int]]:
    """Tokens of texts that came to an end, drawn evenly from what is left; every fifth time the end where it can be."""
    draw = random.Random(3)
    for _ in range(count):
        guide, tokens, finish = made.begin(), [], None
        while finish is None and len(tokens) < longest:
            left = tokens_left(guide, vocab)
            can_end = ends & {*left}
            token = min(can_end) if can_end and draw.random() < 0.2 else draw.choice(left)
            if token in ends:
                finish = "stop"
                break
            tokens.append(token)
            finish, error = guide.take(token)
            assert not error
        if finish is not None:
            yield tokens


@pytest.mark.parametrize("pattern", [r"\d{3}-\d{4}", r"(?i)yes|no(pe)?", r"[A-Z][a-z]*( [a-z]+){1,2}\.", r".*a.{2}"])
def test_a_token_is_left_where_its_text_can_become_a_match(smol: Any, letters: Lettering, pattern: str) -> None:
    """All tokens of the real tokenizer that are whole characters, at four places of a text."""
    texts = {i: t for i in range(17, 49152) if "\ufffd" not in (t := decoded(smol, [i]))}
    full = reference.compile(pattern)
    guide, before, draw = Expression(pattern, letters, frozenset({END})).begin(), "", random.Random(5)
    for _ in range(4):
        left = {*tokens_left(guide)}
        want = {i for i, text in texts.items() if full.fullmatch(before + text, partial=True)}
        assert left & texts.keys() == want
        assert (END in left) == bool(re.fullmatch(pattern, before))
        if not want:
            break
        token = draw.choice(sorted(want))
        before += texts[token]
        if guide.take(token)[0] is not None:
            break


@pytest.mark.parametrize(
    "pattern",
    [
        r"\d{2,3}", r"\w{1,3}", r"\W\W?", r"\s\S{1,2}\s?", r"\D{2}", r"[^\W\d]{3}", r"[\w.-]{1,4}", r"[^\s\S]|x",
        r"(?s).{3}", r".+?", r"[^\x00-\x7f]{3}", r"é+|ß{2,5}", r"(?P<stop>a)b", r"^[+-]?[0-9]{1,4}$", r"a/b\n?",
        r"(?x) a b # c", r"\\w\\\\d{2}", r"[]a]\]?", r"(a|b|ab){0,2}", r"\u00e9\x41",
    ],
)  # fmt: skip
def test_every_text_is_a_match_in_python(smol: Any, letters: Lettering, pattern: str) -> None:
    """Tokens drawn evenly: half characters, rare scripts, combining marks."""
    ends = frozenset({END})
    texts = [decoded(smol, t) for t in walks(Expression(pattern, letters, ends), ends, VOCAB, 40, 20)]
    assert len(texts) > 15
    assert all(re.fullmatch(pattern, text) for text in texts)


def test_texts_that_match_can_be_written(smol: Any, letters: Lettering) -> None:
    """In the tokenizer's own tokens; others stop somewhere."""
    pattern = r'\{"name": "[\w ]+", "age": \d{1,3}\}|naïve 日本(語)?'
    made = Expression(pattern, letters, frozenset({END}))

    def written(text: str) -> bool:
        guide, finish = made.begin(), None
        for token in smol.encode(text):
            if finish is not None or token not in tokens_left(guide):
                return False
            finish, _ = guide.take(token)
        return finish == "stop" or END in tokens_left(guide)

    for text in ('{"name": "Zoë de Œil", "age": 41}', "naïve 日本", "naïve 日本語"):
        assert re.fullmatch(pattern, text) and written(text)
    for text in ('{"name": "Zoë", "age": 4100}', "naïve", "naïve 日本語語", "日本"):
        assert not re.fullmatch(pattern, text) and not written(text)


def test_special_and_unknown_tokens_are_no_text(smol: Any, letters: Lettering) -> None:
    guide = Expression(r"(?s).*", letters, frozenset({END})).begin()
    left = tokens_left(guide)
    assert min(left) == END and left[1] == 17 and max(left) == 49151
    assert len(left) > 49000


def test_a_stop_token_that_is_text_ends_whole_texts_alone(smol: Any, letters: Lettering) -> None:
    newline = smol.encode("\n")[0]
    guide = Expression(r"a\n?b?", letters, frozenset({newline})).begin()
    assert newline not in tokens_left(guide)
    assert guide.take(smol.encode("a")[0]) == (None, "")
    left = [decoded(smol, [token]) for token in tokens_left(guide)]
    assert "\n" in left and "b" in left
    with pytest.raises(ValueError, match="no text of the model's tokens"):
        Expression(r"\n", letters, frozenset({newline}))


def test_a_text_that_no_token_continues_is_an_error(smol: Any, letters: Lettering) -> None:
    """SmolLM2 has no token for the character 4."""
    guide = Expression("a\x04?\x04b", letters, frozenset({END})).begin()
    finish, error = guide.take(smol.encode("a")[0])
    assert finish == "error" and "no token can follow" in error and r"a\x04" in error


REFUSED = {
    r"a(": "unterminated subpattern", r"*": "nothing to repeat", r"(?=a)b": "look-around", r"(a)\1": "backreferences",
    r"\bfoo": "lookarounds", r"(?m)^a$": "lookarounds", r"a$b": "lookarounds", r"a\Z": "unrecognized escape",
    r"a++": "possessive", r"[a-z]{2}+": "possessive", r"[a&&b]": "sets in sets", r"[a[b]]": "sets in sets",
    r'{"a"}': "repetition operator", r"a{,3}": "repetition", r"(?:)": "empty text alone",
    "\x04": "no text of the model's tokens", r"[^\s\S]": "no text of the model's tokens",
}  # fmt: skip


@pytest.mark.parametrize("pattern", REFUSED)
def test_expressions_that_cannot_be(letters: Lettering, pattern: str) -> None:
    """One line with the expression, the reason and a way out."""
    with pytest.raises(ValueError) as caught:
        Expression(pattern, letters, frozenset({END}))
    message = str(caught.value)
    assert message.startswith(f"regex={pattern!r}: ") and REFUSED[pattern] in message
    assert "; " in message and "\n" not in message


def test_a_plus_after_a_bracket_is_not_taken_for_possessive(smol: Any, letters: Lettering) -> None:
    for pattern in (r"a\++", r"[*+]+", r"[{}]+b", r"\*+"):
        ends = frozenset({END})
        texts = [decoded(smol, t) for t in walks(Expression(pattern, letters, ends), ends, VOCAB, 20, 30)]
        assert texts and all(re.fullmatch(pattern, text) for text in texts)


@pytest.mark.parametrize("pattern", [r"yes|no", r" yes!", r" *(yes|no)", r"é{2}", r"\s?\w+"])
def test_sentencepiece_texts_match_as_they_are_decoded(pattern: str) -> None:
    """Without the space before them, in whatever tokens they begin."""
    tokenizer = sentencepiece()
    vocab, ends = len(tokenizer), frozenset({tokenizer.eos_token_id})
    letters = Lettering.of(tokenizer, vocab)
    assert letters.drops_space
    made = Expression(pattern, letters, ends)
    found = [*walks(made, ends, vocab, 150, 40)]
    assert len(found) > 80
    for tokens in found:
        assert re.fullmatch(pattern, decoded(tokenizer, tokens))
    firsts = {tokenizer.convert_ids_to_tokens(tokens[0]) for tokens in found if tokens}
    assert any(first.startswith("▁") for first in firsts)


@pytest.mark.parametrize("decoder", [decoders.WordPiece("##"), decoders.Metaspace("▁", "always")])
def test_texts_that_are_not_their_tokens_one_after_another(decoder: Any) -> None:
    """Spaces between tokens, or marks that the library does not know for spaces."""
    tokenizer = tokenizer_of(["a", "##b", "▁c"], decoder, fallback=False, eos_token="</s>")
    with pytest.raises(ValueError, match="regex: the tokenizer's"):
        Lettering.of(tokenizer, 4)


def test_a_tokenizer_without_its_file() -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        Lettering.of(object(), 4)  # pyright: ignore[reportArgumentType]


def test_without_the_library(smol: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ValueError, match="pip install llguidance") as caught:
        Constraints(smol, VOCAB).of(SamplingConfig(regex="a"), [END])
    assert "\n" not in str(caught.value)
    assert Constraints(smol, VOCAB).of(SamplingConfig(allowed=("a", "b")), [END]) is not None
