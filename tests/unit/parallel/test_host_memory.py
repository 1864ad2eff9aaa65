"""Freed memory stays in the process: counted in page faults."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from parallel import host_memory

ROOT = Path(__file__).resolve().parents[3]
LINUX = sys.platform.startswith("linux")
# Four blocks of 16 MiB, written page by page and freed, ten times; prints the minor page faults of the last nine.
LOOP = """
import ctypes, resource, sys
from parallel.host_memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
faults = 0
for turn in range(10):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [libc.malloc(16 * 2**20) for _ in range(4)]
    for block in blocks:
        ctypes.memset(block, 1, 16 * 2**20)
    for block in blocks:
        libc.free(block)
    faults += (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) if turn else 0
print(faults)
"""
RECORDED = """
import pickle
import torch, torch.distributed as dist
from torch._C import _distributed_c10d
from parallel.groups import LauncherRanks, build_groups
build_groups(LauncherRanks(), 60.0)
for _ in range(100):
    dist.all_reduce(torch.zeros(1))
print(len(pickle.loads(_distributed_c10d._dump_fr_trace(True, False, False))["entries"]))
"""

# 150 products of a shape of their own, three times over; prints the KiB in use that each shape left behind.
PRODUCTS = """
import ctypes, sys
import torch
from parallel.host_memory import keep_few_products
from parallel.matmul import product_nt
from scripts.bench.live_memory import Mallinfo2
if sys.argv[1] == "few":
    keep_few_products()
mallinfo2 = ctypes.CDLL(None).mallinfo2
mallinfo2.restype = Mallinfo2
a, b = torch.randn(300, 64), torch.randn(64, 64)
product_nt(a[:16], b)
before = mallinfo2().uordblks
for rows in [*range(100, 250)] * 3:
    product_nt(a[:rows], b)
print((mallinfo2().uordblks - before) // 1024 // 150)
"""


def faults(mode: str) -> int:
    command = [sys.executable, "-c", LOOP, mode]
    return int(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)


def test_freed_blocks_are_not_faulted_again() -> None:
    """Each turn writes 64 MiB, 16384 pages of 4 KiB. Kept, no page comes twice; a few hundred are Python's own."""
    if host_memory.keep_freed_memory():  # glibc; elsewhere there is nothing to measure
        assert faults("keep") < 1000 < faults("leave")
    else:
        assert not LINUX or getattr(ctypes.CDLL(None), "gnu_get_libc_version", None) is None


def test_few_collectives_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's own number stays, under either of its names."""
    for name in host_memory.RECORDS_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TORCH_NCCL_TRACE_BUFFER_SIZE", "500")
    host_memory.record_few_collectives()
    assert "TORCH_FR_BUFFER_SIZE" not in os.environ
    monkeypatch.delenv("TORCH_NCCL_TRACE_BUFFER_SIZE")
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "0")  # put back behind the test
    del os.environ["TORCH_FR_BUFFER_SIZE"]
    host_memory.record_few_collectives()
    assert os.environ["TORCH_FR_BUFFER_SIZE"] == str(host_memory.RECORDS)


def test_recorder_keeps_no_more() -> None:
    """In a run's own process group, of more collectives than that."""
    command = [sys.executable, "-c", RECORDED]
    env = {name: value for name, value in os.environ.items() if name not in host_memory.RECORDS_VARIABLES}
    found = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout
    assert int(found.split()[-1]) == host_memory.RECORDS


def test_few_products_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's own number stays, under either of its names."""
    for name in (*host_memory.PRODUCTS_VARIABLES, host_memory.WRAPPED_VARIABLE):
        monkeypatch.setenv(name, "7")  # put back behind the test
        monkeypatch.delenv(name)
    monkeypatch.setenv("DNNL_PRIMITIVE_CACHE_CAPACITY", "500")
    host_memory.keep_few_products()
    assert "ONEDNN_PRIMITIVE_CACHE_CAPACITY" not in os.environ
    assert os.environ["LRU_CACHE_CAPACITY"] == str(host_memory.WRAPPED)
    del os.environ["DNNL_PRIMITIVE_CACHE_CAPACITY"]
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "500")
    host_memory.keep_few_products(8192)
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "160"
    assert os.environ["LRU_CACHE_CAPACITY"] == "500"


def test_new_shapes_do_not_fill_the_heap() -> None:
    """Left alone, each of 150 shapes leaves hundreds of KiB behind."""
    if not (LINUX and getattr(ctypes.CDLL(None), "mallinfo2", None) and torch.backends.mkldnn.is_available()):
        return  # nothing that could be measured
    names = (*host_memory.PRODUCTS_VARIABLES, host_memory.WRAPPED_VARIABLE)
    env = {name: value for name, value in os.environ.items() if name not in names}

    def left(mode: str) -> int:
        command = [sys.executable, "-c", PRODUCTS, mode]
        return int(subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout)

    assert 2 * left("few") < left("all")


def test_elsewhere_it_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(name: object) -> None:
        raise AssertionError("no C library may be opened")

    monkeypatch.setattr(host_memory.sys, "platform", "darwin")
    monkeypatch.setattr(ctypes, "CDLL", forbidden)
    assert host_memory.keep_freed_memory() is False


def test_a_c_library_without_mallopt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory.sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert host_memory.keep_freed_memory() is False
