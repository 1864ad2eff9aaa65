"""Numbers of documents: computed once in any layout, found again, in every micro-batch."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.batch import MicroBatch
from data.config import DataConfig, SourceConfig
from data.peers import Peers
from data.pipeline import TrainingData, build
from data.precomputed import precomputed


def rows(start: int, stop: int) -> list[dict[str, Any]]:
    return [
        {"prompt": f"question {n}", "chosen": f" yes {n}" * (n % 4 + 1), "rejected": " no"} for n in range(start, stop)
    ]


def number_of(tokens: list[int], learnt: int) -> float:
    """Stands for a log-probability: told by the document alone."""
    return -sum(token * (place + 1) for place, token in enumerate(tokens)) / 7 - learnt


def of_documents(batch: MicroBatch) -> list[float]:
    borders = batch.cu_seqlens.tolist()
    return [
        number_of(batch.tokens_T[start:stop].tolist(), int(learnt))
        for start, stop, learnt in zip(borders, borders[1:], batch.targets_N, strict=False)
    ]


class Scorer:
    """Sums over ranks by threads' shared memory; counts how many documents it was asked for."""

    def __init__(self, world: int) -> None:
        self.asked = 0
        self.lengths: list[int] = []
        self._barrier = threading.Barrier(world, timeout=60)
        self._lock = threading.Lock()
        self._sum = np.zeros(0)

    def __call__(self, batches: Iterator[MicroBatch], size: int) -> np.ndarray:
        mine, count = np.zeros(size), 0
        for batch in batches:
            count += 1
            for index, number in zip(batch.doc_facts["document"].tolist(), of_documents(batch), strict=True):
                if index >= 0:
                    mine[int(index)] += number
                    with self._lock:
                        self.asked += 1
        with self._lock:
            self.lengths.append(count)
            self._sum = mine if len(self.lengths) == 1 else self._sum + mine
        self._barrier.wait()
        return self._sum


@pytest.fixture
def make(tmp_path: Path, tokenizer_folder: str):
    def make_data(*sources: str, peers: Peers | None = None, kind: Any = "preference", **changes: Any) -> TrainingData:
        settings = {"seq_len": 128, "micro_batch_rows": 1, "global_batch_rows": 4, "cache_dir": f"{tmp_path}/cache"}
        cfg = DataConfig(sources=tuple(SourceConfig(path) for path in sources), **{**settings, **changes})
        run: dict[str, Any] = {"tokenizer_folder": tokenizer_folder, "loss_on": "all", "seed": 0, "max_seq_len": 4096}
        return build(cfg, peers=peers or Peers.alone(), kind=kind, **run)

    return make_data


def prepared(data: TrainingData, scorer: Scorer, peers: Peers | None = None, made_by: str = "model") -> TrainingData:
    peers = peers or Peers.alone()
    settings = {"rank": peers.rank, "world": peers.world, "micro_batch_rows": 2, "peers": peers}
    return precomputed(data, "reference", made_by, scorer, **settings)  # pyright: ignore


def check(data: TrainingData) -> None:
    """Every document of the training and the held-out part has its own number."""
    batches = data.micro_batches(data.global_batch(0, data.rows_per_epoch), 0, 1, 1) + data.eval_batches(0, 1, 2)
    for batch in batches:
        assert batch.doc_facts["reference"].tolist() == of_documents(batch)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_any_layout_scores_every_document_once(write_jsonl, make, on_ranks, world: int) -> None:
    paths = [write_jsonl("a.jsonl", rows(0, 20)), write_jsonl("b.jsonl", rows(20, 26))]
    scorer = Scorer(world)
    settings: dict[str, Any] = {"eval_fraction": 0.3}
    results = on_ranks(world, lambda peers: prepared(make(*paths, peers=peers, **settings), scorer, peers))
    assert scorer.asked == 2 * 26 and len(set(scorer.lengths)) == 1
    for data in results:
        assert isinstance(data, TrainingData), data
        assert data.report.channels[0].eval_samples > 0
        check(data)
    again = Scorer(1)
    check(prepared(make(*paths, packing="none", **settings), again))
    assert again.asked == 0


def test_only_what_is_missing_is_scored(write_jsonl, make) -> None:
    first, second = write_jsonl("a.jsonl", rows(0, 5)), write_jsonl("b.jsonl", rows(5, 12))
    prepared(make(first), Scorer(1))
    for sources, made_by, seq_len, asked in (
        ((first,), "model", 128, 0),
        ((second, first), "model", 128, 14),
        ((first, second), "model", 128, 0),
        ((first, second), "other", 128, 24),
        ((first,), "model", 127, 10),
    ):
        scorer = Scorer(1)
        check(prepared(make(*sources, seq_len=seq_len), scorer, made_by=made_by))
        assert scorer.asked == asked


def test_judged_answers_and_what_fills_up(write_jsonl, make) -> None:
    judged = [{"prompt": f"q{n}", "completion": " a" * (n + 1), "label": n % 2 == 0} for n in range(5)]
    data = prepared(make(write_jsonl("a.jsonl", judged), kind="unpaired", eval_fraction=0.5), Scorer(1))
    check(data)
    *_, filler = data.eval_batches(15, 16, 1)
    assert {name: values.tolist() for name, values in filler.doc_facts.items()} == {"label": [-1], "reference": [-1]}


def test_dropped_pairs_have_no_number_and_need_none(write_jsonl, make) -> None:
    useless = [{"prompt": "q", "chosen": "a", "rejected": "a"}, {"prompt": "q" * 200, "chosen": "a", "rejected": "b"}]
    scorer = Scorer(1)
    data = prepared(make(write_jsonl("a.jsonl", [*useless, *rows(0, 3)])), scorer)
    check(data)
    assert scorer.asked == 6
    assert np.isnan(data.numbers["reference"][0]).all(axis=1).tolist() == [True, True, False, False, False]


def test_a_run_that_breaks_off_or_goes_wrong_leaves_nothing(write_jsonl, make, monkeypatch) -> None:
    data = make(write_jsonl("a.jsonl", rows(0, 3)))
    before = set(os.listdir(data.caches[0].folder))

    def wrong(batches: Iterator[MicroBatch], size: int) -> np.ndarray:
        assert len(list(batches)) > 0
        return np.array([1.0, 2.0, 3.0, float("nan"), 5.0, 6.0])

    with pytest.raises(
        ValueError, match=r"reference of 1 of 3 samples is not a finite number.*a.jsonl:2: \[3.0, nan\]"
    ):
        prepared(data, wrong)  # pyright: ignore[reportArgumentType]

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(ValueError, match=r"data\.cache_dir=.*No space left"):
        patch.setattr(os, "replace", full)
        prepared(data, Scorer(1))
    assert set(os.listdir(data.caches[0].folder)) == before
    check(prepared(data, Scorer(1)))
    (made,) = set(os.listdir(data.caches[0].folder)) - before
    Path(data.caches[0].folder, made).write_bytes(b"damaged")
    scorer = Scorer(1)
    check(prepared(data, scorer))
    assert scorer.asked == 6
