"""The sampler of memory in use."""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch

from scripts.bench.live_memory import Watch


def test_a_tensor_that_lived_for_a_moment_is_seen_and_is_not_there_before(tmp_path: Path) -> None:
    watch = Watch(tmp_path / "out.json")
    watch.step(1, 0.0)
    watch.step(1, 0.0)
    tensor = torch.ones(25 * 2**20)  # 100 MiB
    time.sleep(0.1)
    del tensor
    watch.step(1, 0.0)
    most, before = json.loads((tmp_path / "out.json").read_text())
    # Whatever else the process allocates meanwhile is small.
    assert 99 * 2**20 < most - before < 120 * 2**20
    assert abs(watch.in_use() - before) < 20 * 2**20
