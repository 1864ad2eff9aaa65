"""Cutting and joining whole tensors by their record."""

import pytest
import torch

from parallel.sharding import REPLICATED, Shard


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(
    ("shape", "shard"),
    [((16, 6), Shard(0, (8, 4, 4))), ((6, 8), Shard(1, (8,))), ((12,), Shard(0, (4, 8))), ((5, 3), REPLICATED)],
)
def test_slices_of_all_ranks_merge_to_the_whole(shape: tuple[int, ...], shard: Shard, size: int) -> None:
    whole = torch.arange(torch.Size(shape).numel()).reshape(shape)
    by_rank = [shard.slice(whole, size, rank) for rank in range(size)]
    assert all(tuple(local.shape) == shard.local_shape(shape, size) for local in by_rank)
    assert torch.equal(shard.merge(by_rank), whole)
    assert shard.whole_shape(by_rank[0].shape) == shape


def test_each_fused_chunk_is_cut_by_itself() -> None:
    # q has rows 0-3, k rows 4-5, v rows 6-7: rank 1 of 2 holds the second half of each.
    local = Shard(0, (4, 2, 2)).slice(torch.arange(8), 2, 1)
    assert local.tolist() == [2, 3, 5, 7]


def test_parts_that_do_not_divide_are_our_mistake() -> None:
    with pytest.raises(AssertionError, match="do not divide by 2"):
        Shard(0, (3, 5)).slice(torch.arange(8), 2, 0)
