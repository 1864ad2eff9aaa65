"""Checkpoints belong to the model: bitwise on the same layout, 1e-6 on any other (losses; norms and weights 1e-5)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from parallel.config import ParallelConfig
from tests import cases
from tests.integration.matrix.compare import ADAM
from tests.integration.matrix.rows import model_of


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


def _on(processes: int, zero: int = 1, micro: int = 1, **layout: Any) -> tuple[int, int, int, ParallelConfig]:
    return processes, zero, micro, ParallelConfig(**layout)


SP: dict[str, Any] = {"sequence_parallel": True}
MOVES = {  # model: (saved on, resumed on)
    "tp4 to one": ("llama", _on(4, 2, 4, tp=4), _on(1, 1, 8)),
    "one to tp2 cp2": ("llama_odd_vocab", _on(1, 0, 8), _on(4, 3, 4, tp=2, cp=2, **SP)),
    "tp2 to pp2": ("llama_deep", _on(4, 3, 2, tp=2), _on(2, 1, 1, pp=2, schedule="1f1b")),
    "zbv to interleaved x tp": ("llama_deep", _on(2, 0, 1, pp=2, schedule="zbv"), _on(4, 1, 1, tp=2, pp=2)),
    "experts over 2 to pp2": ("mixtral", _on(2, 2, 2, ep=2), _on(2, 1, 1, pp=2)),
    "pp2 x ep2 to tp2": ("qwen3_moe", _on(4, 1, 1, pp=2, ep=2), _on(2, 3, 4, tp=2, **SP)),
    "experts over 4 to one, with biases": ("deepseek_v3", _on(4, 1, 2, ep=4), _on(1, 3, 8)),
}


@pytest.mark.parametrize("move", MOVES)
def test_any_layout_resumes_on_any_other(pool, tmp_path: Path, move: str) -> None:
    """Weights, optimizer, router loads and biases: losses and norms within 1e-6, weights within 1e-5."""
    name, before, after = MOVES[move]
    options = {"model": model_of(name), **ADAM}
    straight = pool(1).run(cases.train, 1, 8, steps=6, **options)[0]
    processes, zero, micro, layout = before
    folder = str(tmp_path)
    first = pool(processes).run(cases.train, zero, micro, steps=3, save_to=folder, layout=layout, **options)[0]
    processes, zero, micro, layout = after
    resumed = {"first": 3, "resume_from": first["saved"], "layout": layout}
    rest = pool(processes).run(cases.train, zero, micro, steps=3, **resumed, **options)[0]
    assert cases.relative(straight["losses"], first["losses"] + rest["losses"]) <= 1e-6
    assert cases.relative(straight["norm"], first["norm"] + rest["norm"]) <= 1e-5
    assert cases.distance(straight["weights"], rest["weights"]) <= 1e-5


def test_a_cut_model_is_written_once(pool, tmp_path: Path) -> None:
    """Replicated parameters by one tp rank, tied copies by one stage, experts by their owners: bytes of one process."""

    def size(name: str, processes: int, layout: ParallelConfig) -> int:
        folder = tmp_path / f"{name}{processes}"
        pool(processes).run(cases.train, 1, 1, steps=1, save_to=str(folder), layout=layout, model=model_of(name))
        return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))

    assert size("llama_deep", 4, ParallelConfig(tp=2, pp=2)) == pytest.approx(
        size("llama_deep", 1, ParallelConfig()), rel=0.05
    )
    assert size("mixtral", 2, ParallelConfig(ep=2)) == pytest.approx(size("mixtral", 1, ParallelConfig()), rel=0.05)
