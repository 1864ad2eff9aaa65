"""What a rank sends in a step, counted to the byte, against the textbook's formula; and the formula against figures."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.distributed as dist

from models import ModelConfig
from models.config import MoEConfig
from parallel.config import EngineConfig, ParallelConfig
from parallel.groups import LauncherRanks, build_groups
from parallel.traffic import Traffic, on_the_wire, tensor_bytes
from parallel.traffic_formula import Micro, Part, Step, expected
from tests import traffic_cases
from tests.cases import TINY
from tests.traffic_cases import Bytes

DEEP = dataclasses.replace(TINY, num_layers=4)
TIED = dataclasses.replace(DEEP, tied_embeddings=True)
FEW_HEADS = dataclasses.replace(TINY, family="qwen3", qk_norm=True)  # 2 key/value heads
EXPERTS = dataclasses.replace(TINY, family="mixtral", moe=MoEConfig(num_experts=8, top_k=2, expert_size=24))
SHARED = dataclasses.replace(
    DEEP,
    family="qwen2_moe",
    moe=MoEConfig(8, 3, 16, shared_size=40, shared_gate=True, first_dense=1, normalize=False),
)


def row(processes: int, layout: ParallelConfig, model: ModelConfig = TINY, **engine: Any) -> Any:
    parts = [f"{f.name}={v}" for f in dataclasses.fields(layout) if (v := getattr(layout, f.name)) != f.default]
    words = [*parts, model.family, *(f"{k}={v}" for k, v in engine.items()), *["tied"] * model.tied_embeddings]
    return pytest.param(processes, layout, model, {"zero": 1} | engine, id=" ".join(words))


P = ParallelConfig
ROWS = [
    *(row(2, P(), zero=zero) for zero in range(4)),
    *(
        row(2, P(tp=2, sequence_parallel=rows), recompute=recompute)
        for rows in (False, True)
        for recompute in ("none", "selective", "full")
    ),
    row(4, P(tp=4), FEW_HEADS),
    row(4, P(tp=4, sequence_parallel=True), FEW_HEADS),
    *(row(4, P(tp=2, sequence_parallel=True), zero=zero) for zero in range(4)),
    *(row(2, P(pp=2, schedule=name), DEEP) for name in ("gpipe", "1f1b", "interleaved", "zero_bubble", "zbv")),
    row(2, P(pp=2), TIED),
    row(2, P(pp=2, schedule="zbv"), TIED),
    row(4, P(pp=2, tp=2, sequence_parallel=True, schedule="zero_bubble"), TIED),
    row(4, P(pp=2), TIED, zero=0),
    *(row(2, P(cp=2, context=kind), recompute=again) for kind in ("ring", "ulysses") for again in ("none", "full")),
    row(4, P(cp=4)),
    row(4, P(cp=4, context="ulysses")),
    row(4, P(cp=2, tp=2), zero=3),
    row(4, P(cp=2, pp=2, context="ulysses"), DEEP),
    row(2, P(ep=2), EXPERTS),
    row(2, P(ep=2), EXPERTS, zero=0),
    row(2, P(ep=2), EXPERTS, recompute="full"),
    row(4, P(ep=2), EXPERTS),
    row(4, P(ep=2, tp=2), SHARED),
    row(4, P(ep=2, tp=2, sequence_parallel=True), SHARED, recompute="full"),
    row(4, P(ep=2, pp=2, schedule="interleaved"), SHARED),
    row(4, P(ep=2, cp=2), EXPERTS, zero=2),
]


@pytest.mark.parametrize(("processes", "layout", "model", "engine"), ROWS)
def test_every_byte_is_in_the_formula(
    pool, processes: int, layout: ParallelConfig, model: ModelConfig, engine: dict[str, Any]
) -> None:
    """Exact on every rank; where a term says "mean", in the sum over the ranks."""
    ranks = pool(processes).run(traffic_cases.counted, layout, model, **engine)
    assert all(sent for sent, *_ in ranks)
    differ = [rank for rank, (sent, wanted, _) in enumerate(ranks) if rounded(sent) != rounded(wanted)]
    if differ and any("(mean)" in term for term in ranks[0][2]):
        differ = [] if rounded(total([r[0] for r in ranks])) == rounded(total([r[1] for r in ranks])) else differ
    words = "\n".join(f"rank {r}\n  sent {ranks[r][0]}\n  want {ranks[r][1]}\n  {ranks[r][2]}" for r in differ)
    assert not differ, words


def rounded(some: Bytes) -> Bytes:
    """Without what is nothing and without the rounding of means."""
    return {key: round(size, 3) for key, size in some.items() if size}


def total(each: list[Bytes]) -> Bytes:
    return {key: sum(some.get(key, 0.0) for some in each) for some in each for key in some}


def test_one_sum_too_many_is_seen(pool) -> None:
    for sent, wanted, _ in pool(2).run(traffic_cases.counted, P(tp=2), TINY, extra=True, zero=1):
        assert sent["all_reduce", "all"] - wanted["all_reduce", "all"] == 4 * 7


PART = Part(
    hidden=4096, heads=32, kv_heads=8, head_dim=128, layers=32, embeds=True, makes_loss=True, sends_forward=0,
    sends_backward=0, dense_bytes=4 * 1000,
)  # fmt: skip
MICRO = Micro(tokens=2048, all_tokens=2048, targets=2048)


def by_kind(layout: ParallelConfig, world: int, part: Part = PART, zero: Any = 1, micro: Micro = MICRO) -> Bytes:
    found: Bytes = {}
    for term in expected(part, [micro], Step(layout, EngineConfig(zero=zero), world, "cuda")):
        found[term.kind, term.axis] = found.get((term.kind, term.axis), 0) + term.bytes
    return found


def test_tensor_parallel_of_a_7b_moves_four_sums_a_layer() -> None:
    """Megatron's figure: 4 all-reduces of T x D a layer and step; here fp32, plus embedding, loss and norm."""
    hidden = 2048 * 4096 * 4
    assert by_kind(P(tp=8), 8)["all_reduce", "tp"] == (4 * 32 + 2) * hidden + 3 * 2048 * 4
    rows = by_kind(P(tp=8, sequence_parallel=True), 8)
    assert rows["reduce_scatter", "tp"] == (4 * 32 + 2) * hidden
    assert rows["all_gather", "tp"] == (4 * 32 + 2 + 2 * 32) * hidden, "and the rows again for the weight gradients"


