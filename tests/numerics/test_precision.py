"""Mixed precision: fp32 weights and fp32 accumulation under autocast."""

from __future__ import annotations

import pytest

from parallel.config import ParallelConfig
from tests import cases


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_follows_fp32(pool, precision: str, zero: int) -> None:
    """Losses within the type's rounding: 2^-8 for bf16, 2^-11 for fp16, times ten for the depth of the network."""
    exact = pool(1).run(cases.train, 1, 8, steps=8)[0]
    low = pool(2).run(cases.train, zero, 2, steps=8, precision=precision)[0]
    tolerance = {"bf16": 10 * 2**-8, "fp16": 10 * 2**-11}[precision]
    assert cases.relative(exact["losses"], low["losses"]) <= tolerance
    assert low["losses"] != exact["losses"], "autocast did not lower anything"


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_bf16_accumulates_64_micro_batches_in_fp32(pool, zero: int) -> None:
    """64 equal micro-batches add up to 64 times one, to fp32 rounding; a bf16 sum would stop growing (2^-8)."""
    distance = pool(1).run(cases.accumulate_equal, zero, 64)[0]
    assert distance <= 1e-5


@pytest.mark.parametrize("layout", [ParallelConfig(pp=2), ParallelConfig(tp=2, sequence_parallel=True)])
def test_bf16_accumulates_in_fp32_at_other_layouts(pool, layout: ParallelConfig) -> None:
    """As above; a pipeline's gradients gather without DeepSpeed."""
    assert pool(2).run(cases.accumulate_equal, 1, 64, layout)[0] <= 1e-5
