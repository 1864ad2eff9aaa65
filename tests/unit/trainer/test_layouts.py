"""Rules of a layout against what the layers, groups and schedules themselves accept; the nearest legal ones."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed import pipelining
from torch.nn import Identity

import models
from data.config import DataConfig
from models.config import ModelConfig, MoEConfig
from models.vision.config import ImageConfig, QFormerConfig, TowerConfig, VisionConfig
from parallel.config import EngineConfig, ParallelConfig
from parallel.sharding import Axis, Place
from tests.integration.matrix.rows import ROWS, Row, model_of
from trainer.config import Problem, format_problems
from trainer.layout_rules import Layout, broken
from trainer.layouts import KEYS, nearest, paste, problems

MODEL = ModelConfig(
    family="llama",
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_seq_len=128,
)
EXPERTS = MoEConfig(num_experts=6, top_k=2, expert_size=16)


SEES = {
    "vision": VisionConfig(
        "loom",
        TowerConfig("siglip", 32, 64, 2, 2, 4, 8),
        QFormerConfig(hidden_size=48, intermediate_size=64, num_heads=6),
        ImageConfig(),
    )
}


def layout(rows: int = 24, micro: int = 1, model: Any = None, engine: Any = None, **parallel: Any) -> Layout:
    data = DataConfig(sources=(), seq_len=8, micro_batch_rows=micro, global_batch_rows=rows)
    sizes = dataclasses.replace(MODEL, **(model or {}))
    return Layout(sizes, ParallelConfig(**parallel), EngineConfig(**(engine or {})), data)


REFUSED = [
    # world, layout, key, fragments of the reason, first way out
    (8, {"tp": 3}, "parallel.tp", ["takes 3 processes, and 8 were"], "parallel.tp=4"),
    (6, {"tp": 2, "pp": 2}, "parallel.tp x parallel.pp", ["takes 4 processes, and 6 were"], "parallel.pp=3"),
    (1, {"cp": 2}, "parallel.cp", ["takes 2 processes, and 1 was"], "parallel.cp=1"),
    (8, {"tp": 8}, "parallel.tp", ["model.num_heads=4"], "parallel.tp=4"),
    (
        3,
        {"tp": 3, "model": {"num_heads": 6, "num_kv_heads": 2}},
        "parallel.tp",
        ["neither a multiple"],
        "parallel.tp=1",
    ),
    (2, {"tp": 2, "model": {"intermediate_size": 47}}, "parallel.tp", ["model.intermediate_size=47"], "parallel.tp=1"),
    (
        4,
        {"tp": 4, "model": {"moe": dataclasses.replace(EXPERTS, expert_size=18, shared_size=6)}},
        "parallel.tp",
        ["model.moe.expert_size=18", "model.moe.shared_size=6"],
        "parallel.tp=2",
    ),
    (8, {"pp": 8}, "parallel.pp", ["8 stages share model.num_layers=4"], "parallel.pp=4"),
    (4, {"pp": 4, "schedule": "zbv"}, "parallel.pp", ["4 ranks x 2 stages (zbv) = 8"], "parallel.schedule=1f1b"),
    (2, {"pp": 2, "schedule": "interleaved", "vpp": 3}, "parallel.vpp", ["= 6 stages"], "parallel.vpp=1"),
    (2, {"pp": 2, "vpp": 2}, "parallel.vpp", ["1f1b has exactly 1 stage on"], "parallel.schedule=interleaved"),
    (2, {"pp": 2, "schedule": "zbv", "vpp": 1}, "parallel.vpp", ["zbv has exactly 2 stages"], "parallel.schedule=1f1b"),
    (2, {"pp": 2, "stage_layers": (4,)}, "parallel.stage_layers", ["says 1 stages"], "parallel.stage_layers=null"),
    (2, {"pp": 2, "stage_layers": (1, 2)}, "parallel.stage_layers", ["its sum is 3"], "parallel.stage_layers=null"),
    (2, {"pp": 2, "stage_layers": (0, 4)}, "parallel.stage_layers", ["at least one"], "parallel.stage_layers=null"),
    (
        4,
        {"pp": 4, "rows": 2},
        "data.global_batch_rows",
        ["2 / (data.micro_batch_rows=1 x 1 data parallel) = 2 micro-batches", "needs at least 4"],
        "parallel.schedule=gpipe",
    ),
    (
        2,
        {"pp": 2, "rows": 5, "schedule": "interleaved"},
        "data.global_batch_rows",
        ["in 2 rounds of equal size"],
        "parallel.schedule=1f1b",
    ),
    (
        4,
        {"cp": 4, "context": "ulysses", "model": {"num_heads": 6}},
        "parallel.cp",
        ["6 query"],
        "parallel.context=ring",
    ),
    (2, {"cp": 2, "engine": {"attention": "eager"}}, "engine.attention", ["ring"], "engine.attention=sdpa"),
    (2, {"ep": 2}, "parallel.ep", ["no experts"], "parallel.ep=1"),
    (4, {"ep": 4, "model": {"moe": EXPERTS}}, "parallel.ep", ["model.moe.num_experts=6"], "parallel.ep=2"),
    (2, {"tp": 2, "ep": 2, "model": {"moe": EXPERTS}}, "parallel.ep", ["different tokens, 1 here"], "parallel.ep=1"),
    (2, {"pp": 2, "engine": {"zero": 2}}, "engine.zero", ["parallel.pp=2"], "engine.zero=1"),
    (2, {"pp": 2, "engine": {"zero": 3}}, "engine.zero", ["parallel.pp=2"], "engine.zero=1"),
    (2, {"ep": 2, "engine": {"zero": 3}, "model": {"moe": EXPERTS}}, "engine.zero", ["parallel.ep=2"], "engine.zero=2"),
    (2, {"cp": 2, "model": SEES}, "parallel.cp", ["those that stand for one picture are not cut"], "parallel.cp=1"),
    (
        4,
        {"tp": 4, "model": SEES},
        "parallel.tp",
        ["vision.tower.num_heads=2", "connector.num_heads=6"],
        "parallel.tp=2",
    ),
    (
        2,
        {"pp": 2, "stage_layers": (0, 4)},
        "parallel.stage_layers",
        ["at least one layer"],
        "parallel.stage_layers=null",
    ),
    (
        2,
        {"pp": 2, "stage_layers": (4, 0), "model": SEES},
        "parallel.stage_layers",
        ["at least one layer (the first may have none where the model sees)"],
        "parallel.stage_layers=null",
    ),
]


@pytest.mark.parametrize(("world", "given_", "key", "fragments", "first"), REFUSED, ids=lambda value: str(value)[:60])
def test_is_refused(world: int, given_: dict[str, Any], key: str, fragments: list[str], first: str) -> None:
    told = problems(layout(**given_), world)
    assert key in [problem.key for problem in told]
    reasons = "; ".join(problem.reason for problem in told if problem.key == key)
    for fragment in fragments:
        assert fragment in reasons, reasons
    assert told[0].way_out.split("\n")[0] == first, told[0].way_out


LEGAL = [
    (1, {}),
    (8, {"tp": 2, "pp": 2, "cp": 2}),
    (4, {"tp": 4, "sequence_parallel": True}),  # two heads of keys for four ranks
    (8, {"tp": 2, "pp": 2, "schedule": "zbv"}),
    (4, {"pp": 2, "schedule": "interleaved", "rows": 6}),  # 3 micro-batches: one round
    (4, {"pp": 4, "schedule": "zero_bubble", "vpp": 1}),
    (2, {"pp": 2, "stage_layers": (1, 3)}),
    (2, {"pp": 2, "stage_layers": (0, 4), "model": SEES}),
    (8, {"tp": 2, "pp": 2, "cp": 2, "ep": 2, "model": {"moe": EXPERTS, "intermediate_size": 47}}),
    (6, {"ep": 6, "rows": 18, "engine": {"zero": 2}, "model": {"moe": EXPERTS}}),
    (4, {"cp": 4, "context": "ulysses"}),
    (2, {"tp": 2, "engine": {"zero": 3, "offload_optimizer": True}}),
]


@pytest.mark.parametrize(("world", "given_"), LEGAL, ids=lambda value: str(value)[:60])
def test_is_legal(world: int, given_: dict[str, Any]) -> None:
    assert problems(layout(**given_), world) == []


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_rows_of_the_matrix_are_legal(row: Row) -> None:
    data = DataConfig(sources=(), seq_len=64, micro_batch_rows=row.micro_rows, global_batch_rows=8)
    engine: Any = EngineConfig(zero=row.zero)  # pyright: ignore[reportArgumentType]
    assert problems(Layout(model_of(row.model), row.layout, engine, data), row.processes) == []


# ---- against what would be built ----------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    kv=st.sampled_from([1, 2, 3, 4]),
    repeat=st.sampled_from([1, 2, 3]),
    feed=st.sampled_from([8, 12, 18, 24]),
    tp=st.sampled_from([1, 2, 3, 4, 6, 8]),
)
def test_a_size_of_tp_is_legal_where_the_layers_can_be_cut(kv: int, repeat: int, feed: int, tp: int) -> None:
    """The reference is the layers themselves, built on the meta device by the last rank."""
    sizes = {"num_heads": kv * repeat, "num_kv_heads": kv, "intermediate_size": feed, "num_layers": 1}
    asked = layout(tp=tp, model=sizes)
    try:
        layer: Any = models.build(asked.model, Place(tp=Axis(tp, tp - 1))).layers["0"]
        builds = layer.attn.heads.queries * tp == kv * repeat
    except AssertionError:
        builds = False
    assert (list(broken(asked, tp)) == []) == builds


class Stage:
    """As much of a pipeline stage as torch's schedules ask for when they are made."""

    def __init__(self, index: int, stages: int, ranks: int):
        self.stage_index, self.num_stages, self.group_size, self.group_rank = index, stages, ranks, 0
        self.is_first, self.is_last, self.has_backward, self.submod = index == 0, index == stages - 1, True, Identity()


