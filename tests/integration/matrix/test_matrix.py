"""Every row of the matrix trains as one process does: losses, every gradient, weights after four steps, metrics."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.integration.matrix.compare import TOLERANCE, Matrix
from tests.integration.matrix.rows import ROWS, Row
from tests.pool import Pool


@pytest.fixture(scope="session")
def matrix(pool: Callable[[int], Pool]) -> Matrix:
    """The references are computed once a session."""
    return Matrix(pool)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_a_layout_is_one_process(matrix: Matrix, row: Row) -> None:
    """Relative difference at most 1e-5 in fp32 (losses and norms differ by 1e-7 where all is well)."""
    found = matrix.compare(row)
    assert found.worst <= TOLERANCE, found
