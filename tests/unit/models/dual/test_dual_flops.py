"""FLOPs of pairs of encoders against torch's counter, with all of them trained or a part."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import models
import parallel.matmul
from models.flops import step_flops
from models.parts import LayeredPartConfig, PartsConfig, freeze
from models.vision import tower_layers
from scripts.params import load_model
from tests.dual_cases import pictures_of, pixels

FROZEN = LayeredPartConfig(train=False)


@pytest.mark.parametrize("parts", [PartsConfig(), PartsConfig(vision=FROZEN), PartsConfig(decoder=FROZEN)])
@pytest.mark.parametrize("name", ["tiny_clip", "tiny_siglip"])
def test_step_equals_torch_counter(name: str, parts: PartsConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of one token, since the counter takes causal attention for whole; SigLIP's are filled up all the same."""

    def attention(qkv: torch.Tensor, heads: int, seen: tower_layers.Seen) -> torch.Tensor:
        return tower_layers.sequence_attention(qkv, heads, seen.pieces)

    monkeypatch.setattr(parallel.matmul, "_ONEDNN", False)
    monkeypatch.setattr(tower_layers, "self_attention", attention)
    cfg = load_model(name, [])
    model, texts = models.build(cfg).to_empty(device="cpu"), 6
    for param in model.parameters():
        torch.nn.init.constant_(param, 0.1)
    freeze(model, parts)
    tokens_T = torch.zeros(texts, dtype=torch.int64)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        found = model(tokens_T, tokens_T, list(range(texts + 1)), pictures=pictures_of(pixels(texts)))
        (found.image_NW.sum() + found.text_NW.sum()).backward()
    counted = step_flops(cfg, [1] * texts, 0, ((4, 4),) * texts, lambda name: parts.trains(name, cfg))
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.01)