SCHEDULES: dict[str, Any] = {
    "gpipe": pipelining.ScheduleGPipe,
    "1f1b": pipelining.Schedule1F1B,
    "interleaved": pipelining.ScheduleInterleaved1F1B,
    "zero_bubble": pipelining.ScheduleInterleavedZeroBubble,
    "zbv": pipelining.ScheduleZBVZeroBubble,
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("pp", [2, 3])
@pytest.mark.parametrize("vpp", [1, 2, 3])
def test_a_pipeline_is_legal_where_torch_can_be_given_it(schedule: str, pp: int, vpp: int) -> None:
    """The reference is torch's own constructor, for every number of micro-batches up to 8."""
    for count in range(1, 9):
        stages: Any = [Stage(i * pp, pp * vpp, pp) for i in range(vpp)]
        single = schedule in ("gpipe", "1f1b")
        try:
            SCHEDULES[schedule](stages[0] if single else stages, count, loss_fn=lambda *_: 0)
            runs = not (single and vpp > 1)
        except ValueError:
            runs = False
        asked = layout(rows=count, pp=pp, vpp=vpp, schedule=schedule, model={"num_layers": 12})
        assert (problems(asked, pp) == []) == runs, count


# ---- the nearest --------------------------------------------------------------------------------------------------


def changed(asked: Layout, other: Layout) -> list[str]:
    return [key for key in KEYS if asked.get(key) != other.get(key)]


@settings(max_examples=60, deadline=None)
@given(
    world=st.sampled_from([1, 2, 4, 6, 8, 12]),
    sizes=st.tuples(*[st.sampled_from([1, 2, 3, 4])] * 4),
    schedule=st.sampled_from(sorted(SCHEDULES)),
    zero=st.sampled_from([0, 1, 2, 3]),
    rows=st.sampled_from([1, 6, 8, 24]),
    moe=st.sampled_from([None, EXPERTS]),
)
def test_suggestions_are_legal_few_and_minimal(
    world: int, sizes: tuple[int, ...], schedule: Any, zero: Any, rows: int, moe: MoEConfig | None
) -> None:
    tp, pp, cp, ep = sizes
    asked = layout(rows=rows, model={"moe": moe}, engine={"zero": zero}, tp=tp, pp=pp, cp=cp, ep=ep, schedule=schedule)
    told = problems(asked, world)
    if not told:
        return
    found = nearest(asked, world)
    assert 1 <= len(found) <= 3
    fewest = {len(changed(asked, near)) for near in found}
    assert len(fewest) == 1
    for near in found:
        assert list(broken(near, world)) == [] and near.micro_batches(world)
        for key in changed(asked, near):  # every change is needed
            back = near.with_(key, asked.get(key))
            assert list(broken(back, world)) or not back.micro_batches(world), (paste(asked, near), key)


def test_what_trains_the_same_comes_first_then_the_closest() -> None:
    asked = layout(rows=2, pp=4)
    assert [paste(asked, near) for near in nearest(asked, 4)] == ["parallel.schedule=gpipe", "data.global_batch_rows=4"]
    assert [paste(layout(tp=8), near) for near in nearest(layout(tp=8), 8)] == [
        "parallel.tp=4",
        "parallel.tp=2",
        "parallel.tp=1",
    ]


def test_more_processes_are_offered_where_they_suffice() -> None:
    way = problems(layout(tp=2, pp=2), 6)[0].way_out
    assert way.split("\n")[-1].startswith("8 processes for the layout as it is")
    assert "processes for the layout" not in problems(layout(tp=8), 6)[0].way_out


def test_all_faults_come_together_with_one_way_out() -> None:
    told = problems(layout(tp=8, pp=2, cp=2, ep=2, rows=8, engine={"zero": 3}), 8)
    assert [problem.key for problem in told] == [
        "parallel.tp x parallel.pp x parallel.cp", "parallel.tp", "parallel.ep", "engine.zero",
    ]  # fmt: skip
    assert len({problem.way_out for problem in told}) == 1
    text = format_problems([*told, Problem("log.every", 0, "r", "log.every=1")])
    assert text.count("      try: ") == 2 and text.count("       or: ") == told[0].way_out.count("\n")
    assert "parallel.tp x parallel.pp x parallel.cp = 32" in text


def test_wrong_sizes_are_left_to_their_sections() -> None:
    assert problems(layout(tp=0), 2) == []
    assert problems(layout(tp=3, model={"num_heads": 0}), 2) == []
    assert problems(layout(tp=3, rows=0), 2) == []


def test_is_quick_where_many_processes_are() -> None:
    """CPU time of the worst case: about 1 s; refused from 10 s."""
    asked = layout(rows=24, micro=5, tp=16, pp=128, ep=64, schedule="interleaved", engine={"zero": 3})
    begin = time.process_time()
    assert problems(asked, 1024)
    assert time.process_time() - begin < 10
