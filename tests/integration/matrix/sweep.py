"""Every legal layout up to so many processes against one process: ``python -m tests.integration.matrix.sweep``.

Slow (hours on a laptop at 8 processes), therefore not part of the test run. ``--sample N`` draws N of the layouts, the
same ones for the same ``--seed``. Prints one line a layout as it goes and ends with exit code 1 if any differs by more
than 1e-5.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.config import DataConfig, SourceConfig
from parallel.config import EngineConfig, ParallelConfig
from tests.integration.matrix.compare import TOLERANCE, Matrix
from tests.integration.matrix.rows import MODELS, Row, model_of
from tests.pool import Pool
from trainer.layout_rules import Layout, broken

ROWS = 8
"""Rows of a global batch in ``tests.cases``."""
SCHEDULES = ("1f1b", "gpipe", "interleaved", "zero_bubble", "zbv")


def layouts(model: str, most: int) -> Iterator[Row]:
    """Every legal layout of a model on 2, 4 and up to ``most`` processes, with every ZeRO stage and recompute mode."""
    sizes = [n for n in (1, 2, 4, 8) if n <= most]
    for world, tp, pp, cp, ep, zero, recompute in itertools.product(
        sizes[1:], sizes, sizes, sizes, sizes, (0, 1, 2, 3), ("none", "selective", "full")
    ):
        if tp * pp * cp > world:
            continue
        for sequence_parallel in (False, True) if tp > 1 else (False,):
            for schedule in SCHEDULES if pp > 1 else ("1f1b",):
                for context in ("ring", "ulysses") if cp > 1 else ("ring",):
                    parallel = ParallelConfig(tp, sequence_parallel, pp, schedule, None, None, cp, context, ep)
                    yield from _legal(model, world, parallel, zero, recompute)


def _legal(model: str, world: int, parallel: ParallelConfig, zero: Any, recompute: Any) -> Iterator[Row]:
    """The row with as large micro-batches as the schedule leaves; none if the layout is refused."""
    for micro in (4, 2, 1):
        data = DataConfig(sources=(SourceConfig("none"),), seq_len=64, micro_batch_rows=micro, global_batch_rows=ROWS)
        layout = Layout(model_of(model), parallel, EngineConfig(zero=zero, recompute=recompute), data)
        if layout.micro_batches(world) and next(broken(layout, world), None) is None:
            yield Row(model, world, parallel, zero, recompute, micro_rows=micro)
            return


def _equal(matrix: Matrix, row: Row) -> bool:
    """Whether a layout trains as one process does; prints its line."""
    start = time.monotonic()
    try:
        found = matrix.compare(row)
    except AssertionError as error:  # a rank failed: its message ends in the reason
        print(f"FAILED  {row.id}: {str(error).strip().splitlines()[-1]}", flush=True)
        return False
    verdict = "equal " if found.worst <= TOLERANCE else "DIFFERS"
    print(f"{verdict}  {found.worst:.1e}  {time.monotonic() - start:5.1f} s  {row.id}", flush=True)
    return found.worst <= TOLERANCE


def main() -> None:
    """Run them and say what differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=8, help="the most processes of a layout (2, 4 or 8)")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--sample", type=int, help="draw so many of the layouts")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rows = [row for model in args.models for row in layouts(model, args.processes)]
    print(f"{len(rows)} legal layouts of {len(args.models)} models on up to {args.processes} processes", flush=True)
    if args.sample is not None:
        rows = random.Random(args.seed).sample(rows, min(args.sample, len(rows)))
    pools: dict[int, Pool] = {}
    with tempfile.TemporaryDirectory() as folder:

        def pool(size: int) -> Pool:
            if size not in pools or not pools[size].alive:
                pools[size] = Pool(size, Path(tempfile.mkdtemp(dir=folder)))
            return pools[size]

        matrix = Matrix(pool)
        failed = sum(not _equal(matrix, row) for row in rows)
        for each in pools.values():
            each.close()
    print(f"{len(rows) - failed} of {len(rows)} equal one process within {TOLERANCE:g}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
