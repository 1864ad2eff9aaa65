"""Throughput, achieved FLOP/s, model FLOP utilisation and peak memory of a run."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

# Dense peak TFLOP/s of one device as (bf16/fp16 tensor cores with fp32 accumulation, fp32 without TF32), without
# sparsity, from the makers' data sheets and architecture papers. The first name that occurs in torch's device name
# counts, so the longer names of a family stand first.
_PEAK_TFLOPS: tuple[tuple[str, float, float], ...] = (
    ("GB200", 2500.0, 80.0),
    ("B200", 2250.0, 75.0),
    ("GH200", 989.4, 66.9),
    ("H200 NVL", 835.5, 60.3),
    ("H200", 989.4, 66.9),
    ("H100 PCIe", 756.5, 51.2),
    ("H100 NVL", 835.5, 60.3),
    ("H100", 989.4, 66.9),
    ("H800 PCIe", 756.5, 51.2),
    ("H800", 989.4, 66.9),
    ("H20", 148.0, 44.0),
    ("A100", 312.0, 19.5),
    ("A800", 312.0, 19.5),
    ("A30", 165.0, 10.3),
    ("A40", 149.7, 37.4),
    ("A10G", 70.0, 35.0),
    ("A10", 125.0, 31.2),
    ("L40S", 362.1, 91.6),
    ("L40", 181.1, 90.5),
    ("L4", 121.0, 30.3),
    ("V100-PCIE", 112.0, 14.0),
    ("V100", 125.0, 15.7),
    ("Tesla T4", 65.0, 8.1),
    ("RTX 5090", 209.5, 104.8),
    ("RTX 4090", 165.2, 82.6),
    ("RTX 3090", 71.0, 35.6),
    ("MI300X", 1307.4, 163.4),
    ("MI250X", 191.5, 23.9),  # torch shows each of the two dies of a card as a device
)


def peak_flops(device_name: str, precision: str) -> float | None:
    """Dense peak FLOP/s of one device for ``precision`` (fp32, bf16 or fp16); None for a device not in the table.

    A slice of a GPU (MIG) has no entry: its share of the peak depends on how it was cut.
    """
    if "MIG" in device_name.split():
        return None
    words = device_name.replace("-", " ").split()
    for name, half, single in _PEAK_TFLOPS:
        wanted = name.replace("-", " ").split()
        if any(words[i : i + len(wanted)] == wanted for i in range(len(words))):
            return 1e12 * (single if precision == "fp32" else half)
    return None


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this process so far, in GiB (2^30 bytes): allocated on the GPU, or resident (RSS) on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # getrusage(2): kibibytes on Linux, bytes on macOS.
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20


class PerfMeter:
    """Counts tokens, FLOPs and time between two logged steps.

    Args:
        device: the device this rank trains on.
        precision: compute type, fp32, bf16 or fp16; decides which peak MFU refers to.
        world: number of devices that share the counted work.
        clock: seconds of a monotonic clock, replaced in tests.
    """

    def __init__(
        self, device: torch.device, precision: str, world: int, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._device = device
        self._world = world
        self._clock = clock
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        self._peak = peak_flops(name, precision)
        self._restart()

    def _restart(self) -> None:
        self._tokens = 0
        self._flops = 0.0
        self._steps = 0
        self._waited_s: float | None = None
        self._paused_s = 0.0
        self._since = self._clock()

    def add(self, tokens: int, flops: float, waited_s: float | None = None) -> None:
        """Count one finished optimizer step: tokens and model FLOPs of its global batch, all devices together.

        Model FLOPs are those of forward and backward without recomputation (PaLM, Chowdhery et al. 2022, appendix B).
        ``waited_s``: seconds this process waited for data; None where they are there at once.
        """
        self._tokens += tokens
        self._flops += flops
        self._steps += 1
        if waited_s is not None:
            self._waited_s = (self._waited_s or 0.0) + waited_s

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time inside (evaluation, saving)."""
        began = self._clock()
        try:
            yield
        finally:
            self._paused_s += self._clock() - began

    def read(self) -> dict[str, float]:
        """Metrics of the steps counted since the last ``read``, which starts a new count; empty without a step.

        ``perf/tokens_per_s`` is of all devices together, ``perf/tflops`` (1e12 model FLOP/s) and ``perf/mfu`` (a
        fraction, only where the device's peak is known) of one device, ``perf/step_time`` in seconds,
        ``perf/memory_gib`` the peak of this process, ``perf/data_wait`` (where pictures are read) the share of the time
        in which it waited for data.
        """
        seconds = self._clock() - self._since - self._paused_s
        found: dict[str, float] = {}
        if self._steps and seconds > 0:
            per_device = self._flops / seconds / self._world
            found = {
                "perf/tokens_per_s": self._tokens / seconds,
                "perf/step_time": seconds / self._steps,
                "perf/tflops": per_device / 1e12,
                "perf/memory_gib": peak_memory_gib(self._device),
            }
            if self._waited_s is not None:
                found["perf/data_wait"] = self._waited_s / seconds
            if self._peak is not None:
                found["perf/mfu"] = per_device / self._peak
        self._restart()
        return found
