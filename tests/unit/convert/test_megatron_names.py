"""Every rank's tensors against the plain reference, and back to the same bytes, for random models and layouts."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from convert.boxes import Meta, Pieces
from convert.from_hf import hf_shapes
from convert.megatron import names
from convert.megatron.layout import Layout, problems
from convert.megatron.shards import locals_of
from models.config import MLAConfig, ModelConfig, MoEConfig
from parallel.sharding import Shard
from scripts.params import load_model
from tests import megatron_reference
from tests.megatron_shards import Held, Memory, cut_up, numbered, put_together

Case = tuple[ModelConfig, Layout, int]
"""A model, a layout, and rows copied at a time."""


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any model Megatron can hold, cut in any way that its sizes allow."""
    family = draw(st.sampled_from(
        ["llama", "qwen2", "qwen3", "mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3"]
    ))  # fmt: skip
    tp = draw(st.sampled_from([1, 2, 3, 4, 8]))
    latent = family.startswith("deepseek")
    # Groups are a multiple of tp or divide it; then query heads a multiple of both.
    groups = draw(st.sampled_from([n for n in (1, 2, 3, 4, 6, 8) if not (n % tp and tp % n)]))
    heads = max(tp, groups) * draw(st.integers(1, 3))
    mla, head_dim = None, draw(st.sampled_from([2, 4, 6]))
    if latent:
        rope, nope, value = (draw(st.sampled_from([2, 4, 6])) for _ in range(3))
        q_rank = draw(st.none() | st.integers(1, 3).map(lambda n: n * tp))
        mla = MLAConfig(draw(st.integers(1, 2)) * 8 * tp - rope, nope, rope, value, q_rank)
        groups, head_dim = heads, nope + rope
    pp, vpp = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    vpp = 1 if pp == 1 else vpp
    layers = draw(st.just(()) | st.lists(st.integers(0, 3), min_size=pp * vpp, max_size=pp * vpp).map(tuple))
    layers = layers if sum(layers) else ()
    num_layers = sum(layers) or pp * vpp * draw(st.integers(1, 2 if pp * vpp < 4 else 1))
    moe, ep = None, 1
    if family in ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3"):
        ep = draw(st.sampled_from([1, 2, 3]))
        moe = draw(mixtures(family, tp, ep, num_layers))
    biases: dict[str, Any] = {}
    if family == "llama":
        biases = dict.fromkeys(("qkv_bias", "attention_out_bias"), draw(st.booleans())) | {
            "mlp_bias": draw(st.booleans())
        }
    if family in ("qwen2", "qwen2_moe"):
        biases = {"qkv_bias": True}
    cfg = ModelConfig(
        family=family,  # pyright: ignore[reportArgumentType]
        vocab_size=draw(st.integers(1, 40)),
        hidden_size=draw(st.integers(1, 9)),
        intermediate_size=tp * draw(st.integers(1, 3)),
        num_layers=num_layers,
        num_heads=heads,
        num_kv_heads=groups,
        head_dim=head_dim,
        max_seq_len=64,
        tied_embeddings=draw(st.booleans()),
        qk_norm=family.startswith("qwen3"),
        moe=moe,
        mla=mla,
        **biases,
    )
    layout = Layout(
        tp, pp, vpp, ep, layers,
        draw(st.sampled_from(["transformer_engine", "local"])), draw(st.sampled_from(["grouped", "sequential"])),
        draw(st.sampled_from([1, 2, 5])),
    )  # fmt: skip
    return cfg, layout, draw(st.integers(1, 64))


@st.composite
def mixtures(draw: st.DrawFn, family: str, tp: int, ep: int, num_layers: int) -> MoEConfig:
    shared = draw(st.integers(1, 3)) * tp if family in ("qwen2_moe", "deepseek_v2", "deepseek_v3") else 0
    return MoEConfig(
        num_experts=ep * draw(st.integers(1, 3)),
        top_k=1,
        expert_size=tp * draw(st.integers(1, 3)),
        shared_size=shared,
        shared_gate=family == "qwen2_moe",
        first_dense=0 if family == "mixtral" else draw(st.integers(0, num_layers - 1)),
        correction_bias=family == "deepseek_v3",
    )


