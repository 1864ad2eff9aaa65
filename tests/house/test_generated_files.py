"""docs/config.md and the resolved snapshots are what the code says now; scripts/config_table.py writes them."""

from __future__ import annotations

from pathlib import Path

import config_table
import pytest

from trainer import typed
from trainer.config import RunConfig

FILES = config_table.outputs()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_is_current(path: Path) -> None:
    assert path.is_file(), "python scripts/config_table.py writes it"
    assert path.read_text() == FILES[path], "a default changed: look at it, then run python scripts/config_table.py"


def test_the_table_has_every_key() -> None:
    page = FILES[config_table.ROOT / "docs" / "config.md"]
    missing = [key for key in typed.keys(RunConfig) if f"| `{key}` |" not in page]
    assert not missing


def test_every_key_is_explained() -> None:
    page = FILES[config_table.ROOT / "docs" / "config.md"]
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    silent = [line.split("`")[1] for line in rows if line.endswith("|  |") and not line.startswith("| `model.")]
    assert not silent, f"a docstring below the field is the key's meaning; these have none: {silent}"
