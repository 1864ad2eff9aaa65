"""Files stay below 400 lines and functions below 80, so that each can be read in one sitting."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("trainer", "convert", "data", "models", "parallel", "scripts")
FILES = [ROOT / "train.py", *sorted(p for room in ROOMS for p in (ROOT / room).rglob("*.py"))]
MOST_FILE_LINES, MOST_FUNCTION_LINES, MOST_ENTRY_LINES = 400, 80, 80


def long_functions(source: str, most: int) -> list[str]:
    """Functions of more than ``most`` lines, docstring and decorators included."""
    return [
        f"{node.name} ({node.end_lineno - node.lineno + 1} lines)"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > most
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_file_and_functions_are_short(path: Path) -> None:
    source = path.read_text()
    assert len(source.splitlines()) <= MOST_FILE_LINES
    assert long_functions(source, MOST_FUNCTION_LINES) == []


def test_the_entry_only_wires() -> None:
    assert len((ROOT / "train.py").read_text().splitlines()) <= MOST_ENTRY_LINES


def test_a_long_function_is_seen() -> None:
    body = "\n".join("    x = 1" for _ in range(80))
    assert long_functions(f"def f():\n{body}\n", 80) == ["f (81 lines)"]
