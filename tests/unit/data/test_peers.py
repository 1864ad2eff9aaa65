from __future__ import annotations

import pytest

from data.peers import Peers


def test_alone() -> None:
    assert Peers.alone().run(lambda: 3) == [3]
    assert Peers.alone().from_first(lambda: "x") == "x"


def test_every_rank_sees_all_results(on_ranks) -> None:
    assert on_ranks(3, lambda peers: peers.run(lambda: peers.rank * 10)) == [[0, 10, 20]] * 3
    assert on_ranks(3, lambda peers: peers.from_first(lambda: f"from {peers.rank}")) == ["from 0"] * 3


@pytest.mark.parametrize(("kind", "elsewhere"), [(ValueError, ValueError), (KeyError, RuntimeError)])
def test_an_error_on_one_rank_is_raised_on_all(on_ranks, kind: type[Exception], elsewhere: type[Exception]) -> None:
    def fail_on_one() -> None:
        raise kind("no such thing")

    results = on_ranks(3, lambda peers: peers.run(fail_on_one if peers.rank == 1 else lambda: None))
    assert [type(result) for result in results] == [elsewhere, kind, elsewhere]
    assert all("no such thing" in str(result) for result in results)
