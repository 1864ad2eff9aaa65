"""FLOPs of a Q-Former's first stage against torch's counter."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import models
import parallel.matmul
from data.pictures.types import Pictures
from models.dual.qformer import Matches
from models.flops import step_flops
from models.vision import tower_layers
from tests.qformer_cases import TINY

TEXTS, LENGTH = 4, 7


@pytest.mark.parametrize("frozen", [False, True])
def test_a_step_equals_torch_counter(frozen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """All texts are compared, written and matched three times. The counter also sees what is masked, and the logits
    that are made anew in the backward."""

    def attention(qkv: torch.Tensor, heads: int, seen: tower_layers.Seen) -> torch.Tensor:
        return tower_layers.sequence_attention(qkv, heads, seen.pieces)

    monkeypatch.setattr(parallel.matmul, "_ONEDNN", False)
    monkeypatch.setattr(tower_layers, "self_attention", attention)
    model = models.build(TINY).to_empty(device="cpu")
    for param in model.parameters():
        torch.nn.init.constant_(param, 0.1)
    model.vision.requires_grad_(not frozen)
    tokens_T, nothing = torch.zeros(TEXTS * LENGTH, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    positions_T, grids = torch.arange(LENGTH).repeat(TEXTS), ((3, 3),) * TEXTS
    pictures = Pictures(torch.zeros(9 * TEXTS, 48), grids, nothing, nothing)
    matches = Matches(torch.arange(3 * TEXTS) % TEXTS, tokens_T.repeat(3), (LENGTH,) * (3 * TEXTS))
    borders = torch.arange(TEXTS + 1) * LENGTH
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        read = model(tokens_T, positions_T, borders, pictures=pictures, targets_T=tokens_T, matches=matches)
        (read.image_NQP.sum() + read.text_NP.sum() + read.written_T.sum() + read.matched_M2.sum()).backward()
    counted = step_flops(TINY, [LENGTH] * TEXTS, 0, grids, lambda name: not (frozen and name.startswith("vision.")))
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.02)
    assert counted <= counter.get_total_flops()
