"""A decoder cut over tp ranks, with and without sequence parallel, has the numbers of the whole one.

Tolerance, unless a test says otherwise: 2e-6 of a tensor's largest value (0.1 where that is smaller): the same fp32
sums in another order. Moving every weight of the one process by half a unit in the last place moves gradients by 1e-6
to 3e-6. Gradients are put together as the engine does it: parts of replicated parameters and shared heads are summed.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch

from models import ModelConfig, build
from parallel.sharding import SINGLE, Axis, Cut, Place, is_partial, shard_of
from tests import tp_cases
from tests.tp_cases import CFG

PLAIN = dataclasses.replace(
    CFG, qkv_bias=False, attention_out_bias=False, mlp_bias=False, qk_norm=False, tied_embeddings=True
)
SEQUENCE = pytest.mark.parametrize("sequence_parallel", [False, True])


@functools.cache
def reference(cfg: ModelConfig, tokens: int, bf16: bool = False) -> dict[str, Any]:
    return tp_cases.decoder(cfg, SINGLE, tokens, bf16=bf16)


def joined(cfg: ModelConfig, ranks: list[dict[str, Any]], sequence_parallel: bool) -> dict[str, torch.Tensor]:
    """Whole gradients from those of all ranks."""
    size, whole = len(ranks), {}
    for name, param in build(cfg, Place(Axis(size, 0), sequence_parallel=sequence_parallel)).named_parameters():
        shard, grads = shard_of(param), [rank["grads"][name] for rank in ranks]
        if shard.dim is None:
            whole[name] = sum(grads) if is_partial(param) else grads[-1]
            if not is_partial(param):
                assert torch.equal(grads[0], grads[-1]), f"{name} is not replicated"
            continue
        whole[name] = torch.zeros(shard.whole_shape(param.shape))
        for rank, grad in enumerate(grads):
            at = 0
            for (start, stop), rows in zip(shard.ranges(size, rank), shard.local_parts(size), strict=True):
                held = grad.narrow(shard.dim, at, rows)
                whole[name].narrow(shard.dim, start, stop - start).add_(held.narrow(shard.dim, 0, stop - start))
                assert not held.narrow(shard.dim, stop - start, rows - stop + start).any(), f"padding of {name} learns"
                at += rows
    return whole


def largest_differences(
    cfg: ModelConfig, expected: dict[str, Any], ranks: list[dict[str, Any]], sequence_parallel: bool
) -> dict[str, float]:
    """Of every tensor, relative to its largest value."""

    def distance(got: torch.Tensor, want: torch.Tensor) -> float:
        assert got.shape == want.shape
        return float((got - want).abs().max() / want.abs().max().clamp_min(0.1))

    found = {
        f"{key} of rank {rank}": distance(each[key], expected[key])
        for rank, each in enumerate(ranks)
        for key in ("loss", "losses", "logits")
    }
    grads = joined(cfg, ranks, sequence_parallel)
    assert grads.keys() == expected["grads"].keys()
    return found | {name: distance(grads[name], want) for name, want in expected["grads"].items()}


def check(pool: Any, cfg: ModelConfig, tp: int, sequence_parallel: bool, tokens: int = 23, **more: Any) -> None:
    ranks = pool(tp).run(tp_cases.decoder_in_pool, cfg, sequence_parallel, tokens=tokens, **more)
    off = largest_differences(cfg, reference(cfg, tokens), ranks, sequence_parallel)
    assert max(off.values()) <= 2e-6, {n: v for n, v in off.items() if v > 2e-6}


@SEQUENCE
@pytest.mark.parametrize("tp", [2, 3])
@pytest.mark.parametrize("cfg", [CFG, PLAIN], ids=["biases_qk_norm", "tied"])
@pytest.mark.parametrize("tokens", [23, 24])
def test_two_and_three_ranks_equal_one(pool, cfg: ModelConfig, tp: int, sequence_parallel: bool, tokens: int) -> None:
    """23 tokens and 31 words of vocabulary divide by neither."""
    check(pool, cfg, tp, sequence_parallel, tokens)


@SEQUENCE
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_four_ranks_with_as_many_or_fewer_key_value_heads(pool, groups: int, sequence_parallel: bool) -> None:
    check(pool, dataclasses.replace(CFG, num_kv_heads=groups), 4, sequence_parallel)


@SEQUENCE
def test_ranks_without_a_word_of_the_vocabulary(pool, sequence_parallel: bool) -> None:
    """5 words on 4 ranks: 2, 2, 1 and none; and 3 tokens, one rank has a padding row only."""
    for tied in (False, True):
        cfg = dataclasses.replace(CFG, vocab_size=5, num_kv_heads=2, tied_embeddings=tied)
        check(pool, cfg, 4, sequence_parallel, 3)


@SEQUENCE
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recompute(pool, recompute: str, sequence_parallel: bool) -> None:
    for cfg in (CFG, PLAIN):
        check(pool, cfg, 3, sequence_parallel, recompute=recompute)


@SEQUENCE
def test_eager_attention_and_scalar_head(pool, sequence_parallel: bool) -> None:
    check(pool, dataclasses.replace(CFG, head="scalar"), 3, sequence_parallel)


@SEQUENCE
def test_bf16(pool, sequence_parallel: bool) -> None:
    """Sums of other lengths are rounded to 8 bits: 5 % of each tensor's largest value, and not further from the fp32
    gradient than one process in bf16 is, by more than half of that."""
    exact, one = reference(CFG, 23), reference(CFG, 23, bf16=True)
    ranks = pool(2).run(tp_cases.decoder_in_pool, CFG, sequence_parallel, bf16=True)
    off = largest_differences(CFG, one, ranks, sequence_parallel)
    assert max(off.values()) <= 5e-2, off

    def error(grads: dict[str, torch.Tensor]) -> float:
        return sum(float((grads[n] - g).square().sum()) for n, g in exact["grads"].items()) ** 0.5

    assert error(joined(CFG, ranks, sequence_parallel)) <= 1.5 * error(one["grads"])
    assert all(grad.dtype is torch.float32 for grad in ranks[0]["grads"].values())


def test_what_is_partial() -> None:
    """The gradients that the engine has to sum: what each rank sees only rows or heads of."""

    def partial_names(tp: int, sequence_parallel: bool) -> set[str]:
        model = build(CFG, Place(Axis(tp, 0), sequence_parallel=sequence_parallel))
        names = [name for name, param in model.named_parameters() if is_partial(param)]
        return {name.removeprefix("layers.1.") for name in names if not name.startswith("layers.0.")}

    heads = {"attn.q_norm.weight", "attn.k_norm.weight"}
    rows = {"attn_norm.weight", "mlp_norm.weight", "attn.out.bias", "mlp.down.bias"}
    assert partial_names(1, True) == set()
    assert partial_names(2, False) == heads
    assert partial_names(2, True) == heads | rows | {"norm.weight"}


def test_padding_of_the_vocabulary_is_zero() -> None:
    for rank, real in enumerate((2, 2, 1, 0)):
        cfg = dataclasses.replace(CFG, vocab_size=5, num_kv_heads=2)
        model = tp_cases.model_of(cfg, Place(Axis(4, rank)))
        for name in ("embed.weight", "head.weight"):
            weight = model.get_parameter(name)
            assert weight.shape == (2, cfg.hidden_size)
            assert weight[:real].all() and not weight[real:].any()
    assert shard_of(model.get_parameter("head.weight")).slice(torch.ones(5, 1), Cut(4, 2)).tolist() == [[1.0], [0.0]]


def test_sequence_parallel_keeps_less(pool) -> None:
    """What lies between the blocks is cut too, and the column layers keep their own rows of the input only."""
    whole, cut = (pool(2).run(tp_cases.kept_bytes, dataclasses.replace(PLAIN, num_layers=4), on)[0] for on in (0, 1))
    # Elements a layer and token: q, k, v, out, gate, up and their product; the residual and the normed one, twice.
    inside, between = (48 + 24 + 24 + 48 + 3 * 36) / 2, 4 * 24
    assert cut / whole == pytest.approx((inside + between / 2) / (inside + between), abs=0.02)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_what_is_sent(pool, recompute: str) -> None:
    """Per layer four all-reduces of [T, D]; sequence parallel cuts each in two (a reduce-scatter and an all-gather,
    both sent as all-to-alls on a CPU) and gathers the inputs of two layers again. Once: embedding, the head's gradient
    and three numbers a token in the loss. A layer made again does not repeat the collective it ends with."""
    layers, hidden, targets = CFG.num_layers, 24 * CFG.hidden_size, 18
    again = layers * (recompute == "full")
    for rank in pool(2).run(tp_cases.sent, False, recompute):
        reduced = (4 * layers + again + 1) * hidden + targets * (CFG.hidden_size + 3)
        assert rank == {"all_reduce": reduced, "all_gather_single": 0, "all_to_all_single": 0}
    for rank in pool(2).run(tp_cases.sent, True, recompute):
        assert rank["all_reduce"] == targets * 3
        assert rank["all_gather_single"] == 0
        gathered, scattered = (6 * layers + 2 * again + 2) * hidden, (4 * layers + again + 2) * hidden
        assert rank["all_to_all_single"] == gathered + scattered


@SEQUENCE
def test_the_sum_of_the_input_gradient_runs_beside_the_weight_gradient(pool, sequence_parallel: bool) -> None:
    start = "start_scatter_rows" if sequence_parallel else "start_all_reduce"
    for events in pool(2).run(tp_cases.overlapped, sequence_parallel):
        assert events == [start, "weight_gradient", "wait"]


@SEQUENCE
def test_weight_gradients_put_off_are_the_same_bits(pool, sequence_parallel: bool) -> None:
    for rank in pool(2).run(tp_cases.put_off, sequence_parallel):
        assert rank == [(True, True, True)] * 2
