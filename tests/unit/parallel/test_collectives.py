"""Each forward/backward pair against what its table says, worked out from all ranks' inputs. Sums to 1e-6."""

from __future__ import annotations

import pytest
import torch

from parallel import collectives
from parallel.sharding import ALONE
from tests import tp_cases

NAMES = ("copy_to", "reduce_from", "gather_from", "gather_rows", "scatter_rows", "join_rows")


def worked_out(name: str, ranks: list[dict[str, torch.Tensor]], rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and input gradient of one rank."""
    size = len(ranks)
    x, seed = [r["x"] for r in ranks], [r["seed"] for r in ranks]
    if name == "copy_to":
        return x[rank], sum(seed, torch.zeros(()))
    if name == "reduce_from":
        return sum(x, torch.zeros(())), seed[rank]
    if name == "gather_from":
        return torch.cat(x, -1), seed[rank].split(3, -1)[rank]
    if name == "gather_rows":
        return torch.cat(x), sum(seed, torch.zeros(())).chunk(size)[rank]
    if name == "scatter_rows":
        return sum(x, torch.zeros(())).chunk(size)[rank], torch.cat(seed)
    return torch.cat(x), seed[rank].chunk(size)[rank]


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_pair(pool, name: str, size: int) -> None:
    ranks = pool(size).run(tp_cases.each_collective, name, 6)
    for rank, found in enumerate(ranks):
        out, grad = worked_out(name, ranks, rank)
        torch.testing.assert_close(found["out"], out, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found["grad"], grad, rtol=1e-6, atol=1e-6)
    if name in ("reduce_from", "gather_rows", "gather_from", "join_rows"):
        assert all(torch.equal(found["out"], ranks[0]["out"]) for found in ranks), "ranks must agree to the bit"


@pytest.mark.parametrize("name", NAMES)
def test_alone_nothing_happens(name: str) -> None:
    x = torch.ones(2, 3)
    assert getattr(collectives, name)(x, ALONE) is x


def test_a_sum_that_would_overwrite_what_another_function_kept_is_an_error(pool) -> None:
    for message in pool(2).run(tp_cases.reduce_what_is_kept):
        assert "modified by an inplace operation" in message


@pytest.mark.parametrize(("rows", "size", "padded"), [(5, 2, 6), (6, 3, 6), (1, 4, 4)])
def test_rows_are_padded_with_zeros(rows: int, size: int, padded: int) -> None:
    for shape in ((rows,), (rows, 3), (rows, 2, 3)):
        out = collectives.pad_rows(torch.ones(shape), size)
        assert out.shape == (padded, *shape[1:])
        assert out[:rows].all() and not out[rows:].any()
