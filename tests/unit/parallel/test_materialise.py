"""Filling a meta model: identity, ties and records stay; under ZeRO-3 no more than one leaf is ever whole."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from models import build
from models.init import InitSource
from parallel.materialise import TensorSource, fill_, materialise
from parallel.sharding import REPLICATED, WHOLE, Cut, Shard, set_layout
from tests import cases, fill_cases

CPU = torch.device("cpu")


def meta(shape: tuple[int, ...], shard: Shard = REPLICATED) -> nn.Parameter:
    param = nn.Parameter(torch.empty(shape, device="meta"))
    set_layout(param, shard, "normal")
    return param


class Counting(TensorSource):
    """Rows 0, 1, 2, 3, 4, 5 under every name."""

    def tensor(self, name: str) -> torch.Tensor:
        return torch.arange(6.0).view(6, 1)


def test_a_filled_parameter_is_the_same_object_with_its_records() -> None:
    param = meta((2, 3))
    vars(param)["mark"] = "kept"
    shard, identity = param.__dict__["shard"], id(param)
    whole = torch.arange(6.0).view(2, 3)
    fill_(param, whole, CPU)
    assert id(param) == identity and isinstance(param, nn.Parameter) and param.requires_grad
    assert param.__dict__["shard"] is shard
    assert (param.__dict__["init"], param.__dict__["mark"]) == ("normal", "kept")
    assert torch.equal(param.data, whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_are_fp32_whatever_the_source_holds(dtype: torch.dtype) -> None:
    param = meta((3,))
    fill_(param, torch.tensor([1.5, -2.0, 0.25], dtype=dtype), CPU)
    assert param.dtype is torch.float32 and param.tolist() == [1.5, -2.0, 0.25]


def test_frozen_stays_frozen() -> None:
    param = meta((2,))
    param.requires_grad_(False)
    fill_(param, torch.ones(2), CPU)
    assert not param.requires_grad


@pytest.mark.parametrize("rank", [0, 1])
def test_each_rank_gets_its_own_cut(rank: int) -> None:
    """Rows q0 q1 q2 q3 k0 k1: rank r holds its half of q, then its half of k."""
    module = nn.Module()
    module.register_parameter("rows", meta((3, 1), Shard(0, (4, 2))))
    module.register_parameter("upper", meta((3, 1), Shard(0, (6,))))
    materialise(module, Counting(), Cut(2, rank), CPU)
    rows, upper = module.get_parameter("rows"), module.get_parameter("upper")
    assert rows.flatten().tolist() == [[0.0, 1.0, 4.0], [2.0, 3.0, 5.0]][rank]
    assert upper.flatten().tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]][rank]
    for param in (rows, upper):
        assert param.is_contiguous() and param.untyped_storage().nbytes() == 12, "the whole tensor stays in memory"


def test_a_wrong_shape_is_our_mistake() -> None:
    with pytest.raises(AssertionError, match=r"\(3,\) for a parameter of shape \(2,\)"):
        fill_(meta((2,)), torch.ones(3), CPU)


@pytest.mark.parametrize("tied", [True, False])
def test_ties_survive_and_are_read_once(tied: bool) -> None:
    cfg = dataclasses.replace(cases.TINY, tied_embeddings=tied)
    model = build(cfg)
    before = {name: id(param) for name, param in model.named_parameters(remove_duplicate=False)}
    source = fill_cases.CountedSource(InitSource(cfg, 3))
    materialise(model, source, WHOLE, CPU)
    assert {name: id(param) for name, param in model.named_parameters(remove_duplicate=False)} == before
    assert (model.get_parameter("head.weight") is model.get_parameter("embed.weight")) == tied
    assert source.asked == len(list(model.parameters()))
    reference = InitSource(cfg, 3)
    for name, param in model.named_parameters():
        assert torch.equal(param, reference.tensor(name)), name


def test_zero3_never_holds_more_than_one_whole_leaf(pool) -> None:
    """Bytes of whole tensors alive, watched through the arrays they lie on; without partitioning all stay."""
    kept = pool(2).run(fill_cases.alive_while_filling, False)[0]
    assert kept["most"] == kept["left"] == kept["model"]
    for cut in pool(2).run(fill_cases.alive_while_filling, True):
        assert cut["asked"] == cut["parameters"]
        assert cut["most"] <= cut["leaf"] < 0.2 * cut["model"]
        assert cut["left"] == 0 and cut["elements_here"] == 0
