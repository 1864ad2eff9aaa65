"""A whole run whose ranks share every document's tokens tells the numbers of one process."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests import cases
from tests.cases import relative


@pytest.mark.parametrize("kind", ["ring", "ulysses"])
def test_a_run_tells_the_same_numbers(pool, world, kind: str) -> None:
    """Losses and token counts, also by channel and held out, 1e-5; FLOPs a token are shared by the two."""

    def rows(name: str, processes: int, **more: Any) -> list[dict[str, Any]]:
        words = world.overrides(run__name=name, run__steps=3, data__eval_fraction=0.1, run__seed=4, **more)
        pool(processes).run(cases.run_config, words)
        lines = (world.folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    one = rows(f"alone_{kind}", 1)
    shared = rows(f"cp_{kind}", 2, parallel__cp=2, parallel__context=kind)
    assert [row["kind"] for row in one] == [row["kind"] for row in shared]
    for want, got in zip(one, shared, strict=True):
        told = [key for key in want if key.startswith(("train/", "eval/", "channel/"))]
        assert told and told == [key for key in got if key.startswith(("train/", "eval/", "channel/"))]
        assert relative([want[key] for key in told], [got[key] for key in told]) <= 1e-5
        if want["kind"] == "train":
            alone, each = (row["perf/tflops"] / row["perf/tokens_per_s"] for row in (want, got))
            assert alone == pytest.approx(2 * each, rel=1e-6)