@pytest.mark.parametrize(("zero", "times"), [(0, 2), (1, 2), (2, 2), (3, 3)])
def test_zero_moves_two_or_three_times_the_parameters(zero: Any, times: int) -> None:
    """Rajbhandari et al. 2020, section 7, for many ranks; the norm's 8 bytes apart."""
    sent = by_kind(P(), 1000, zero=zero)
    wire = sum(on_the_wire(kind, size, 1000) for (kind, axis), size in sent.items() if axis == "data")
    assert wire == pytest.approx(times * 4000 * 999 / 1000)


def test_ring_passes_keys_and_values_of_all_other_ranks() -> None:
    micro = Micro(tokens=512, all_tokens=2048, targets=512, passed=(512,) * 3, brought=(512,) * 3)
    block = 2 * 512 * 8 * 128 * 4
    assert by_kind(P(cp=4), 4, micro=micro)["send", "cp"] == 32 * 3 * block * 3


def test_a_ring_all_reduce_crosses_twice() -> None:
    assert on_the_wire("all_reduce", 100, 4) == 150
    assert on_the_wire("all_gather", 100, 4) == 75
    assert (on_the_wire("send", 100, 2), on_the_wire("recv", 100, 2)) == (100, 0)


def test_kinds_and_groups_are_named(pool) -> None:
    for table in pool(4).run(traffic_cases.called):
        assert table == {
            ("all_reduce", "tp/model"): (2, 40 + 8),
            ("all_gather", "all"): (1, 4 * 24),
            ("reduce_scatter", "all"): (1, 32),
            ("all_to_all", "dp/data/expert_data"): (1, 16),
            ("broadcast", "all"): (1, 4),
            ("reduce", "all"): (1, 12),
            ("send", "tp/model"): (1, 20),
            ("recv", "tp/model"): (1, 20),
            ("barrier", "all"): (1, 0),
        }


def test_an_operator_it_does_not_know_is_refused(tmp_path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        traffic = Traffic(build_groups(LauncherRanks(), 60))
        with pytest.raises(ValueError, match="scatter_ is not counted"), traffic:
            dist.scatter(torch.zeros(2), [torch.zeros(2)])
    finally:
        dist.destroy_process_group()


def test_bytes_of_nested_lists() -> None:
    assert tensor_bytes([[torch.zeros(3)], [torch.zeros(2, dtype=torch.float64)]]) == 28
