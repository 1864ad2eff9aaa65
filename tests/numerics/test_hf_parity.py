"""fp32 logits and gradients against transformers, weights crossing a saved folder: families, rope scalings, options."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from convert.from_hf import open_hf
from convert.source import Source
from models import FAMILIES, Decoder, ModelConfig, RopeConfig, Runtime, build, config_from_hf_folder
from parallel.materialise import materialise
from parallel.sharding import SINGLE, WHOLE
from scripts.params import load_model

CONF = Path(__file__).resolve().parents[2] / "conf" / "model"
TINY = sorted(p.stem for p in CONF.glob("tiny_*.yaml") if load_model(p.stem, []).vision is None)
LLAMA, QWEN2, QWEN3 = (load_model(name, []) for name in ("tiny_llama", "tiny_qwen2", "tiny_qwen3"))
DEEPSEEK2, DEEPSEEK3 = (load_model(name, []) for name in ("tiny_deepseek_v2", "tiny_deepseek_v3"))
MLA2, MOE2, MLA3, MOE3 = DEEPSEEK2.mla, DEEPSEEK2.moe, DEEPSEEK3.mla, DEEPSEEK3.moe
assert MLA2 is not None and MOE2 is not None and MLA3 is not None and MOE3 is not None
MIXTRAL, QWEN2_MOE, QWEN3_MOE = (load_model(f"tiny_{name}", []) for name in ("mixtral", "qwen2_moe", "qwen3_moe"))
EXPERTS, EXPERTS2, EXPERTS3 = MIXTRAL.moe, QWEN2_MOE.moe, QWEN3_MOE.moe
assert EXPERTS is not None and EXPERTS2 is not None and EXPERTS3 is not None
OPTIONS: dict[str, ModelConfig] = {name: load_model(name, []) for name in TINY} | {
    "llama_tied": dataclasses.replace(LLAMA, tied_embeddings=True),
    "llama_biases": dataclasses.replace(LLAMA, qkv_bias=True, attention_out_bias=True, mlp_bias=True),
    "llama_multi_head": dataclasses.replace(LLAMA, num_kv_heads=4),
    "llama_one_group": dataclasses.replace(LLAMA, num_kv_heads=1),
    "qwen2_untied_full": dataclasses.replace(
        QWEN2, tied_embeddings=False, sliding_window=None, full_attention_layers=0
    ),
    "qwen2_all_sliding": dataclasses.replace(QWEN2, full_attention_layers=0, sliding_window=7),
    "qwen3_tied": dataclasses.replace(QWEN3, tied_embeddings=True),
    "qwen3_biases": dataclasses.replace(QWEN3, qkv_bias=True, attention_out_bias=True),
    "qwen3_sliding": dataclasses.replace(QWEN3, sliding_window=20, full_attention_layers=1),
    "mixtral_full_tied": dataclasses.replace(MIXTRAL, sliding_window=None, tied_embeddings=True),
    "mixtral_one_expert_a_token": dataclasses.replace(MIXTRAL, moe=dataclasses.replace(EXPERTS, top_k=1)),
    "qwen2_moe_normalized": dataclasses.replace(
        QWEN2_MOE, qkv_bias=False, moe=dataclasses.replace(EXPERTS2, normalize=True, first_dense=0)
    ),
    "qwen3_moe_sliding_biases": dataclasses.replace(
        QWEN3_MOE, sliding_window=20, qkv_bias=True, attention_out_bias=True
    ),
    "qwen3_moe_first_dense": dataclasses.replace(
        QWEN3_MOE, moe=dataclasses.replace(EXPERTS3, first_dense=1, normalize=False)
    ),
    "deepseek2_latent_queries": dataclasses.replace(DEEPSEEK2, mla=dataclasses.replace(MLA2, q_rank=24)),
    "deepseek2_groups": dataclasses.replace(
        DEEPSEEK2, moe=dataclasses.replace(MOE2, groups=4, groups_kept=2, scale=16.0)
    ),
    "deepseek2_dense": dataclasses.replace(DEEPSEEK2, moe=None, tied_embeddings=True),
    "deepseek2_unequal_mscale": dataclasses.replace(
        DEEPSEEK2, rope=dataclasses.replace(DEEPSEEK2.rope, mscale=0.5, mscale_all_dim=1.5)
    ),
    "deepseek3_plain_queries": dataclasses.replace(DEEPSEEK3, mla=dataclasses.replace(MLA3, q_rank=None)),
    "deepseek3_biases": dataclasses.replace(DEEPSEEK3, qkv_bias=True, attention_out_bias=True),
    "deepseek3_large_values": dataclasses.replace(DEEPSEEK3, mla=dataclasses.replace(MLA3, value_dim=40)),
    "deepseek3_unnormed": dataclasses.replace(DEEPSEEK3, moe=dataclasses.replace(MOE3, normalize=False)),
    "deepseek3_other_eps": dataclasses.replace(DEEPSEEK3, norm_eps=1e-2, rope=RopeConfig()),
}
ROPES = {
    "theta": RopeConfig(500000.0),
    "linear": RopeConfig(scaling="linear", factor=4.0, original_max_seq_len=512),
    "dynamic": RopeConfig(scaling="dynamic", factor=2.0, original_max_seq_len=128),
    "yarn": RopeConfig(scaling="yarn", factor=8.0, original_max_seq_len=64),
    "llama3": RopeConfig(500000.0, scaling="llama3", factor=8.0, original_max_seq_len=64),
}


def save_theirs(cfg: ModelConfig, folder: Path) -> Any:
    """A transformers model of random weights, norms and biases included, saved to `folder`."""
    keys = FAMILIES[cfg.family].to_hf_config(cfg)
    del keys["architectures"]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(keys.pop("model_type"), **keys)).eval()
    draw = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, param in model.named_parameters():
            centre = 1.0 if "norm" in name else 0.0
            param.copy_(centre + 0.1 * torch.randn(param.shape, generator=draw))
        for name, buffer in model.named_buffers():
            if name.endswith("correction_bias"):
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=draw))
    model.save_pretrained(folder)
    return model


def load_ours(folder: Path, cfg: ModelConfig, runtime: Runtime) -> Decoder:
    assert dataclasses.replace(config_from_hf_folder(folder), init_std=cfg.init_std) == cfg
    source = Source(open_hf(folder), cfg)
    source.check()
    model = build(cfg, SINGLE, runtime)
    materialise(model, source, WHOLE, torch.device("cpu"))
    return model


def alone(model: Decoder, tokens: torch.Tensor) -> torch.Tensor:
    length = len(tokens)
    logits = model(tokens, torch.arange(length), [0, length], length, output="head")
    assert isinstance(logits, torch.Tensor)
    return logits


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("option", OPTIONS)
def test_logits(tmp_path: Path, option: str, attention: Any) -> None:
    """1e-5 absolute, logits of order one."""
    cfg = OPTIONS[option]
    theirs = save_theirs(cfg, tmp_path)
    ours = load_ours(tmp_path, cfg, Runtime(attention=attention))
    tokens = torch.randint(0, cfg.vocab_size, (100,), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = theirs(tokens[None]).logits[0]
        assert 1 < expected.abs().max() < 10
        torch.testing.assert_close(alone(ours, tokens), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", [LLAMA, QWEN2, QWEN3, DEEPSEEK2, DEEPSEEK3], ids=lambda cfg: cfg.family)
@pytest.mark.parametrize("rope", ROPES)
def test_rope_scalings_at_short_and_long_positions(tmp_path: Path, rope: str, family: ModelConfig) -> None:
    """1e-5; 50 tokens lie within the trained length of every scaling, 400 past that of most."""
    cfg = dataclasses.replace(family, rope=ROPES[rope], max_seq_len=128 if rope == "dynamic" else 512)
    theirs = save_theirs(cfg, tmp_path)
    ours = load_ours(tmp_path, cfg, Runtime())
    tokens = torch.randint(0, cfg.vocab_size, (400,), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        for length in (50, 400):
            expected = theirs(tokens[None, :length]).logits[0]
            torch.testing.assert_close(alone(ours, tokens[:length]), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("option", TINY)
def test_packed_documents_equal_theirs_one_by_one(tmp_path: Path, option: str) -> None:
    """1e-5; transformers sees each document alone, the decoder all in one row."""
    cfg = OPTIONS[option]
    theirs = save_theirs(cfg, tmp_path)
    ours = load_ours(tmp_path, cfg, Runtime())
    lengths = [40, 1, 90, 90, 17]
    documents = [torch.randint(0, cfg.vocab_size, (n,), generator=torch.Generator().manual_seed(n)) for n in lengths]
    borders = [0, 40, 41, 131, 221, 238]
    positions = torch.cat([torch.arange(n) for n in lengths])
    with torch.no_grad():
        packed = ours(torch.cat(documents), positions, borders, 90, output="head")
        for part, document in zip(packed.split(lengths), documents, strict=True):
            torch.testing.assert_close(part, theirs(document[None]).logits[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("option", [*TINY, "llama_tied", "llama_biases", "deepseek2_groups", "deepseek3_biases"])
def test_gradients(tmp_path: Path, option: str, recompute: Any) -> None:
    """Each gradient within 1e-5 of its largest value; theirs come through the same weight rules."""
    cfg = OPTIONS[option]
    theirs = save_theirs(cfg, tmp_path)
    ours = load_ours(tmp_path, cfg, Runtime(recompute=recompute, loss_chunk=32))
    tokens = torch.randint(0, cfg.vocab_size, (81,), generator=torch.Generator().manual_seed(2))
    targets = tokens[1:].clone()
    targets[:10] = -100
    logits = theirs(tokens[None, :-1]).logits[0]
    expected = torch.nn.functional.cross_entropy(logits, targets)
    expected.backward()
    loss, _ = ours(tokens[:-1], torch.arange(80), [0, 80], 80, targets, 1.0 / 70)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    with torch.no_grad():  # their gradients cross in the place of their weights
        for theirs_param in theirs.parameters():
            theirs_param.copy_(torch.zeros_like(theirs_param) if theirs_param.grad is None else theirs_param.grad)
    theirs.save_pretrained(tmp_path / "gradients")
    grads = Source(open_hf(tmp_path / "gradients"), cfg)
    for name, param in ours.named_parameters():
        want = grads.tensor(name)
        assert param.grad is not None
        torch.testing.assert_close(param.grad, want, rtol=0, atol=1e-5 * want.abs().max().item(), msg=name)
