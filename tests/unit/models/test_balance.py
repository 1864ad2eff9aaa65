"""Cuts of layers into stages against every possible cut."""

from __future__ import annotations

import dataclasses
import itertools
import time
from typing import Any

import numpy as np
import pytest

from models.balance import ATTENTION_SLOWNESS, ELEMENT_WISE, Costs, Trained, chunks_of, costs_of, split_layers, split_v
from models.config import MoEConfig
from models.flops import step_flops
from parallel.config import ParallelConfig
from tests.cases import TINY
from tests.integration.matrix.rows import model_of


def every_cut(layers: int, stages: int, least: int = 1) -> list[tuple[int, ...]]:
    """Cuts with `least` layers in the first stage."""
    borders = itertools.combinations(range(least, layers), stages - 1)
    return [tuple(b - a for a, b in itertools.pairwise((0, *inner, layers))) for inner in borders]


def stage_costs(costs: Costs, cut: tuple[int, ...]) -> list[float]:
    edges = [0, *itertools.accumulate(cut)]
    first, *others = (costs.stage(a, b) for a, b in itertools.pairwise(edges))
    return [costs.eyes + first, *others]


def rank_costs(costs: Costs, cut: tuple[int, ...]) -> list[float]:
    stages = stage_costs(costs, cut)
    return [stages[r] + stages[-1 - r] for r in range(len(stages) // 2)]


@pytest.mark.parametrize("seed", range(20))
def test_the_heaviest_is_the_lightest_of_all_cuts(seed: int) -> None:
    random = np.random.default_rng(seed)
    layers = int(random.integers(4, 11))
    costs = Costs(tuple(random.choice([1.0, 2.0, 5.0], layers) * random.random(layers)), float(random.random() * 6))
    stages = int(random.integers(1, layers + 1))
    best = min(max(stage_costs(costs, cut)) for cut in every_cut(layers, stages))
    got = split_layers(costs, stages)
    assert sum(got) == layers and min(got) > 0 and len(got) == stages
    assert max(stage_costs(costs, got)) == pytest.approx(best, rel=1e-12)
    ranks = int(random.integers(1, layers // 2 + 1))
    best = min(max(rank_costs(costs, cut)) for cut in every_cut(layers, 2 * ranks))
    got = split_v(costs, ranks)
    assert sum(got) == layers and min(got) > 0 and len(got) == 2 * ranks
    assert max(rank_costs(costs, got)) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_eyes_as_heavy_as_a_stage_leave_it_no_layer(seed: int) -> None:
    """The lightest of all cuts, the first stage with layers or without."""
    random = np.random.default_rng(100 + seed)
    layers = int(random.integers(4, 10))
    costs = Costs(tuple(random.random(layers)), float(random.random() * 2), float(random.random() * 4))
    stages, ranks = int(random.integers(2, layers + 1)), int(random.integers(1, layers // 2 + 1))
    for got, weigh, count in (
        (split_layers(costs, stages), stage_costs, stages),
        (split_v(costs, ranks), rank_costs, 2 * ranks),
    ):
        best = min(max(weigh(costs, cut)) for cut in every_cut(layers, count, 0))
        assert sum(got) == layers and min(got[1:]) > 0 and len(got) == count
        assert max(weigh(costs, got)) == pytest.approx(best, rel=1e-12)
    assert split_layers(Costs((1.0,) * 6, 0.0, 3.0), 3) == (0, 3, 3) == split_layers(Costs((1.0,) * 6, 0.0, 9.0), 3)
    assert split_layers(Costs((1.0,) * 5, 0.0, 1.0), 3) == (1, 2, 2)


def test_equal_layers_are_cut_evenly_and_a_heavy_head_takes_layers_away() -> None:
    assert split_layers(Costs((1.0,) * 8), 4) == (2, 2, 2, 2)
    assert split_layers(Costs((1.0,) * 10, head=2.0), 4) == (3, 3, 3, 1)
    assert split_v(Costs((1.0,) * 8), 2) == (2, 2, 2, 2)
    assert sum(split_v(Costs((1.0,) * 10, head=2.0), 2)[i] for i in (0, 3)) == 4


@pytest.mark.parametrize("v", [False, True])
def test_large_models_are_cut_in_no_time(v: bool) -> None:
    cfg = dataclasses.replace(TINY, num_layers=126, vocab_size=128_256, hidden_size=16_384, intermediate_size=53_248)
    costs = costs_of(cfg, 4096)
    start = time.process_time()
    got = split_v(costs, 16) if v else split_layers(costs, 64)
    assert time.process_time() - start < 3 and sum(got) == 126


def test_layers_are_weighed_one_by_one() -> None:
    """By hand for 64 tokens: products, attention of the full or the windowed layer, the rest; and the head."""
    cfg = dataclasses.replace(TINY, num_layers=2, sliding_window=16, full_attention_layers=1)
    d, pairs = 32, (64 * 65 // 2, 16 * 17 // 2 + 48 * 16)
    products = 6 * 64 * (d * 64 + 32 * d + 3 * d * 48)
    costs = costs_of(cfg, 64)
    for got, pair in zip(costs.layers, pairs, strict=True):
        beside = ELEMENT_WISE * d * 64
        # A token attends at least to itself, which counts as a product here.
        want = products + 12 * d * 64 + ATTENTION_SLOWNESS * 12 * d * (pair - 64) + beside
        assert got == pytest.approx(want)
    assert costs.head == pytest.approx(6 * 64 * 97 * d)


def test_experts_weigh_what_a_token_uses_of_them() -> None:
    moe = MoEConfig(num_experts=8, top_k=2, expert_size=48, first_dense=1)
    dense, experts, last = costs_of(dataclasses.replace(TINY, family="qwen3_moe", num_layers=3, moe=moe), 64).layers
    assert experts == last
    assert experts - dense == pytest.approx(6 * 64 * 32 * (3 * 48 + 8))  # a second expert, and the router


def test_frozen_parts_count_less() -> None:
    """A linear layer is three equal products; the rest of a backward has no weights and stays whole where it runs."""
    cfg = dataclasses.replace(TINY, num_layers=4)
    whole = costs_of(cfg, 64)
    products = (step_flops(cfg, [1] * 64, 0)) / 4
    got = costs_of(cfg, 64, Trained((False, True, False, True), embedding=False, head=False))
    assert got.layers[0] == pytest.approx(whole.layers[0] / 3)  # nothing before it is trained
    assert got.layers[1] == pytest.approx(whole.layers[1])
    assert got.layers[2] == pytest.approx(whole.layers[2] - products / 3)  # passes the gradient on
    assert got.head == pytest.approx(whole.head * 2 / 3)
    passed = costs_of(cfg, 64, Trained((False,) * 4))  # the embedding is trained
    assert passed.layers[0] == pytest.approx(whole.layers[0] - products / 3)


def test_a_tower_stands_before_the_first_layer_and_a_frozen_one_weighs_less() -> None:
    """3 layers of 32 x (4 x 32 + 2 x 64) weights, and a patch for every second token; frozen ones run forward only."""
    sees = model_of("llama_deep_sees_tiles")
    blind, weights, patches = dataclasses.replace(sees, vision=None), 3 * 32 * (4 * 32 + 2 * 64), 32
    beside = ELEMENT_WISE * 32 * patches
    everything, plain = costs_of(sees, 64), costs_of(blind, 64)
    frozen = costs_of(sees, 64, Trained((True,) * 8, vision=False))
    assert everything.eyes == pytest.approx(6 * weights * patches + beside) and plain.eyes == 0
    assert frozen.eyes == pytest.approx(2 * weights * patches + beside)
    assert everything.layers == plain.layers
    assert sees.vision is not None
    deep = dataclasses.replace(sees.vision, tower=dataclasses.replace(sees.vision.tower, num_layers=48))
    heavy = costs_of(dataclasses.replace(sees, vision=deep), 64)
    assert split_layers(heavy, 2)[0] < split_layers(plain, 2)[0]
    deeper = dataclasses.replace(deep, tower=dataclasses.replace(deep.tower, num_layers=1000))
    cfg = dataclasses.replace(sees, vision=deeper)
    chunks = [c for rank in range(2) for c in chunks_of(cfg, ParallelConfig(pp=2), rank)]
    assert [(c.first, c.stop, c.embeds, c.heads) for c in chunks] == [(0, 0, True, False), (0, 8, False, True)]


@pytest.mark.parametrize(("schedule", "vpp"), [("1f1b", 1), ("interleaved", 2), ("zbv", 2)])
def test_chunks_of_all_ranks_are_the_model(schedule: Any, vpp: int) -> None:
    cfg, layout = dataclasses.replace(TINY, num_layers=9), ParallelConfig(pp=2, schedule=schedule, vpp=vpp)
    chunks = [chunk for rank in range(2) for chunk in chunks_of(cfg, layout, rank)]
    assert sorted(i for c in chunks for i in range(c.first, c.stop)) == list(range(9))
    assert [c.first for c in chunks if c.embeds] == [0] and [c.stop for c in chunks if c.heads] == [9]
    assert all(c.stop > c.first for c in chunks)
    last = 0 if schedule == "zbv" else 1
    assert chunks_of(cfg, layout, last)[-1].heads and chunks_of(cfg, layout, 0)[0].embeds


def test_by_hand_and_without_a_pipeline() -> None:
    cfg = dataclasses.replace(TINY, num_layers=5)
    by_hand = ParallelConfig(pp=2, stage_layers=(4, 1))
    assert [(c.first, c.stop) for r in range(2) for c in chunks_of(cfg, by_hand, r)] == [(0, 4), (4, 5)]
    (whole,) = chunks_of(cfg, ParallelConfig(), 0)
    assert (whole.first, whole.stop, whole.embeds, whole.heads) == (0, 5, True, True)


def test_more_stages_than_layers_is_our_mistake() -> None:
    with pytest.raises(AssertionError, match="do not fill"):
        chunks_of(dataclasses.replace(TINY, num_layers=3), ParallelConfig(pp=4), 0)
