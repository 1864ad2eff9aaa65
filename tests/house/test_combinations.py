"""Every two features of the table in README: those that work pass the checks, those that are refused do not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations as choose
from pathlib import Path

import combinations as table
import pytest
from omegaconf import DictConfig, OmegaConf

from trainer.config import Machine, Problem, RunConfig, check, ignored
from trainer.door import load

START = ("data.sources=[{path: chats.jsonl}]", "data.tokenizer=assets/smollm2-135m-instruct")
GPU = Machine(gpu=True, flash_attn=True)
Compose = Callable[..., DictConfig]


@pytest.fixture
def typed(composed: Compose, world: Path) -> Callable[[Sequence[str]], RunConfig]:
    """A run from words; the files are read once for each model, since composing them takes longest."""
    bases: dict[str, DictConfig] = {}

    def run_of(words: Sequence[str]) -> RunConfig:
        model, *rest = words
        if model not in bases:
            bases[model] = composed(model, *START)
        return load(with_words(bases[model], rest))

    return run_of


def with_words(base: DictConfig, words: Sequence[str]) -> DictConfig:
    """``base`` with key=value words."""
    merged = OmegaConf.merge(OmegaConf.create(OmegaConf.to_container(base)), OmegaConf.from_dotlist(list(words)))
    assert isinstance(merged, DictConfig)
    return merged


def told(cfg: RunConfig) -> list[Problem]:
    return check(cfg, table.PROCESSES, GPU)


def test_every_pair(typed: Callable[[Sequence[str]], RunConfig]) -> None:
    tried = 0
    for one, other, words in table.pairs():
        cfg, row = typed(words), table.why_refused(one, other)
        problems = told(cfg)
        assert bool(problems) == (row is not None), f"{one.name} with {other.name}: {problems}"
        if row is None:
            assert not [text for text in ignored(cfg, GPU) if "ignored" in text], f"{one.name} with {other.name}"
        tried += 1
    assert tried > 300


def test_a_refusal_is_about_the_two(typed: Callable[[Sequence[str]], RunConfig]) -> None:
    """The message is about a key that one of the two features sets, and its ways out take one of them back."""
    for one, other, words in table.pairs():
        if table.why_refused(one, other) is None:
            continue
        keys = {word.split("=")[0] for feature in (one, other) for word in feature.words}
        (problem,) = told(typed(words))
        assert problem.key in keys, f"{one.name} with {other.name}: {problem}"
        assert any(f"{key}=" in problem.way_out for key in keys)


def test_each_feature_works_alone(typed: Callable[[Sequence[str]], RunConfig]) -> None:
    for feature in table.FEATURES:
        words = table.words(feature)
        assert words is not None
        assert told(typed(words)) == [], feature.name


def test_triples_are_refused_only_for_a_pair_in_them(typed: Callable[[Sequence[str]], RunConfig]) -> None:
    """The layout features three at a time: nothing beyond the rows of the table stands in the way."""
    layout = (table.TP, table.ROWS, *table.PP, table.RING, table.ULYSSES, table.EP, *table.ZERO, table.OFFLOAD)
    for three in choose(layout, 3):
        words = table.words(*three)
        if words is None:
            continue
        refused = any(table.why_refused(one, other) for one, other in choose(three, 2))
        assert bool(told(typed(words))) == refused, [feature.name for feature in three]


def test_every_row_of_refusals_is_about_some_pair() -> None:
    used = {table.why_refused(one, other) for one, other, _ in table.pairs()}
    assert used - {None} == set(range(1, len(table.REFUSED) + 1))


def test_every_feature_is_in_one_line_of_the_table() -> None:
    listed = [feature for line in table.LINES.values() for feature in line]
    assert sorted(feature.name for feature in listed) == sorted(feature.name for feature in table.FEATURES)


def test_the_readme_has_the_table() -> None:
    assert table.README.read_text() == table.readme(), "python scripts/combinations.py writes it"
