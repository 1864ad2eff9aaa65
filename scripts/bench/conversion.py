"""Time and memory of the conversion commands beside `cp` of the same bytes.

    python scripts/bench/conversion.py --size 1b --rounds 3
    python scripts/bench/conversion.py --size 13b --sparse --rounds 1     # 26 GB are written at a time

Goals: no more than 1.5 times the time of `cp`, and 3 times the largest tensor and 1 GiB of memory. A command runs from
its start in a process of its own (torch alone takes seconds to import), so `copying` stands beside it: the time between
its first and its last block. `cp` runs before every command, and again with the data on the disk (`sync`), as the
commands leave it. With --sparse a source is a file of its full length that holds no bytes: reading it gives zeros, what
is written is real. Results: a table, and `runs/bench/conversion.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from convert.boxes import Meta
from convert.from_hf import hf_shapes
from convert.hf_begin import begin_hf
from convert.hf_folder_files import write_config
from convert.megatron.args import to_args
from convert.megatron.layout import Layout
from convert.megatron.writing import begin_torch
from models.config import ModelConfig
from scripts.bench.harness import ROOT, child_environment
from scripts.params import load_model

MODELS = {"tiny": "tiny_llama", "1b": "llama2_13b", "13b": "llama2_13b"}
LAYOUTS = {"tiny": Layout(2, 2), "1b": Layout(4, 2), "13b": Layout(4, 2)}
GIB = 2**30
COPYING = re.compile(r"Wrote .* in ([\d.]+) s")


@dataclass(frozen=True)
class Row:
    """One command beside `cp`; seconds, GB and GiB."""

    step: str
    gb: float
    cp_s: float
    cp_sync_s: float
    command_s: float
    copying_s: float
    peak_gib: float
    allowed_gib: float

    def words(self) -> str:
        """A line of the table."""
        return (
            f"{self.step:24s} {self.gb:6.2f} {self.cp_s:7.1f} {self.cp_sync_s:9.1f} {self.command_s:9.1f} "
            f"{self.copying_s:9.1f} {self.copying_s / self.cp_s:7.2f} {self.copying_s / self.cp_sync_s:8.2f} "
            f"{self.peak_gib:8.2f} {self.allowed_gib:8.2f}"
        )


HEAD = (
    f"{'step':24s} {'GB':>6s} {'cp s':>7s} {'cp+sync s':>9s} {'command s':>9s} {'copying s':>9s} {'/ cp':>7s} "
    f"{'/cp+sync':>8s} {'peak GiB':>8s} {'allowed':>8s}"
)


def model(size: str) -> ModelConfig:
    """The shape of the model; `1b` is three layers of the 13B one, whose widths decide how rows are cut."""
    cfg = load_model(MODELS[size], [])
    return replace(cfg, num_layers=4) if size == "1b" else cfg


def make_source(folder: Path, cfg: ModelConfig, layout: Layout | None, sparse: bool) -> None:
    """A bf16 checkpoint: a Hugging Face folder, or a Megatron one of format torch."""
    metas = {hf: Meta(torch.bfloat16, shape) for hf, shape in hf_shapes(cfg).items()}
    folder.mkdir(parents=True)
    if layout is None:
        write_config(folder, cfg, torch.bfloat16, None)
        nothing = begin_hf(folder, metas)
    else:
        nothing = begin_torch(folder, cfg, layout, metas, to_args(cfg, layout, torch.bfloat16))
    if not sparse:
        generator = torch.Generator().manual_seed(0)
        for hf in metas:
            for _, place in nothing.of(hf):
                rows = place.shape[0]
                step = max(1, 2**22 // max(1, place.shape[-1]))
                for start in range(0, rows, step):
                    count = min(step, rows - start)
                    place.put(start, torch.randn((count, *place.row_shape), generator=generator))


def cp(source: Path, target: Path, sync: bool) -> float:
    """Seconds of `cp -r`, writing every byte (no links, no holes)."""
    os.sync()
    started = time.perf_counter()
    subprocess.run(["cp", "-r", "--reflink=never", "--sparse=never", source, target], check=True)
    if sync:
        subprocess.run(["sync", "-f", target], check=True)
    took = time.perf_counter() - started
    shutil.rmtree(target)
    return took


def command(words: list[str], out: Path) -> tuple[float, float, float]:
    """Seconds of a command, seconds it copied for, and its peak memory in GiB. Its output is removed."""
    os.sync()
    log = out.with_suffix(".log")
    started = time.perf_counter()
    with log.open("w") as file:
        child = subprocess.Popen(
            [sys.executable, *words, "--out", str(out)], stdout=file, stderr=file, cwd=ROOT, env=child_environment()
        )
        _, status, used = os.wait4(child.pid, 0)
    took = time.perf_counter() - started
    child.returncode = os.waitstatus_to_exitcode(status)
    told = log.read_text()
    copying = COPYING.search(told)
    if child.returncode or copying is None:
        raise RuntimeError(f"{' '.join(words)} ended with {child.returncode}:\n{told}")
    shutil.rmtree(out)
    log.unlink()
    return took, float(copying.group(1)), used.ru_maxrss * 1024 / GIB


def measure(folder: Path, size: str, sparse: bool, rounds: int, workers: int | None) -> list[Row]:
    """Every step, `cp` and command in turn; medians."""
    cfg, layout = model(size), LAYOUTS[size]
    flags = ["--tp", str(layout.tp), "--pp", str(layout.pp)]
    more = ["--workers", str(workers)] if workers else []
    largest = max(torch.Size(shape).numel() for shape in hf_shapes(cfg).values()) * 2
    rows = []
    for kind, steps in (
        ("hf", {"hf to torch": ["convert/hf_to_mega.py", "--hf", *flags],
                "hf to torch_dist": ["convert/hf_to_mega.py", "--hf", *flags, "--format", "torch_dist"]}),
        ("mega", {"torch to hf": ["convert/mega_to_hf.py", "--mega"],
                  "torch to safetensors tp2": ["convert/reshard.py", "--in", "--tp", "2", "--format", "safetensors"]}),
    ):  # fmt: skip
        source = folder / kind
        make_source(source, cfg, layout if kind == "mega" else None, sparse)
        gb = sum(path.stat().st_size for path in source.rglob("*") if path.is_file()) / 1e9
        for step, (script, option, *rest) in steps.items():
            found = []
            for _ in range(rounds):
                plain = cp(source, folder / "cp", sync=False)
                synced = cp(source, folder / "cp", sync=True)
                found.append((plain, synced, *command([script, option, str(source), *rest, *more], folder / "out")))
            plain, synced, took, copying, peak = (median(column) for column in zip(*found, strict=True))
            rows.append(Row(step, gb, plain, synced, took, copying, peak, 3 * largest / GIB + 1))
            print(rows[-1].words(), flush=True)
        shutil.rmtree(source)
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=MODELS, default="1b", help="shape of the model")
    parser.add_argument("--sparse", action="store_true", help="sources without bytes")
    parser.add_argument("--rounds", type=int, default=3, help="of which the median counts")
    parser.add_argument("--workers", type=int, help="of the commands (default: theirs)")
    parser.add_argument("--dir", type=Path, default=ROOT / "runs" / "bench" / "conversion", help="where to write")
    args = parser.parse_args()
    shutil.rmtree(args.dir, ignore_errors=True)
    print(HEAD)
    try:
        rows = measure(args.dir, args.size, args.sparse, args.rounds, args.workers)
    finally:
        shutil.rmtree(args.dir, ignore_errors=True)
    results = ROOT / "runs" / "bench" / "conversion.jsonl"
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.open("a") as file:
        for row in rows:
            file.write(json.dumps({"size": args.size, "sparse": args.sparse, **asdict(row)}) + "\n")


if __name__ == "__main__":
    main()
