"""Throughput, FLOP/s and MFU against hand values; the clock is ours."""

from __future__ import annotations

import gc
import time

import numpy as np
import psutil
import pytest
import torch

from trainer.feed import Feed
from trainer.logging.perf import PerfMeter, peak_flops, peak_memory_gib


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_rates_are_per_second_of_counted_time() -> None:
    clock = Clock()
    meter = PerfMeter(torch.device("cpu"), "fp32", world=2, clock=clock)
    for _ in range(4):
        clock.now += 2.0
        meter.add(tokens=1000, flops=6e12)
    with meter.paused():
        clock.now += 50.0
    found = meter.read()
    assert found["perf/tokens_per_s"] == pytest.approx(4 * 1000 / 8.0)
    assert found["perf/step_time"] == pytest.approx(2.0)
    assert found["perf/tflops"] == pytest.approx(4 * 6.0 / 8.0 / 2)  # per device
    assert "perf/mfu" not in found  # a CPU's peak is not known
    assert found["perf/memory_gib"] == peak_memory_gib(torch.device("cpu"))
    assert meter.read() == {}
    clock.now += 1.0
    meter.add(tokens=10, flops=1.0)
    clock.now += 1.0
    assert meter.read()["perf/tokens_per_s"] == pytest.approx(5.0)  # a new count since the last read


def test_waiting_for_data_is_a_share_of_the_counted_time() -> None:
    clock = Clock()
    meter = PerfMeter(torch.device("cpu"), "fp32", world=1, clock=clock)
    for waited in (1.0, 0.0, 2.0):
        clock.now += 4.0
        meter.add(tokens=1, flops=1.0, waited_s=waited)
    assert meter.read()["perf/data_wait"] == pytest.approx(0.25)
    clock.now += 4.0
    meter.add(tokens=1, flops=1.0)
    assert "perf/data_wait" not in meter.read()


def test_a_feed_says_how_long_it_kept_one_waiting() -> None:
    """The first is made while one waits; the second was made in the meantime."""
    feed = Feed(lambda position: time.sleep(0.2), step=1, ahead=True)
    feed.take(0)
    first = feed.waited()
    time.sleep(0.4)
    feed.take(1, more=False)
    second = feed.waited()
    assert first is not None and second is not None and first >= 0.2 and second < 0.1
    assert Feed(lambda position: None, step=1, ahead=False).waited() is None


def test_mfu_is_a_fraction_of_one_devices_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**30)
    clock = Clock()
    meter = PerfMeter(torch.device("cuda", 0), "bf16", world=8, clock=clock)
    clock.now += 1.0
    meter.add(tokens=1, flops=8 * 156e12)
    found = meter.read()
    assert found["perf/mfu"] == pytest.approx(0.5)
    assert found["perf/memory_gib"] == 3.0


@pytest.mark.parametrize(
    ("name", "half", "single"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12, 66.9e12),
        ("NVIDIA H100 PCIe", 756.5e12, 51.2e12),
        ("NVIDIA H100 NVL", 835.5e12, 60.3e12),
        ("NVIDIA H200", 989.4e12, 66.9e12),
        ("NVIDIA A100-SXM4-40GB", 312e12, 19.5e12),
        ("NVIDIA A100 80GB PCIe", 312e12, 19.5e12),
        ("NVIDIA A10G", 70e12, 35e12),
        ("NVIDIA A10", 125e12, 31.2e12),
        ("NVIDIA L40S", 362.1e12, 91.6e12),
        ("NVIDIA L4", 121e12, 30.3e12),
        ("Tesla V100-SXM2-16GB", 125e12, 15.7e12),
        ("Tesla V100-PCIE-32GB", 112e12, 14.0e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12, 82.6e12),
    ],
)
def test_peaks_by_the_names_torch_gives(name: str, half: float, single: float) -> None:
    assert peak_flops(name, "bf16") == pytest.approx(half)
    assert peak_flops(name, "fp16") == pytest.approx(half)
    assert peak_flops(name, "fp32") == pytest.approx(single)


@pytest.mark.parametrize("name", ["", "NVIDIA A1000", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA RTX A4000"])
def test_no_peak_for_a_device_that_is_not_known(name: str) -> None:
    assert peak_flops(name, "bf16") is None


def test_peak_memory_is_in_gib_and_outlives_the_tensor() -> None:
    held = np.ones(2**27, dtype=np.uint8)
    resident = psutil.Process().memory_info().rss
    del held
    gc.collect()
    peak = peak_memory_gib(torch.device("cpu")) * 2**30
    assert 0.99 * resident <= peak < psutil.virtual_memory().total
