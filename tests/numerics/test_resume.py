"""Checkpoints belong to the model: bitwise on the same layout, 1e-6 on any other."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import cases


@pytest.fixture(scope="module")
def straight(pool) -> dict:
    """Six steps without a stop, on one process."""
    return pool(1).run(cases.train, 1, 2, steps=6)[0]


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_same_layout_resumes_bitwise(pool, tmp_path: Path, zero: int) -> None:
    whole = pool(2).run(cases.train, zero, 2, steps=6)[0]
    first = pool(2).run(cases.train, zero, 2, steps=3, save_to=str(tmp_path))[0]
    rest = pool(2).run(cases.train, zero, 2, steps=3, first=3, resume_from=first["saved"])[0]
    assert first["losses"] + rest["losses"] == whole["losses"]
    assert first["norm"] + rest["norm"] == whole["norm"]
    assert all((rest["weights"][name] == whole["weights"][name]).all() for name in whole["weights"])


@pytest.mark.parametrize(
    ("save", "load"),
    [((2, 1), (1, 3)), ((1, 3), (4, 2)), ((2, 3), (2, 0)), ((4, 0), (2, 3)), ((1, 0), (2, 1)), ((4, 2), (1, 1))],
    ids=str,
)
def test_resumes_on_another_layout(pool, straight, tmp_path: Path, save: tuple, load: tuple) -> None:
    """(processes, ZeRO stage) before and after."""
    first = pool(save[0]).run(cases.train, save[1], 2, steps=3, save_to=str(tmp_path))[0]
    rest = pool(load[0]).run(cases.train, load[1], 1, steps=3, first=3, resume_from=first["saved"])[0]
    assert cases.relative(straight["losses"], first["losses"] + rest["losses"]) <= 1e-6
    assert cases.relative(straight["norm"], first["norm"] + rest["norm"]) <= 1e-6
    assert cases.distance(straight["weights"], rest["weights"]) <= 1e-5


def test_every_element_is_written_once(pool, tmp_path: Path) -> None:
    """Two ranks write together what one rank writes alone, within headers."""

    def size(processes: int, zero: int) -> int:
        folder = tmp_path / f"{processes}{zero}"
        pool(processes).run(cases.train, zero, 1, steps=1, save_to=str(folder))
        return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))

    alone = size(1, 0)
    for zero in (0, 1, 2, 3):
        assert size(2, zero) == pytest.approx(alone, rel=0.05)
