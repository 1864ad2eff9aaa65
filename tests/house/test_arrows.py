"""Imports between rooms run down only, and what is kept out of a room stays out (docs/architecture.md)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAY_IMPORT = {
    "parallel": {"parallel"},
    "models": {"models", "parallel"},
    "convert": {"convert", "models", "parallel"},
    "data": {"data"},
    "trainer": {"trainer", "convert", "models", "parallel", "data"},
    "scripts": {"trainer", "convert", "models", "parallel", "data", "scripts"},
}
"""Room -> rooms it may import, inside functions too."""
READS_ENVIRONMENT = (
    "parallel/groups.py",
    "parallel/host_memory.py",
    "trainer/inference/vllm_backend.py",
    "trainer/rollout/worker.py",
    "scripts/bench/",
)
"""The launcher's ranks are read in the first; the second sizes torch's flight recorder and what oneDNN keeps, the third
says which GPUs are vLLM's, which have no other setting; the fourth forgets whose rank started it; the others start
processes of their own and hand their environment on."""
ROOM_FILES = sorted(p.relative_to(ROOT).as_posix() for room in MAY_IMPORT for p in (ROOT / room).rglob("*.py"))


def imports(source: str) -> Iterator[str]:
    """Top-level package of every import of a module, wherever it stands; a relative import counts as ``.``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." if node.level else (node.module or "").split(".")[0]


def environment_reads(source: str) -> list[int]:
    """Lines that touch ``os.environ`` or ``getenv``."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if (isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "putenv"))
        or (isinstance(node, ast.ImportFrom) and any(a.name in ("environ", "getenv") for a in node.names))
    ]


def dict_config_names(source: str) -> set[str]:
    """Names annotated as a DictConfig: the values that must not be asked with ``.get``."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        annotation = getattr(node, "annotation", None)
        if annotation is None or "DictConfig" not in ast.unparse(annotation):
            continue
        if isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
    return found


@pytest.mark.parametrize("path", ROOM_FILES)
def test_imports_run_down(path: str) -> None:
    room = path.split("/")[0]
    used = set(imports((ROOT / path).read_text()))
    wrong = (used & set(MAY_IMPORT)) - MAY_IMPORT[room]
    assert not wrong, f"{path} imports {sorted(wrong)}; {room} may import {sorted(MAY_IMPORT[room])}"
    assert "." not in used, f"{path} has a relative import; rooms are imported by their name"


def test_only_parallel_imports_deepspeed() -> None:
    guilty = [p for p in [*ROOM_FILES, "train.py"] if "deepspeed" in imports((ROOT / p).read_text())]
    assert guilty, "no file imports deepspeed: this test looks in the wrong place"
    assert all(p.startswith("parallel/") for p in guilty), guilty


def test_only_the_groups_read_the_environment() -> None:
    reads = {p: lines for p in [*ROOM_FILES, "train.py"] if (lines := environment_reads((ROOT / p).read_text()))}
    assert "parallel/groups.py" in reads
    assert {p: lines for p, lines in reads.items() if not p.startswith(READS_ENVIRONMENT)} == {}


def test_no_get_on_a_dict_config() -> None:
    guilty = []
    for path in [*ROOM_FILES, "train.py"]:
        source = (ROOT / path).read_text()
        names = dict_config_names(source)
        for node in ast.walk(ast.parse(source)):
            if (
                isinstance(node, ast.Attribute)
                and node.attr == "get"
                and ast.unparse(node.value).split(".")[0] in names
            ):
                guilty.append(f"{path}:{node.lineno}")
    assert not guilty, f"a DictConfig is typed at the door, not asked with .get: {guilty}"


def test_only_the_door_knows_omegaconf() -> None:
    knows = {p for p in ROOM_FILES if "omegaconf" in imports((ROOT / p).read_text()) and p.startswith("trainer/")}
    rest = {p for p in ROOM_FILES if {"omegaconf", "hydra"} & set(imports((ROOT / p).read_text()))}
    assert {p for p in rest if not p.startswith(("trainer/", "scripts/"))} == set()
    assert knows <= {"trainer/door.py", "trainer/overrides.py", "trainer/provenance.py"}, knows


def test_the_readers_above_can_see() -> None:
    lines = ["import os", "def f(cfg: DictConfig):", "    from trainer import x", "    from .a import b"]
    source = "\n".join([*lines, "    return os.environ['A']"])
    assert set(imports(source)) == {"os", "trainer", "."}
    assert environment_reads(source) == [5]
    assert dict_config_names(source) == {"cfg"}
