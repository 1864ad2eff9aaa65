"""Dropout by counters: the share, what masks depend on, and that a cut of a mask is the mask of the cut."""

from __future__ import annotations

import pytest
import torch

from parallel.dropout import Dropout, keep_mask, mixed, token_keys
from parallel.sharding import SINGLE, Axis, Place

KEYS = token_keys(torch.arange(1000) % 97, torch.arange(1000))


def masks(**about: object) -> torch.Tensor:
    """What stays of the first layer's input, as 0 and 1."""
    given = {"share": 0.2, "seed": 1, "name": "layers.0.attn.qkv", "step": 0} | about
    step = given.pop("step")
    dropout = Dropout(**given, columns=range(64), own_rows=True, place=SINGLE)  # pyright: ignore[reportArgumentType]
    dropout.step, dropout.key_T = step, KEYS  # pyright: ignore[reportAttributeAccessIssue]
    kept = dropout.kept(torch.empty(1000, 64))
    assert kept is not None and kept.scale == pytest.approx(1.25)
    return kept.mask.double()


def test_splitmix() -> None:
    """The first outputs of splitmix64 from the state 0, as published with it."""
    golden = 0x9E3779B97F4A7C15 - 2**64
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    found = mixed(torch.tensor([1, 2, 3]) * golden)
    assert [value % 2**64 for value in found.tolist()] == expected


def test_the_share_and_nothing_else() -> None:
    """64,000 draws: the share within four standard deviations, over rows, columns and neighbours too; other seeds,
    steps and layers are other draws."""
    mask = masks()
    assert torch.equal(mask, masks())
    spread = (0.2 * 0.8) ** 0.5
    assert abs(mask.mean() - 0.8) < 4 * spread / 64000**0.5
    for dim, number in ((0, 1000), (1, 64)):
        assert (mask.mean(dim) - 0.8).abs().max() < 5 * spread / number**0.5
    for other in (mask.roll(1, 0), mask.roll(1, 1), masks(seed=2), masks(step=1), masks(name="layers.1.attn.qkv")):
        correlation = ((mask - 0.8) * (other - 0.8)).mean() / spread**2
        assert abs(correlation) < 5 / 64000**0.5


def test_a_cut_of_the_mask_is_the_mask_of_the_cut() -> None:
    whole = keep_mask(KEYS, range(50), 0.3)
    for first, last in ((0, 50), (0, 25), (25, 50), (7, 8), (8, 16)):
        assert torch.equal(keep_mask(KEYS, range(first, last), 0.3), whole[:, first:last])
    assert torch.equal(keep_mask(KEYS[30:40], range(50), 0.3), whole[30:40])


def test_rows_cut_over_ranks_and_what_is_off() -> None:
    whole = masks()
    parts = []
    for rank in range(3):  # 1000 rows are 334 on each rank, two of them padding
        place = Place(tp=Axis(3, rank), sequence_parallel=True)
        dropout = Dropout(0.2, 1, "layers.0.attn.qkv", range(64), True, place)
        dropout.key_T = KEYS
        kept = dropout.kept(torch.empty(334, 64))
        assert kept is not None
        parts.append(kept.mask.double())
        with torch.no_grad():
            assert dropout.kept(torch.empty(334, 64)) is None
        assert dropout.eval().kept(torch.empty(334, 64)) is None
    assert torch.equal(torch.cat(parts)[:1000], whole)
