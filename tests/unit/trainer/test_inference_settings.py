"""Settings as they are typed, on a command line and in a conversation."""

from typing import Any

import pytest

from trainer.inference.settings import device_of, settings_of, words_of

WORDS: list[tuple[str, Any]] = [
    ("temperature=0.7", 0.7),
    ("max_new_tokens=5", 5),
    ("log_probs=true", True),
    ("stop_tokens=[1, 2]", [1, 2]),
    ("stop_tokens=null", None),
    ("early_stopping=full", "full"),
    ("stop=a b", ["a b"]),
    ('stop="\\n"', ["\n"]),
    ('stop=["a", "b"]', ["a", "b"]),
    ("stop=5", ["5"]),
    ("stop=", [""]),
    ("allowed=yes", ["yes"]),
    ("regex=[0-9]", "[0-9]"),
    ("regex=a=b", "a=b"),
    ("regex=5", "5"),
    ("regex=null", None),
    ("temperature=[", "["),
]


@pytest.mark.parametrize(("word", "value"), WORDS)
def test_values(word: str, value: Any) -> None:
    assert settings_of([word]) == {word.partition("=")[0]: value}


@pytest.mark.parametrize("word", ["temperature", "=1", ""])
def test_a_word_without_key_or_value_is_told(word: str) -> None:
    with pytest.raises(ValueError, match="is no setting; write KEY=VALUE"):
        settings_of(["seed=1", word])


LINES: list[tuple[str, list[str]]] = [
    ("temperature=0.7   top_p=0.9 ", ["temperature=0.7", "top_p=0.9"]),
    ('stop=["a b", "c"] seed=1', ['stop=["a b", "c"]', "seed=1"]),
    ("stop=a b seed=1", ["stop=a b", "seed=1"]),
    ("stop='a b'", ["stop=a b"]),
    ('stop="\\n"', ['stop="\\n"']),
    ('regex="[a-z ]+" seed=1', ["regex=[a-z ]+", "seed=1"]),
    ("regex='", ["regex='"]),
    ("warm seed=1", ["warm", "seed=1"]),
]


@pytest.mark.parametrize(("line", "words"), LINES)
def test_words_of_a_line(line: str, words: list[str]) -> None:
    assert words_of(line) == words


@pytest.mark.parametrize("name", ["abacus", "meta", "cuda:99"])
def test_a_device_that_cannot_be_used_is_told(name: str) -> None:
    assert device_of("cpu").type == "cpu"
    with pytest.raises(ValueError, match=f"--device {name}"):
        device_of(name)
