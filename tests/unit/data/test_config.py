from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from data.config import DataConfig, SourceConfig, problems


@pytest.fixture
def good(tmp_path: Path) -> DataConfig:
    (tmp_path / "train.jsonl").write_text("{}\n")
    source = SourceConfig(str(tmp_path / "train.jsonl"))
    return DataConfig(sources=(source,), seq_len=128, micro_batch_rows=2, global_batch_rows=8)


def test_a_good_section_has_no_problem(good: DataConfig) -> None:
    assert problems(good) == []


CASES = [
    ({"sources": ()}, "data.sources", "add data.sources"),
    ({"seq_len": 0}, "data.seq_len", "1 or more"),
    ({"seq_len": 1}, "data.seq_len", "2 or more"),
    ({"micro_batch_rows": 3}, "data.global_batch_rows", "data.global_batch_rows=6 or 9"),
    ({"micro_batch_rows": 16}, "data.global_batch_rows", "data.global_batch_rows=16"),
    ({"packing": "bestfit"}, "data.packing", "data.packing=best_fit"),
    ({"packing": "None"}, "data.packing", "data.packing=none"),
    ({"eval_fraction": 1.0}, "data.eval_fraction", "0.01"),
    ({"max_bad_fraction": -0.1}, "data.max_bad_fraction", "0 stops"),
    ({"random_channels": -1}, "data.random_channels", "0 turns it off"),
    ({"max_picture_pixels": 10**9}, "data.max_picture_pixels", "data.max_picture_pixels=178956970"),
    ({"picture_workers": 0}, "data.picture_workers", "data.picture_workers=1 or more"),
    ({"tokenizer": "/nowhere/tok"}, "data.tokenizer", "has no"),
    ({"chat_template": "/nowhere/t.jinja"}, "data.chat_template", "has no"),
]


@pytest.mark.parametrize(("change", "key", "way_out"), CASES)
def test_each_mistake_names_its_key_and_the_way_out(good: DataConfig, change: dict, key: str, way_out: str) -> None:
    found = problems(dataclasses.replace(good, **change))
    assert [problem[0] for problem in found] == [key]
    assert way_out in found[0][3]


SOURCE_CASES = [
    ({"weight": -1.0}, "weight", "weight=1.0"),
    ({"weight": float("nan")}, "weight", "weight=1.0"),
    ({"format": "sharegtp"}, "format", "format=sharegpt (one of auto, messages"),
    ({"channel": "a", "channel_field": "b"}, "channel", "keep one"),
    ({"path": ""}, "path", "name a file"),
]


@pytest.mark.parametrize(("change", "field", "way_out"), SOURCE_CASES)
def test_source_mistakes(good: DataConfig, change: dict, field: str, way_out: str) -> None:
    other = dataclasses.replace(good.sources[0], **change)
    found = problems(dataclasses.replace(good, sources=(good.sources[0], other)))
    assert [problem[0] for problem in found] == [f"data.sources[1].{field}"]
    assert way_out in found[0][3]


def test_missing_path_names_the_nearest(good: DataConfig, tmp_path: Path) -> None:
    (key, _, _, way_out), *rest = problems(
        dataclasses.replace(good, eval_sources=(SourceConfig(f"{tmp_path}/trian.jsonl"),))
    )
    assert (key, rest) == ("data.eval_sources[0].path", [])
    assert way_out == f"did you mean {tmp_path}/train.jsonl?"


def test_all_mistakes_come_at_once(good: DataConfig) -> None:
    bad = dataclasses.replace(
        good, seq_len=-1, packing="x", eval_fraction=2.0, sources=(SourceConfig("/no", weight=-1),)
    )
    assert {problem[0] for problem in problems(bad)} == {
        "data.seq_len",
        "data.packing",
        "data.eval_fraction",
        "data.sources[0].path",
        "data.sources[0].weight",
    }


def test_weight_zero_everywhere(good: DataConfig) -> None:
    silent = dataclasses.replace(good.sources[0], weight=0.0)
    assert [p[0] for p in problems(dataclasses.replace(good, sources=(silent,)))] == ["data.sources[*].weight"]
