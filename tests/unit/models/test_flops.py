"""FLOPs against counts by hand and by torch's own counter."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models import ModelConfig
from models.config import MoEConfig
from models.flops import attended_pairs, matmul_params, step_flops

CFG = ModelConfig("llama", 100, 32, 48, 3, 4, 2, 8, 64)


def test_matmul_params_by_hand() -> None:
    assert matmul_params(CFG) == 3 * (32 * (32 + 16 + 16) + 32 * 32 + 3 * 32 * 48)


def test_experts_count_as_many_as_a_token_goes_to() -> None:
    """One dense layer, then two of 8 experts: 3 of size 16 a token, a gated shared one of 40, a router."""
    moe = MoEConfig(8, 3, 16, shared_size=40, shared_gate=True, first_dense=1)
    sparse = dataclasses.replace(CFG, family="qwen2_moe", moe=moe)
    experts = 3 * 32 * 16 * 3 + 3 * 32 * 40 + 32 + 32 * 8
    assert matmul_params(sparse) == matmul_params(CFG) + 2 * (experts - 3 * 32 * 48)


@pytest.mark.parametrize(("length", "window", "pairs"), [(1, None, 1), (4, None, 10), (4, 2, 7), (4, 9, 10), (5, 1, 5)])
def test_pairs_by_hand(length: int, window: int | None, pairs: int) -> None:
    assert attended_pairs(length, window) == pairs
    seen = [(q, k) for q in range(length) for k in range(q + 1) if window is None or q - k < window]
    assert len(seen) == pairs


def test_step_equals_torch_counter_on_plain_matmuls() -> None:
    """The linear part, counted by torch over the forward of plain products; backward is twice the forward."""
    tokens = 10
    shapes = 3 * [(32, 64), (32, 32), (32, 96), (48, 32)]
    with FlopCounterMode(display=False) as counter:
        for inputs, outputs in shapes:
            torch.mm(torch.empty(tokens, inputs), torch.empty(inputs, outputs))
        torch.mm(torch.empty(6, 32), torch.empty(32, 100))
    attention = 12.0 * 4 * 8 * 3 * (attended_pairs(4, None) + attended_pairs(6, None))
    assert step_flops(CFG, [4, 6], 6) == 3 * counter.get_total_flops() + attention


def test_window_counts_only_the_layers_that_have_it() -> None:
    sizes = (100, 32, 48, 4, 4, 2, 8, 64)
    full = ModelConfig("qwen2", *sizes, qkv_bias=True)
    some = ModelConfig("qwen2", *sizes, qkv_bias=True, sliding_window=5, full_attention_layers=3)
    saved = attended_pairs(20, None) - attended_pairs(20, 5)
    assert step_flops(full, [20], 0) - step_flops(some, [20], 0) == 12.0 * 4 * 8 * saved