def plain(layout: Layout, cfg: ModelConfig) -> megatron_reference.Cut:
    """The layout in the reference's words."""
    chunks = layout.pp * layout.vpp
    layers = list(layout.layers) or [cfg.num_layers // chunks] * chunks
    te, grouped = layout.implementation == "transformer_engine", layout.experts == "grouped"
    sizes = (layout.tp, layout.pp, layout.vpp, layout.ep)
    return megatron_reference.Cut(*sizes, layers, te, grouped, layout.vocab_multiple)


def check(cfg: ModelConfig, layout: Layout, block: int) -> None:
    """Every rank's dict equals the reference's, names included; and what was cut comes back."""
    hf = numbered(cfg)
    states, pieces = cut_up(Memory(hf), cfg, layout, block)
    expected = megatron_reference.reference(hf, cfg, plain(layout, cfg))
    assert {(rank.tp, rank.pp, rank.ep) for rank in states} == set(expected)
    for rank, chunks in states.items():
        for found, wanted in zip(chunks, expected[rank.tp, rank.pp, rank.ep], strict=True):
            assert set(found) == set(wanted), rank
            for name, tensor in wanted.items():
                assert found[name].shape == tensor.shape, name
                assert torch.equal(found[name], tensor), name
    back = put_together(pieces)
    assert list(back) == list(hf)
    assert all(torch.equal(back[name], tensor) for name, tensor in hf.items())


DENSE = ModelConfig("llama", 11, 6, 8, 4, 8, 4, 2, 64)
TIED = dataclasses.replace(DENSE, tied_embeddings=True)
BIASED = dataclasses.replace(DENSE, qkv_bias=True, attention_out_bias=True, mlp_bias=True)
EXPERTS = dataclasses.replace(DENSE, family="mixtral", moe=MoEConfig(4, 2, 8))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(cases())
@example((dataclasses.replace(DENSE, num_kv_heads=2), Layout(tp=8), 3))  # a rank holds less than one head's rows
@example((dataclasses.replace(DENSE, num_heads=9, num_kv_heads=3, intermediate_size=9), Layout(tp=3, layers=(4,)), 1))
def test_ranks_are_the_references_and_come_back(case: Case) -> None:
    cfg, layout, block = case
    rows = (cfg.num_heads + 2 * cfg.num_kv_heads) * cfg.head_dim
    if cfg.mla is None and rows % layout.tp:
        assert any("rows of queries" in problem for problem in problems(layout, cfg))
        return
    assert not problems(layout, cfg)
    check(cfg, layout, block)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(cases(), st.data())
def test_another_layout_straight_from_the_first(case: Case, data: st.DataObject) -> None:
    """Resharding equals cutting the whole model anew."""
    cfg, layout, block = case
    assume(not problems(layout, cfg))
    axes = [(tp, pp, ep) for tp in (1, 2, 3, 4, 8) for pp in (1, 2, 4) for ep in (1, 2, 3)]
    others = [Layout(tp, pp, ep=ep, vocab_multiple=3, implementation="local") for tp, pp, ep in axes]
    other = data.draw(st.sampled_from([each for each in others if not problems(each, cfg)]))
    hf = Memory(numbered(cfg))
    _, pieces = cut_up(hf, cfg, layout)
    again, _ = cut_up(pieces, cfg, other, block)
    direct, _ = cut_up(hf, cfg, other)
    for rank, chunks in direct.items():
        for found, wanted in zip(again[rank], chunks, strict=True):
            assert list(found) == list(wanted)
            assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def ungrouped(cfg: ModelConfig, segments: Any) -> Any:
    """All query heads, all key heads, all value heads."""
    return segments


def keys_first(cfg: ModelConfig, segments: Any) -> Any:
    q, k, v = segments
    return REAL_GROUPS(cfg, (q, v, k))


def by_hidden_size(cfg: ModelConfig, segments: Any) -> Any:
    """Groups in turn but one more head between query and key, as if heads were smaller."""
    return tuple(reversed(REAL_GROUPS(cfg, segments)))


REAL_GROUPS, REAL_SHARD = names.query_groups, names._shard


def one_chunk(kind: Any, shape: tuple[int, ...]) -> Shard:
    """Gate and up cut as one matrix."""
    return REAL_SHARD("rows" if kind == "halves" else kind, shape)


def rows_for_columns(kind: Any, shape: tuple[int, ...]) -> Shard:
    return REAL_SHARD("rows" if kind == "columns" else kind, shape)


def no_cut(kind: Any, shape: tuple[int, ...]) -> Shard:
    return REAL_SHARD("whole" if kind == "rows" else kind, shape)


FAULTS: list[tuple[object, str, object, ModelConfig, Layout]] = [
    (ungrouped, "query_groups", names, DENSE, Layout(tp=2)),
    (keys_first, "query_groups", names, BIASED, Layout()),
    (by_hidden_size, "query_groups", names, DENSE, Layout(tp=4)),
    (one_chunk, "_shard", names, DENSE, Layout(tp=2)),
    (one_chunk, "_shard", names, EXPERTS, Layout(tp=2)),
    (rows_for_columns, "_shard", names, DENSE, Layout(tp=2)),
    (no_cut, "_shard", names, DENSE, Layout(tp=2)),
    (lambda self, chunk: (chunk // self.vpp, chunk % self.vpp), "rank_of", Layout, DENSE, Layout(pp=2, vpp=2)),
    (lambda self, layers: [(i % self.chunks, i // self.chunks) for i in range(layers)], "chunk_of", Layout, DENSE,
     Layout(pp=2)),
    (lambda self, vocab: -(-vocab // self.vocab_multiple) * self.vocab_multiple, "padded_vocab", Layout, DENSE,
     Layout(tp=2, vocab_multiple=4)),
    (property(lambda self: 1), "chunks", Layout, TIED, Layout(pp=2, layers=(2, 2))),
]  # fmt: skip


@pytest.mark.parametrize("fault", range(len(FAULTS)))
def test_a_fault_is_seen(monkeypatch: pytest.MonkeyPatch, fault: int) -> None:
    """The same comparison, with one rule of the layout wrong."""
    wrong, name, owner, cfg, layout = FAULTS[fault]
    check(cfg, layout, 7)
    monkeypatch.setattr(owner, name, wrong)
    with pytest.raises((AssertionError, IndexError, KeyError, RuntimeError, ValueError)):
        check(cfg, layout, 7)


REAL = {
    "llama3_70b": Layout(tp=16, pp=4, vpp=5),
    "qwen2_5_0_5b": Layout(tp=2, pp=4),
    "qwen3_30b_a3b": Layout(tp=2, pp=2, ep=8, layers=(23, 25)),
    "deepseek_v2_lite": Layout(tp=4, pp=3, implementation="local"),
}


@pytest.mark.parametrize("name", REAL)
def test_every_element_of_a_released_model_has_a_place(name: str) -> None:
    """`Pieces` counts them; no value is made."""
    cfg, layout = load_model(name, []), REAL[name]
    assert not problems(layout, cfg)
    metas = {hf: Meta(torch.bfloat16, shape) for hf, shape in hf_shapes(cfg).items()}
    held = Held(torch.empty(0))
    pieces = Pieces(metas, ((held, local.boxes) for local in locals_of(cfg, layout)))
    assert all(pieces.of(hf) for hf in metas)


@pytest.mark.parametrize(
    ("layout", "cfg", "reason"),
    [
        (Layout(tp=3), DENSE, "does not divide the query heads 8; try --tp 1, 2, 4"),
        (Layout(tp=8), dataclasses.replace(DENSE, num_kv_heads=8, intermediate_size=12), "feed-forward size 12"),
        (Layout(tp=6), dataclasses.replace(DENSE, num_heads=12, num_kv_heads=4, intermediate_size=12),
         "neither divides the 4 key/value heads nor is a multiple of them; try --tp 1, 2, 4"),
        (Layout(tp=12), dataclasses.replace(DENSE, num_heads=12, num_kv_heads=1, intermediate_size=12),
         "does not divide the 28 rows of queries, keys and values together; try --tp 1, 2, 4"),
        (Layout(ep=2), DENSE, "the model has no experts"),
        (Layout(ep=3), EXPERTS, "does not divide the 4 experts; try --ep 1, 2, 4"),
        (Layout(vpp=2), DENSE, "there is one stage; add --pp 2 or more"),
        (Layout(pp=3), DENSE, "4 layers do not divide into 3 equal chunks; try --pp 1, 2, 4, or say how many each "
         "gets: --pp-layout 2,1,1"),
        (Layout(pp=2, layers=(1, 2)), DENSE, "adds up to 3 layers, the model has 4"),
        (Layout(pp=2, layers=(4,)), DENSE, "names 1 chunks of layers, --pp x --vpp is 2"),
        (Layout(pp=2, layers=(5, -1)), DENSE, "fewer than 0 layers"),
        (Layout(tp=0), DENSE, "must be at least 1"),
        (Layout(), dataclasses.replace(DENSE, head="scalar"), "scalar head"),
    ],
)  # fmt: skip
def test_why_a_layout_does_not_fit(layout: Layout, cfg: ModelConfig, reason: str) -> None:
    assert reason in "; ".join(problems(layout, cfg))


def test_biases_without_a_place_in_megatron_are_known() -> None:
    latent = load_model("tiny_deepseek_v3", [])
    assert "latent attention" in names.has_no_bias_form(dataclasses.replace(latent, qkv_bias=True))
    assert "router and experts" in names.has_no_bias_form(dataclasses.replace(EXPERTS, attention_out_bias=True))
    for fine in (BIASED, DENSE, dataclasses.replace(DENSE, mlp_bias=True), latent, load_model("tiny_qwen2_moe", [])):
        assert not names.has_no_bias_form(fine)
