"""From the command to the first step: ``python scripts/bench/startup.py [--quick]``; the goal is 15 s.

Starts ``train.py`` on two processes with every default (wandb offline, TensorBoard), on data that an earlier run has
put in the cache, and waits for the first line of ``metrics.jsonl``. Then shows, for one process, which packages the
time to import goes to. Results: ``runs/bench/startup.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.bench import workload
from scripts.bench.harness import ROOT, child_environment, say

PROCESSES = 2
POLL_S = 0.02
TIMEOUT_S = 180.0
IMPORT_LINE = re.compile(r"import time:\s+(\d+) \|\s+(\d+) \|( +)(\S+)")


def command_line(data: Path, run_dir: Path, processes: int) -> list[str]:
    """``train.py`` and its overrides: one step of the benchmark's model."""
    return [
        str(ROOT / "train.py"),
        "model=bench_256",
        "stage=pretrain",
        f"data.sources=[{{path: {data / 'pretrain.jsonl'}, channel: text}}]",
        f"data.tokenizer={data / 'tokenizer'}",
        f"data.cache_dir={data / 'cache'}",
        f"data.micro_batch_rows={workload.MICRO_BATCH}",
        f"data.global_batch_rows={workload.MICRO_BATCH * processes}",
        f"run.dir={run_dir}",
        "run.name=startup",
        "run.steps=1",
        "run.threads=1",
    ]


def time_to_first_step(data: Path, run_dir: Path) -> float:
    """Seconds from the launcher's start until the first step stands in ``metrics.jsonl``.

    Raises:
        RuntimeError: the run ended or took too long without a step.
    """
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(PROCESSES)]
    metrics, output = run_dir / "startup" / "metrics.jsonl", run_dir.with_suffix(".log")
    with output.open("w") as log:
        started = time.monotonic()
        process = subprocess.Popen(
            [*torchrun, *command_line(data, run_dir, PROCESSES)],
            cwd=ROOT,
            env=child_environment(),
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        while not (metrics.exists() and metrics.stat().st_size):
            if process.poll() is not None or time.monotonic() - started > TIMEOUT_S:
                process.terminate()
                raise RuntimeError(f"no first step. The end of the output:\n{output.read_text()[-3000:]}")
            time.sleep(POLL_S)
        seconds = time.monotonic() - started
        process.wait()
    return seconds


def import_seconds(data: Path, run_dir: Path) -> list[tuple[str, float]]:
    """(package, seconds it took to import, its own dependencies included), the slowest first, in a one-process run."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *command_line(data, run_dir, 1)],
        cwd=ROOT,
        env=child_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"the run failed:\n{done.stderr[-3000:]}")
    return slowest_packages(done.stderr.splitlines())


def slowest_packages(lines: Sequence[str]) -> list[tuple[str, float]]:
    """Packages by the time their own modules took, from the lines of ``python -X importtime``, the slowest first.

    A module's own time goes to its top-level package, so that a package is not charged for what it imports.
    """
    own: dict[str, float] = {}
    for line in lines:
        found = IMPORT_LINE.match(line)
        if found:
            package = found.group(4).partition(".")[0]
            own[package] = own.get(package, 0.0) + int(found.group(1)) / 1e6
    return sorted(own.items(), key=lambda item: -item[1])


def main() -> None:
    """Fill the cache, measure, show where the time goes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one measured start, no table of imports")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=ROOT / "runs" / "bench" / "startup.jsonl")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="loom-bench-data-") as folder:
        data = Path(folder)
        workload.write(data, rows=4 * PROCESSES * workload.MICRO_BATCH, samples=1)
        say("filling the cache")
        first = time_to_first_step(data, data / "run0")
        rounds = 1 if args.quick else args.rounds
        seconds = [time_to_first_step(data, data / f"run{n + 1}") for n in range(rounds)]
        packages = [] if args.quick else import_seconds(data, data / "imports")
    print(f"command to first step, {PROCESSES} processes: without a cache {first:.1f} s")
    print(f"with cached data {median(seconds):.1f} s (runs: {', '.join(f'{s:.1f}' for s in seconds)}); goal 15 s")
    for package, own in packages[:15]:
        print(f"  importing {package:<24}{own:6.2f} s")
    args.json.parent.mkdir(parents=True, exist_ok=True)
    with args.json.open("a") as file:
        line = {"bench": "startup", "seconds": seconds, "uncached": first, "imports": packages[:15]}
        file.write(json.dumps(line | {"load_average": os.getloadavg()}) + "\n")


if __name__ == "__main__":
    try:
        main()
    except RuntimeError as failure:
        sys.exit(str(failure))
