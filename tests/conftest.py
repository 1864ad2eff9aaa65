"""Pools of processes shared by the whole session."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.pool import Pool


@pytest.fixture(autouse=True)
def no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever built groups in this process left a local rank in the environment (DeepSpeed insists on it), which others
    take for a launcher's."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], Pool]]:
    """``pool(n)``: n processes, started at first use."""
    pools: dict[int, Pool] = {}

    def of(size: int) -> Pool:
        if size not in pools or not pools[size].alive:
            pools[size] = Pool(size, tmp_path_factory.mktemp(f"pool{size}"))
        return pools[size]

    yield of
    for each in pools.values():
        each.close()
