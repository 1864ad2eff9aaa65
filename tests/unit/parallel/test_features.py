"""Rows of all ranks together, of which each has any number: values, and gradients summed over all ranks' losses."""

from __future__ import annotations

import pytest
import torch

from parallel.features import Shares
from parallel.sharding import ALONE
from tests import feature_cases


@pytest.mark.parametrize("sizes", [(3, 1), (0, 2), (2, 5, 1, 0)])
def test_gather_is_all_rows_and_sums_what_all_ranks_make_of_them(pool, sizes: tuple[int, ...]) -> None:
    ranks = pool(len(sizes)).run(feature_cases.gathered, sizes)
    everyone = torch.cat([own for own, _, _ in ranks])
    times = sum(range(1, len(sizes) + 1))
    for own, found, grad in ranks:
        assert torch.equal(found, everyone)
        torch.testing.assert_close(grad, times * 3 * own**2)


def test_alone_nothing_happens() -> None:
    x = torch.randn(3, 2)
    shares = Shares.of(3, ALONE, x.device)
    assert shares.gather(x) is x and shares.sum_mine(x) is x and (shares.first, shares.total) == (0, 3)
