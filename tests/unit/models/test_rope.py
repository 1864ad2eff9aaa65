"""Rotary tables against transformers for every scaling, and dynamic scaling of packed documents."""

import dataclasses

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from models import FAMILIES, ModelConfig, RopeConfig
from models.blocks.rope import Rope, rotate_qk

BASE = ModelConfig("llama", 64, 64, 64, 1, 2, 1, 32, 4096)
SCALINGS = [
    RopeConfig(10000.0),
    RopeConfig(500000.0),
    RopeConfig(scaling="linear", factor=4.0),
    RopeConfig(scaling="dynamic", factor=2.0, original_max_seq_len=64),
    RopeConfig(scaling="yarn", factor=8.0, original_max_seq_len=512),
    RopeConfig(scaling="yarn", factor=4.0, original_max_seq_len=1024, beta_fast=20.0, beta_slow=2.0, truncate=False),
    RopeConfig(scaling="yarn", factor=40.0, original_max_seq_len=4096, mscale=0.707, mscale_all_dim=1.0),
    RopeConfig(scaling="yarn", factor=4.0, original_max_seq_len=1024, attention_factor=1.25),
    RopeConfig(500000.0, scaling="llama3", factor=8.0, original_max_seq_len=512),
    RopeConfig(
        500000.0, scaling="llama3", factor=32.0, original_max_seq_len=128, low_freq_factor=2.0, high_freq_factor=8.0
    ),
]


def theirs(cfg: ModelConfig) -> LlamaRotaryEmbedding:
    keys = FAMILIES["llama"].to_hf_config(cfg)
    return LlamaRotaryEmbedding(
        LlamaConfig(**{k: v for k, v in keys.items() if k not in ("model_type", "architectures")})
    )


@pytest.mark.parametrize("rope", SCALINGS, ids=lambda rope: f"{rope.scaling}-{rope.factor}")
@pytest.mark.parametrize("length", [5, 64, 4000])
def test_tables_equal_transformers(rope: RopeConfig, length: int) -> None:
    """Up to one rounding of an fp32 angle: 1e-6 when short, 5e-4 up to 4000 radians (whose ulp is 2.4e-4)."""
    cfg = dataclasses.replace(BASE, rope=rope)
    positions = torch.arange(length)
    cos, sin = Rope(cfg).tables(positions, [length])
    want_cos, want_sin = theirs(cfg)(torch.zeros(1, length, 32), positions[None])
    assert cos.dtype is torch.float32 and cos.shape == (length, 16)
    atol = 1e-6 if length <= 64 else 5e-4
    torch.testing.assert_close(cos, want_cos[0, :, :16], rtol=0, atol=atol)
    torch.testing.assert_close(sin, want_sin[0, :, :16], rtol=0, atol=atol)


def test_dynamic_scaling_of_a_document_does_not_depend_on_its_neighbours() -> None:
    cfg = dataclasses.replace(BASE, rope=RopeConfig(scaling="dynamic", factor=2.0, original_max_seq_len=64))
    rope, lengths = Rope(cfg), [30, 200, 64, 100]
    positions = torch.cat([torch.arange(n) for n in lengths])
    packed = rope.tables(positions, lengths)[0].split(lengths)
    for n, cos in zip(lengths, packed, strict=True):
        assert torch.equal(cos, rope.tables(torch.arange(n), [n])[0])
    plain = Rope(dataclasses.replace(cfg, rope=RopeConfig()))
    assert torch.equal(packed[0], plain.tables(torch.arange(30), [30])[0])
    assert not torch.equal(packed[1], plain.tables(torch.arange(200), [200])[0])


def test_rotation_and_its_gradient_equal_transformers() -> None:
    """fp32, 1e-6."""
    positions = torch.arange(7)
    cos, sin = Rope(BASE).tables(positions, [7])
    qkv = torch.randn(7, 4 * 32)
    seed = torch.randn(7, 4 * 32)
    leaf = qkv.clone().requires_grad_()
    out = rotate_qk(leaf * 1.0, cos, sin, 3 * 32, 32)
    out.backward(seed)
    twin = qkv.clone().requires_grad_()
    q, k, v = (part.view(1, 7, -1, 32).transpose(1, 2) for part in twin.split([64, 32, 32], 1))
    want_cos, want_sin = theirs(BASE)(torch.zeros(1, 7, 32), positions[None])
    q, k = apply_rotary_pos_emb(q, k, want_cos, want_sin)
    expected = torch.cat([part.transpose(1, 2).reshape(7, -1) for part in (q, k, v)], 1)
    expected.backward(seed)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(leaf.grad, twin.grad, rtol=0, atol=1e-6)
