"""Cutting and joining whole tensors by their record."""

import pytest
import torch

from parallel.sharding import REPLICATED, Cut, Shard


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(
    ("shape", "shard"),
    [((16, 6), Shard(0, (8, 4, 4))), ((6, 8), Shard(1, (8,))), ((12,), Shard(0, (4, 8))), ((5, 3), REPLICATED)],
)
def test_slices_of_all_ranks_merge_to_the_whole(shape: tuple[int, ...], shard: Shard, size: int) -> None:
    whole = torch.arange(torch.Size(shape).numel()).reshape(shape)
    by_cut = {cut: shard.slice(whole, cut) for cut in shard.cuts(size, 1)}
    assert len(by_cut) == (1 if shard.dim is None else size)
    assert all(tuple(local.shape) == shard.local_shape(shape, cut) for cut, local in by_cut.items())
    assert torch.equal(shard.merge(by_cut), whole)
    assert all(shard.whole_shape(local.shape) == shape for local in by_cut.values())


def test_each_fused_chunk_is_cut_by_itself() -> None:
    # q has rows 0-3, k rows 4-5, v rows 6-7: rank 1 of 2 holds the second half of each.
    local = Shard(0, (4, 2, 2)).slice(torch.arange(8), Cut(2, 1))
    assert local.tolist() == [2, 3, 5, 7]


def test_parts_that_do_not_divide_are_our_mistake() -> None:
    with pytest.raises(AssertionError, match="is not cut in 2"):
        Shard(0, (3, 5)).slice(torch.arange(8), Cut(2, 0))


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("ep", [1, 2])
@pytest.mark.parametrize(
    ("shape", "shard"),
    [
        ((4 * 8 + 2 * 2 * 4, 3), Shard(0, (32, 8, 8), units=(8, 2, 2))),  # 8 query heads, 2 key/value heads of size 4
        ((13, 3), Shard(0, (13,), pad=True)),
        ((4, 16, 3), Shard(1, (8, 8), experts=True)),
        ((4, 3, 8), Shard(2, (8,), experts=True)),
    ],
)
def test_heads_padding_and_experts_come_back_whole(shape: tuple[int, ...], shard: Shard, tp: int, ep: int) -> None:
    whole = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape) + 1
    by_cut = {cut: shard.slice(whole, cut) for cut in shard.cuts(tp, ep)}
    assert all(tuple(local.shape) == shard.local_shape(shape, cut) for cut, local in by_cut.items())
    assert torch.equal(shard.merge(by_cut), whole)


def test_fewer_heads_than_ranks_lie_on_neighbours() -> None:
    """8 ranks, 2 key/value heads of one row: ranks 0-3 hold head 0, ranks 4-7 head 1."""
    shard = Shard(0, (8, 2, 2), units=(8, 2, 2))
    rows = [shard.slice(torch.arange(12), Cut(8, rank)).tolist() for rank in range(8)]
    assert rows == [[r, 8 + r // 4, 10 + r // 4] for r in range(8)]
    assert [shard.copies(part, 8) for part in range(3)] == [1, 4, 4]
