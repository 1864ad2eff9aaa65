"""Bytes on the wire in one training step, by collective: ``python scripts/bench/wire_bytes.py [--quick]``.

``--layout tp=2 sequence_parallel=true --processes 4`` counts one step of a layout instead (the optimizer step alone),
by kind and group, beside the terms of the formula (``parallel/traffic_formula.py``). Without it:

Loom trains the benchmark's model on two gloo processes with ZeRO 0-3. During one whole step, logging included, every
collective that reaches torch's process groups is counted, whoever asked for it. Units are those of the ZeRO paper
(Rajbhandari et al. 2020, section 7): an all-reduce moves its tensor twice, a reduce, reduce-scatter or all-gather once.
Textbook, in sizes of the parameters: ZeRO 0-2 two, ZeRO 3 three. (On a ring of N each counts (N - 1) / N of that.)

Where the system lets a user have a network of his own (``unshare -rn``), the loopback device's own counter is shown as
well. For two processes it should give the same numbers plus a little for TCP: each of the two sends half.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.bench import workload
from scripts.bench.harness import ROOT, child_environment

TEXTBOOK = {0: 2.0, 1: 2.0, 2: 2.0, 3: 3.0}
WARMUP = 3
PROCESSES = 2


def measure(stage: int, data: Path, overrides: list[str], processes: int = PROCESSES) -> dict:
    """What ``wire_worker`` counted on rank 0.

    Raises:
        RuntimeError: the run failed; the message ends with what it printed last.
    """
    out = data / f"wire-zero{stage}.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += ["-m", "scripts.bench.wire_worker", "--zero", str(stage), "--data", str(data), "--out", str(out)]
    command += ["--warmup", str(WARMUP), "--steps", "1", "--set", *overrides]
    done = subprocess.run([*own_network(), *command], cwd=ROOT, env=child_environment(), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ZeRO-{stage} failed:\n{(done.stdout + done.stderr)[-3000:]}")
    return json.loads(out.read_text())


def own_network() -> list[str]:
    """Words before a command that give it a network of its own; none where the system forbids that."""
    words = ["unshare", "--map-root-user", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    if not shutil.which("unshare") or not shutil.which("ip"):
        return []
    allowed = subprocess.run([*words, "true"], capture_output=True, check=False).returncode == 0
    return words if allowed else []


def report(stage: int, counted: dict) -> str:
    """The table of one stage."""
    size = counted["parameter_bytes"]
    lines = [f"ZeRO-{stage}: parameters {size / 2**20:.2f} MiB"]
    moved_bytes = 0
    for kind, (calls, tensor_bytes, moved) in sorted(counted["kinds"].items()):
        lines.append(f"  {kind:<36}{calls:>5} calls{tensor_bytes:>14,} bytes   x parameters {moved / size:.4f}")
        moved_bytes += moved
    ratio = moved_bytes / size
    lines.append(f"  together {ratio:.4f} x the parameters, textbook {TEXTBOOK[stage]:.0f}")
    if own_network():
        lines.append(f"  loopback device, both processes: {counted['loopback_bytes'] / size:.4f} x the parameters")
    return "\n".join(lines)


def main() -> None:
    """Count and print, one stage after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="ZeRO 1 only")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further Hydra overrides")
    parser.add_argument("--layout", nargs="+", metavar="KEY=VALUE", help="of the section parallel; counts this layout")
    parser.add_argument("--zero", type=int, default=1, help="with --layout")
    parser.add_argument("--processes", type=int, default=PROCESSES, help="with --layout")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="loom-bench-data-") as folder:
        workload.write(Path(folder), rows=args.processes * workload.MICRO_BATCH * (WARMUP + 1), samples=1)
        if args.layout:
            words = [f"parallel.{word}" for word in args.layout]
            print("\n".join(measure(args.zero, Path(folder), [*words, *args.set], args.processes)["lines"]))
            return
        for stage in [1] if args.quick else [0, 1, 2, 3]:
            print(report(stage, measure(stage, Path(folder), args.set)), flush=True)


if __name__ == "__main__":
    try:
        main()
    except RuntimeError as failure:
        sys.exit(str(failure))
