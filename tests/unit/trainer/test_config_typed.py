"""The typed door on small dataclasses: every field type, every refusal, all refusals at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer import typed
from trainer.problems import Problem, format_problems, nearest


@dataclass(frozen=True)
class Leaf:
    path: str
    weight: float = 1.0


@dataclass(frozen=True)
class Tree:
    leaf: Leaf
    size: int
    leaves: tuple[Leaf, ...] = ()
    pair: tuple[float, float] = (0.5, 0.5)
    kind: Literal["fp32", "bf16"] = "fp32"
    stage: Literal[0, 1, 2, 3] = 1
    on: bool = False
    name: str | None = None
    shares: dict[str, float] | None = None


GOOD = {"leaf": {"path": "a"}, "size": 3}


def read(tree: object, examples: dict[str, str] | None = None) -> tuple[Tree | None, list[Problem]]:
    problems: list[Problem] = []
    return typed.build(Tree, tree, "", problems, examples or {}), problems


def test_reads_every_field_type() -> None:
    tree = {
        "leaf": {"path": "a", "weight": 2},
        "size": 3,
        "leaves": [{"path": "b"}, {"path": "c", "weight": 0.5}],
        "pair": [0, 1],
        "kind": "bf16",
        "stage": 3,
        "on": True,
        "name": None,
        "shares": {"x": 1},
    }
    built, problems = read(tree)
    assert problems == []
    assert built == Tree(Leaf("a", 2.0), 3, (Leaf("b"), Leaf("c", 0.5)), (0.0, 1.0), "bf16", 3, True, None, {"x": 1.0})
    assert built is not None and isinstance(built.leaf.weight, float) and isinstance(built.pair[0], float)


@pytest.mark.parametrize(
    ("change", "key", "reason", "way_out"),
    [
        ({"size": 3.0}, "size", "whole number", "size=3"),
        ({"size": "3"}, "size", "got a text", "size="),
        ({"size": True}, "size", "got true or false", "size="),
        ({"size": None}, "size", "got null", "size="),
        ({"on": 1}, "on", "expected true or false", "on=true"),
        ({"on": "no"}, "on", "expected true or false", "on=false"),
        ({"name": 12}, "name", "expected a text", "'name=\"12\"'"),
        ({"kind": "BF16"}, "kind", "one of: fp32, bf16", "kind=bf16"),
        ({"kind": True}, "kind", "one of", "kind=fp32"),
        ({"stage": 7}, "stage", "one of: 0, 1, 2, 3", "stage=3"),
        ({"stage": True}, "stage", "one of", "stage="),
        ({"stage": "1"}, "stage", "one of", "stage=1"),
        ({"pair": [1.0]}, "pair", "expected 2 values, got 1", "give all"),
        ({"pair": 1.0}, "pair", "expected a list", "pair=[1.0]"),
        ({"leaves": "b"}, "leaves", "expected a list", "leaves=[b]"),
        ({"leaves": ["b"]}, "leaves[0]", "keys path, weight", "leaves[0].KEY"),
        (
            {"leaves": [{"path": "b", "wieght": 1}]},
            "leaves[0].wieght",
            "no such setting",
            "did you mean leaves[0].weight?",
        ),
        ({"leaves": [{}]}, "leaves[0].path", "must be given", "leaves[0].path=VALUE"),
        ({"leaf": {"path": "???"}}, "leaf.path", "must be given", "leaf.path=VALUE"),
        ({"leaf": 3}, "leaf", "keys path, weight", "leaf.KEY=VALUE"),
        ({"shares": {"x": "y"}}, "shares.x", "expected a number", "shares.x="),
        ({"siez": 4}, "siez", "no such setting", "did you mean size?"),
        ({"qqq": 4}, "qqq", "no such setting", "one of: leaf, size"),
    ],
)
def test_refuses(change: dict[str, Any], key: str, reason: str, way_out: str) -> None:
    built, problems = read({**GOOD, **change})
    assert built is None
    (problem,) = problems
    assert problem.key == key
    assert reason in problem.reason
    assert way_out in problem.way_out


def test_all_refusals_are_told_at_once() -> None:
    tree = {"leaf": {"paht": "a"}, "size": "x", "kind": "fp8", "leaves": [{"path": 1}, {"path": 2}], "extra": 1}
    built, problems = read(tree)
    assert built is None
    assert {p.key for p in problems} == {
        "extra", "leaf.paht", "leaf.path", "size", "kind", "leaves[0].path", "leaves[1].path"
    }  # fmt: skip


def test_examples_show_how_to_give_a_list() -> None:
    _, problems = read({**GOOD, "leaves": "b.jsonl"}, {"leaves": "'leaves=[{path: b.jsonl}]'"})
    assert problems[0].way_out == "'leaves=[{path: b.jsonl}]'"


def test_a_value_error_of_the_dataclass_becomes_a_problem() -> None:
    @dataclass(frozen=True)
    class Even:
        n: int = 0

        def __post_init__(self) -> None:
            if self.n % 2:
                raise ValueError("n must be even")

    problems: list[Problem] = []
    assert typed.build(Even, {"n": 3}, "even", problems, {}) is None
    assert problems[0].key == "even"
    assert "n must be even" in problems[0].reason


def test_keys_spell_lists_of_sections() -> None:
    assert typed.keys(Tree) == [
        "leaf.path", "leaf.weight", "size", "leaves", "leaves[].path", "leaves[].weight", "pair", "kind", "stage", "on",
        "name", "shares",
    ]  # fmt: skip


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["leaf", "size", "path", "x"]), inner)
        ),
        max_leaves=8,
    )
)
def test_any_tree_is_built_or_told(tree: object) -> None:
    """Whatever YAML can hold: either a dataclass or at least one problem, never an exception."""
    built, problems = read(tree)
    assert (built is None) == bool(problems)
    format_problems(problems)


def test_the_message_has_key_value_reason_and_way_out() -> None:
    text = format_problems(
        [
            Problem("engine.zero", 4, "ZeRO has stages 0 to 3", "engine.zero=3"),
            Problem("a.b", None, "r", "did you mean a.c?"),
        ]
    )
    assert text.splitlines() == [
        "The configuration has 2 problems; nothing was started.",
        "  engine.zero = 4",
        "      ZeRO has stages 0 to 3",
        "      try: engine.zero=3",
        "  a.b = null",
        "      r",
        "      did you mean a.c?",
    ]


def test_nearest_ignores_letter_case_and_says_nothing_when_nothing_is_near() -> None:
    assert nearest("LLAMA7b", ["llama7b", "llama2_13b", "qwen3_8b"])[0] == "llama7b"
    assert nearest("zzz", ["llama7b"]) == []


@dataclass(frozen=True)
class Fox:
    name: Literal["red", "grey"]
    tail: int = 1


@dataclass(frozen=True)
class Crow:
    name: Literal["crow"] = "crow"
    wing: float = 2.0


@dataclass(frozen=True)
class Wood:
    animal: Fox | Crow


def test_a_union_of_sections_is_told_apart_by_name() -> None:
    problems: list[Problem] = []
    assert typed.build(Wood, {"animal": {"name": "grey", "tail": 3}}, "", problems, {}) == Wood(Fox("grey", 3))
    assert typed.build(Wood, {"animal": {"name": "crow"}}, "", problems, {}) == Wood(Crow())
    assert typed.keys(Wood) == ["animal.name", "animal.tail", "animal.wing"] and not problems


def test_a_setting_of_another_member_or_an_unknown_name_is_refused() -> None:
    problems: list[Problem] = []
    assert typed.build(Wood, {"animal": {"name": "crow", "tail": 3}}, "", problems, {}) is None
    assert typed.build(Wood, {"animal": {"name": "cow"}}, "", problems, {}) is None
    assert [problem.key for problem in problems] == ["animal.tail", "animal.name"]
    assert problems[1].reason == "must be one of: red, grey, crow" and problems[1].way_out == "animal.name=crow"
