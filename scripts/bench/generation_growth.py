"""What one step of decoding costs as the cache of its rows grows, beside the floor that this machine sets.

The floor: every weight is read once a step and multiplied with every row, every cached key and value of a live row is
read once. Products run as fast as one large product of oneDNN, reads as fast as a sum over 512 MiB, both timed here.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure

from models.config import ModelConfig
from models.decoder import Decoder
from models.flops import matmul_params
from models.generation.cache import Cache
from models.generation.forward import decode
from models.generation.packing import packed_decoder
from parallel.matmul import product_nt
from scripts.bench.harness import ROOT, child_environment
from trainer.inference.loading import load_generator

ROWS = 8
CONTEXTS = (128, 256, 512, 1024, 2048, 4096)
FP32 = 4


@dataclass(frozen=True)
class Machine:
    """What it can do with the threads it has, per second."""

    flops: float
    read_bytes: float

    @staticmethod
    def measured() -> Machine:
        a, b, big = torch.randn(2048, 1536), torch.randn(3072, 1536), torch.ones(2**27)
        product = least(lambda: product_nt(a, b), 7)
        return Machine(2 * a.shape[0] * b.numel() / product, FP32 * big.numel() / least(big.sum, 5))


@dataclass(frozen=True)
class Floor:
    """Of one step, fp32."""

    flops: float
    weight_bytes: float
    cache_bytes: float

    @staticmethod
    def of(cfg: ModelConfig, lengths: Sequence[int]) -> Floor:
        """For rows of these lengths; full attention without latents."""
        weights = matmul_params(cfg) + cfg.vocab_size * cfg.hidden_size
        tokens = sum(lengths) * cfg.num_layers
        q, k, v = cfg.qkv_parts
        return Floor(2 * weights * len(lengths) + 4 * q * tokens, FP32 * weights, FP32 * (k + v) * tokens)

    def seconds(self, machine: Machine) -> float:
        """Products and reads of weights at the same time, then the cache."""
        return max(self.flops / machine.flops, self.weight_bytes / machine.read_bytes) + (
            self.cache_bytes / machine.read_bytes
        )


@dataclass(frozen=True)
class Point:
    """Steps of rows with these lengths; milliseconds of one."""

    name: str
    cached: int
    wall_ms: float
    cpu_ms: float
    floor_ms: float


def least(run: Callable[[], object], times: int) -> float:
    """Seconds of the fastest of some runs, after one that does not count."""
    run()
    found = []
    for _ in range(times):
        started = time.perf_counter()
        run()
        found.append(time.perf_counter() - started)
    return min(found)


def filled(model: Decoder, lengths: Sequence[int], room: int) -> Cache:
    """A cache of `room` places a row with random keys and values."""
    cache = Cache(model, len(lengths) * (room + 64))
    cache.fit(len(lengths), room)
    for layer in cache.layers:
        for own in layer.tensors():
            own.normal_()
    return cache


def step(model: Decoder, name: str, lengths: Sequence[int], room: int, machine: Machine, times: int) -> Point:
    """Time the same step again and again, the fastest counts: the new token is written over the last one."""
    cache, before = filled(model, lengths, room), [n - 1 for n in lengths]
    wall, cpu = [], []
    for _ in range(times + 1):
        started, used = time.perf_counter(), time.process_time()
        decode(model, [1] * len(lengths), before, cache)
        wall.append(time.perf_counter() - started)
        cpu.append(time.process_time() - used)
    floor = Floor.of(model.cfg, lengths).seconds(machine)
    return Point(name, sum(lengths), min(wall[1:]) * 1e3, min(cpu[1:]) * 1e3, floor * 1e3)


def measure(folder: Path, threads: int, quick: bool) -> list[Point]:
    """`steps` in a process of its own, in the environment that contenders have.

    Raises:
        RuntimeError: it failed.
    """
    command = [sys.executable, "-m", "scripts.bench.generation_growth", str(folder), "--threads", str(threads)]
    done = subprocess.run(
        [*command, *(["--quick"] if quick else [])],
        cwd=ROOT, env=child_environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"the steps could not be timed:\n{done.stderr[-2000:]}")
    return [Point(**each) for each in json.loads(done.stdout.splitlines()[-1])]


def steps(folder: Path, threads: int, quick: bool) -> list[Point]:
    """Rows of equal lengths; then rows that live in a cache with far more places, and rows of unequal lengths."""
    torch.set_num_threads(threads)
    model = load_generator(folder, device=torch.device("cpu")).model
    machine, times = Machine.measured(), 2 if quick else 8
    contexts = CONTEXTS[:2] if quick else CONTEXTS
    few, many = contexts[0], contexts[-1]
    with packed_decoder(model, steps=len(contexts) * times + 100):
        points = [step(model, f"{n} each", [n] * ROWS, n, machine, times) for n in contexts]
        points.append(step(model, f"{few} each, room for {many}", [few] * ROWS, many, machine, times))
        mixed = [many, *[few] * (ROWS - 1)]
        points.append(step(model, f"one of {many}, others {few}", mixed, many, machine, times))
    return points


def table(points: Sequence[Point]) -> str:
    """What a step costs, and what a cached token adds to it over the first line."""
    lines = [
        f"a step of {ROWS} rows, by the tokens they have",
        f"{'tokens':<28}{'cached':>8}{'wall ms':>9}{'CPU ms':>9}{'floor ms':>10}{'CPU us a cached token':>23}",
    ]
    first = points[0]
    for point in points:
        more = point.cached - first.cached
        slope = f"{(point.cpu_ms - first.cpu_ms) / more * 1e3:.2f}" if more else ""
        times = f"{point.wall_ms:>9.1f}{point.cpu_ms:>9.1f}{point.floor_ms:>10.1f}"
        lines.append(f"{point.name:<28}{point.cached:>8}{times}{slope:>23}")
    return "\n".join(lines)


def plot(points: Sequence[Point], path: Path) -> None:
    """Milliseconds of a step over the tokens in the cache, as a picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    ordered = sorted(points, key=lambda point: point.cached)
    cached = [point.cached for point in ordered]
    for label, values in (
        ("CPU", [point.cpu_ms for point in ordered]),
        ("wall", [point.wall_ms for point in ordered]),
        ("floor", [point.floor_ms for point in ordered]),
    ):
        axes.plot(cached, values, marker="o", label=label)
    axes.set(xlabel=f"live tokens in the cache, {ROWS} rows", ylabel="ms a step", ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Time the steps and print them as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    print(json.dumps([asdict(point) for point in steps(args.model, args.threads, args.quick)]))


if __name__ == "__main__":
    main()
