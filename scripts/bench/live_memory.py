"""Memory that tensors occupy in a training step, without and with sequence parallel:
``python scripts/bench/live_memory.py``.

The resident size that the other benchmarks show also has torch itself and what the C library keeps of freed blocks,
which differs from run to run by more than a layout saves. Here a thread asks the C library 2,000 times a second how
much is in use (``mallinfo2``, glibc 2.33 or later); shown is the most during a step, and how much of it came with the
step: activations, gradients and what is on its way.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

MIB = 2**20
WARMUP, STEPS = 2, 1
MODULE = "scripts.bench.live_memory"
FIELDS = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"


class Mallinfo2(ctypes.Structure):
    """What malloc tells (mallinfo(3)); ``uordblks`` bytes in use on heaps, ``hblkhd`` bytes mapped one by one."""

    _fields_ = [(name, ctypes.c_size_t) for name in FIELDS.split()]


class Watch:
    """Hears of finished steps, and between the last warm-up step and the end samples the bytes in use."""

    def __init__(self, out: Path) -> None:
        self.out, self.done = out, 0
        self._mallinfo2 = ctypes.CDLL(None).mallinfo2
        self._mallinfo2.restype = Mallinfo2
        self.before = self.most = 0

    def in_use(self) -> int:
        """Bytes handed out by malloc and not freed."""
        info = self._mallinfo2()
        return info.uordblks + info.hblkhd

    def step(self, tokens: int, loss: float) -> None:
        """One optimizer step has been logged."""
        self.done += 1
        if self.done == WARMUP:
            self.before = self.in_use()
            threading.Thread(target=self._sample, daemon=True).start()
        elif self.done == WARMUP + STEPS:
            self.out.write_text(json.dumps([self.most, self.before]))

    def _sample(self) -> None:
        while self.done < WARMUP + STEPS:
            self.most = max(self.most, self.in_use())
            time.sleep(0.0005)


def work() -> None:
    """One process of a layout; leaves its figures in the data folder."""
    from parallel.groups import LauncherRanks
    from scripts.bench import loom, loom_pretrain
    from scripts.bench.turns import Schedule

    parser = argparse.ArgumentParser()
    parser.add_argument("--data", required=True)
    loom_pretrain.add_arguments(parser)
    args = parser.parse_args()
    ranks = LauncherRanks.read()
    command = loom_pretrain.command(args, Schedule(WARMUP, 1, STEPS), ranks.world)
    loom.train(command, Watch(Path(args.data) / f"{os.getppid()}.{ranks.rank}.json"))


def main() -> None:
    """Both layouts at two sizes of micro-batch."""
    import subprocess

    from scripts.bench import workload
    from scripts.bench.harness import ROOT, child_environment
    from scripts.bench.pretrain import LAYOUTS, loaded

    print(f"{'layout':<14}{'tokens':>8}{'most in use, MiB':>18}{'of it by the step':>19}")
    for rows in (2, 8):
        load = workload.Load(rows=rows, micro_batches=4)
        for contender in loaded([c for c in LAYOUTS if c.name in ("loom tp2", "loom tp2 sp")], load):
            with tempfile.TemporaryDirectory(prefix="loom-bench-") as folder:
                workload.write(Path(folder), rows * 4 * (WARMUP + STEPS), 1)
                command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
                command += [MODULE, *contender.args, "--data", folder]
                subprocess.run(command, cwd=ROOT, env=child_environment(), check=True, capture_output=True)
                figures = [json.loads(path.read_text()) for path in Path(folder).glob("*.json")]
            most, before = max(figures)
            tokens = rows * workload.SEQ_LEN
            print(f"{contender.name:<14}{tokens:>8}{most / MIB:>18.0f}{(most - before) / MIB:>19.0f}", flush=True)


if __name__ == "__main__":
    work() if "LOCAL_RANK" in os.environ else main()
