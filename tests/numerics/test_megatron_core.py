"""Megatron-core itself loads what we write, rank by rank and strictly, and gives transformers' logits.

2e-4 absolute, on logits of standard deviation above 1: noise is far below (1e-5), every planted fault far above.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from convert.copying import converted, copy
from convert.from_hf import open_hf
from convert.megatron.args import to_args
from convert.megatron.layout import Layout, problems
from convert.megatron.writing import begin_torch
from models import ModelConfig, RopeConfig
from models.text_families import TEXT_FAMILIES
from scripts.params import load_model
from tests import megatron_cases
from tests.megatron_cases import Sizes
from tests.pool import Pool

TOLERANCE = 2e-4
TOKENS_BT = torch.randint(0, 1 << 20, (2, 24), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module", autouse=True)
def megatron() -> None:
    """Megatron-core is there: these tests fail without it, they are not left out."""
    if missing := megatron_cases.what_is_missing():
        pytest.fail(missing, pytrace=False)


def tiny(name: str, **fields: Any) -> ModelConfig:
    """Four layers and a vocabulary that needs padding; `moe__x` and `mla__x` are fields of the experts and latents."""
    cfg = load_model(f"tiny_{name}", [])
    inner: dict[str, dict[str, Any]] = {"moe": {}, "mla": {}}
    for key in list(fields):
        group, _, field = key.partition("__")
        if field:
            inner[group][field] = fields.pop(key)
    fields |= {group: dataclasses.replace(getattr(cfg, group), **values) for group, values in inner.items() if values}
    plain = {"num_layers": 4, "vocab_size": 500, "sliding_window": None, "full_attention_layers": 0}
    return dataclasses.replace(cfg, **plain | fields)


LLAMA3 = RopeConfig(500000.0, scaling="llama3", factor=8.0, original_max_seq_len=8192)
ALL_BIASES = {"qkv_bias": True, "attention_out_bias": True, "mlp_bias": True}
LOCAL: dict[str, Any] = {"implementation": "local", "experts": "sequential"}
CASES: dict[str, tuple[ModelConfig, Layout]] = {
    "llama_tp2_pp2": (tiny("llama", num_heads=8, num_kv_heads=4), Layout(tp=2, pp=2, **LOCAL)),
    "llama_all_biases_tp4": (tiny("llama", num_heads=8, num_kv_heads=8, **ALL_BIASES), Layout(tp=4)),
    "llama_attention_biases_tp2_pp2": (
        tiny("llama", qkv_bias=True, attention_out_bias=True), Layout(tp=2, pp=2)),
    "llama_mlp_biases_tp2_pp2": (tiny("llama", mlp_bias=True), Layout(tp=2, pp=2, **LOCAL)),
    "llama_9_heads_3_groups_tied_pp4": (
        tiny("llama", num_heads=9, num_kv_heads=3, head_dim=8, hidden_size=72, tied_embeddings=True),
        Layout(pp=4, vocab_multiple=1)),
    "llama3_8_heads_2_groups_tp4": (tiny("llama", num_heads=8, num_kv_heads=2, rope=LLAMA3), Layout(tp=4)),
    "llama_1_group_tp2_vpp2_uneven": (
        tiny("llama", num_kv_heads=1, num_layers=5), Layout(tp=2, pp=2, vpp=2, layers=(1, 2, 1, 1), **LOCAL)),
    "llama_linear_rope_empty_chunk": (
        tiny("llama", rope=RopeConfig(scaling="linear", factor=4.0, original_max_seq_len=512)),
        Layout(pp=4, layers=(2, 0, 1, 1))),
    "llama_tied_pp2_vpp2": (tiny("llama", tied_embeddings=True), Layout(tp=2, pp=2, vpp=2)),
    "qwen2_windows_pp2": (
        tiny("qwen2", sliding_window=7, full_attention_layers=1), Layout(tp=2, pp=2, **LOCAL)),
    "qwen2_tied_tp2_uneven": (tiny("qwen2"), Layout(tp=2, pp=2, layers=(1, 3))),
    "qwen2_tied_tp2": (tiny("qwen2"), Layout(tp=2, **LOCAL)),
    "qwen3_vpp2": (tiny("qwen3"), Layout(tp=2, pp=2, vpp=2)),
    "qwen3_yarn_pp2": (
        tiny("qwen3", rope=RopeConfig(scaling="yarn", factor=8.0, original_max_seq_len=64)), Layout(tp=2, pp=2)),
    "mixtral_window_pp4": (tiny("mixtral", sliding_window=7), Layout(pp=4)),
    "mixtral_tp2_ep2": (tiny("mixtral"), Layout(tp=2, ep=2, **LOCAL)),
    "qwen2_moe_pp2_ep2": (tiny("qwen2_moe"), Layout(pp=2, ep=2)),
    "qwen2_moe_normalized_tp4": (
        tiny("qwen2_moe", num_heads=8, moe__normalize=True, moe__first_dense=0), Layout(tp=4, **LOCAL)),
    "qwen3_moe_ep4": (tiny("qwen3_moe", moe__first_dense=1), Layout(ep=4)),
    "qwen3_moe_unnormalized_pp2_vpp2": (tiny("qwen3_moe", moe__normalize=False), Layout(pp=2, vpp=2, ep=2, **LOCAL)),
    "deepseek_v2_tp2_pp2": (tiny("deepseek_v2"), Layout(tp=2, pp=2, **LOCAL)),
    "deepseek_v2_query_latent_ep2": (
        tiny("deepseek_v2", mla__q_rank=24, moe__groups=4, moe__groups_kept=3, moe__scale=16.0), Layout(tp=2, ep=2)),
    "deepseek_v3_tp2_ep2": (tiny("deepseek_v3"), Layout(tp=2, ep=2)),
    "deepseek_v3_plain_queries_pp2_ep2": (
        tiny("deepseek_v3", mla__q_rank=None, mla__value_dim=40), Layout(pp=2, ep=2, layers=(3, 1), **LOCAL)),
}  # fmt: skip


def hf_model(cfg: ModelConfig) -> Any:
    """A transformers model of random weights, norms and biases included."""
    keys = TEXT_FAMILIES[cfg.family].to_hf_config(cfg)
    del keys["architectures"]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(keys.pop("model_type"), **keys)).eval()
    draw = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_((1.0 if "norm" in name else 0.0) + 0.2 * torch.randn(param.shape, generator=draw))
        for name, buffer in model.named_buffers():
            if name.endswith("correction_bias"):
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=draw))
    return model


def write_both(cfg: ModelConfig, layout: Layout, folder: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A Hugging Face folder in `folder`/hf, converted into `folder`/megatron; transformers' logits of TOKENS_BT."""
    model = hf_model(cfg)
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(param.to(dtype))
    model.save_pretrained(folder / "hf")
    opened = open_hf(folder / "hf")
    assert dataclasses.replace(opened.cfg, init_std=cfg.init_std) == cfg
    exact = {name for name in opened.tensors.metas if name.endswith("correction_bias")}
    metas = converted(opened.tensors.metas, dtype, exact)
    sink = begin_torch(folder / "megatron", cfg, layout, metas, to_args(cfg, layout, dtype))
    copy(opened.tensors, sink)
    with torch.no_grad():
        return model(TOKENS_BT % cfg.vocab_size).logits


def difference(pool: Callable[[int], Pool], cfg: ModelConfig, layout: Layout, folder: Path, expected: Any) -> float:
    """How far Megatron's logits are from `expected` at most, on any rank that has logits."""
    sizes = Sizes(layout.tp, layout.pp, layout.vpp, layout.ep)
    tokens_BT = TOKENS_BT % cfg.vocab_size
    answers = pool(4).run(megatron_cases.loaded_logits, str(folder / "megatron"), sizes, tokens_BT)
    found = [logits for logits in answers if logits is not None]
    assert len(found) == 4 // layout.pp
    for logits in found:
        assert logits.shape[-1] == layout.padded_vocab(cfg.vocab_size)
        assert not logits[..., cfg.vocab_size :].any(), "rows of the padding are not zero"
    return max(float((logits[..., : cfg.vocab_size] - expected).abs().max()) for logits in found)


@pytest.mark.parametrize("case", CASES)
def test_logits(pool: Callable[[int], Pool], tmp_path: Path, case: str) -> None:
    cfg, layout = CASES[case]
    assert not problems(layout, cfg)
    expected = write_both(cfg, layout, tmp_path)
    assert expected.std() > 1
    assert difference(pool, cfg, layout, tmp_path, expected) < TOLERANCE


def test_bf16_but_for_the_routers_bias(pool: Callable[[int], Pool], tmp_path: Path) -> None:
    """The model is as exact as in fp32 where its weights are bf16 numbers; the bias for choosing experts is not one."""
    cfg, layout = CASES["deepseek_v3_tp2_ep2"]
    expected = write_both(cfg, layout, tmp_path, torch.bfloat16)
    assert difference(pool, cfg, layout, tmp_path, expected) < TOLERANCE
    for _, state in rank_files(tmp_path / "megatron"):
        for name, tensor in state["model"].items():
            assert tensor.dtype == (torch.float32 if name.endswith("expert_bias") else torch.bfloat16), name
        assert state["args"].params_dtype == torch.bfloat16


def test_every_family_axis_and_naming_is_among_the_cases() -> None:
    layouts = [layout for _, layout in CASES.values()]
    assert {cfg.family for cfg, _ in CASES.values()} == set(TEXT_FAMILIES)
    assert all(any(getattr(layout, axis) > 1 for layout in layouts) for axis in ("tp", "pp", "vpp", "ep"))
    for family in TEXT_FAMILIES:
        of_family = [layout for cfg, layout in CASES.values() if cfg.family == family]
        assert any(layout.tp * layout.ep > 1 for layout in of_family)
        assert any(layout.pp > 1 for layout in of_family) or family == "mixtral"
    for axis in ("tp", "pp", "ep"):
        for implementation in ("local", "transformer_engine"):
            assert any(getattr(each, axis) > 1 and each.implementation == implementation for each in layouts)
    assert any(layout.tp > cfg.num_kv_heads for cfg, layout in CASES.values())
    assert any(cfg.tied_embeddings and layout.pp > 1 for cfg, layout in CASES.values())
    assert any(layout.layers for layout in layouts)


States = dict[str, dict[str, Any]]
"""For each rank's folder the content of its file."""


def rank_files(root: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Each rank's file with its content."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        for file in sorted(root.glob("release/*/model_optim_rng.pt")):
            yield file, torch.load(file, weights_only=True)


def edited(root: Path, edit: Callable[[States], None]) -> None:
    """Change the files of a checkpoint."""
    files = dict(rank_files(root))
    edit({file.parent.name: state for file, state in files.items()})
    for file, state in files.items():
        torch.save(state, file)


def each_tensor(states: States, *parts: str) -> Iterator[tuple[dict[str, torch.Tensor], str]]:
    found = 0
    for state in states.values():
        for key in [key for key in state if key.startswith("model")]:
            for name in [name for name in state[key] if any(part in name for part in parts)]:
                found += 1
                yield state[key], name
    assert found


def heads_not_interleaved(states: States) -> None:
    """All query rows of a rank, then all key rows, then all value rows: right for no grouped model."""
    for state, name in each_tensor(states, "linear_qkv.weight"):
        fused = state[name].view(-1, 4, 16, 64)  # groups of a rank, 2 queries + key + value, head size, hidden
        state[name] = torch.cat([fused[:, :2].flatten(0, 2), fused[:, 2].flatten(0, 1), fused[:, 3].flatten(0, 1)])


def gate_up_cut_as_one(states: States) -> None:
    """Rank 0 holds the gate and rank 1 the up projection."""
    for state, name in each_tensor(
        {"": states["mp_rank_00_000"]} | {"1": states["mp_rank_00_001"]}, "linear_fc1.weight"
    ):
        stage = "000" if state is states["mp_rank_00_000"]["model"] else "001"
        other = states[f"mp_rank_01_{stage}"]["model"]
        halves = [part.chunk(2) for part in (state[name], other[name])]
        state[name], other[name] = (torch.cat([half[i] for half in halves]) for i in range(2))


def stale_tied_copy(states: States) -> None:
    """The last stage's copy is that of another moment of training."""
    for state, name in each_tensor(states, "output_layer.weight"):
        state[name] = state[name] * 0.9


def no_tied_copy(states: States) -> None:
    for state, name in each_tensor(states, "output_layer.weight"):
        del state[name]


def no_expert_bias(states: States) -> None:
    for state, name in each_tensor(states, "expert_bias"):
        del state[name]


def zero_expert_bias(states: States) -> None:
    for state, name in each_tensor(states, "expert_bias"):
        state[name] = torch.zeros_like(state[name])


def experts_on_the_wrong_rank(states: States) -> None:
    names = sorted(states)
    assert names == ["mp_rank_00_000", "mp_rank_00_001", "mp_rank_01_000", "mp_rank_01_001"]
    for tp in ("mp_rank_00", "mp_rank_01"):
        one, two = (states[f"{tp}_{ep:03d}"]["model"] for ep in range(2))
        for _, name in each_tensor({"": {"model": dict(one)}}, ".experts."):
            one[name], two[name] = two[name], one[name]


def layers_in_the_wrong_order(states: States) -> None:
    """Chunks of a stage one after another instead of interleaved."""
    for stage in ("000", "001"):
        for tp in ("00", "01"):
            state = states[f"mp_rank_{tp}_{stage}"]
            other = states[f"mp_rank_{tp}_001"]
            for name in [name for name in state["model1"] if name.startswith("decoder.layers.")]:
                if stage == "000":
                    state["model1"][name], other["model0"][name] = other["model0"][name], state["model1"][name]


def llama3_scaling_forgotten(states: States) -> None:
    for state in states.values():
        state["args"].use_rope_scaling = False


def yarn_without_its_factor_on_scores(states: States) -> None:
    for state in states.values():
        state["args"].mscale = 0.0


def window_one_too_wide(states: States) -> None:
    """Megatron does not count the query itself, transformers does."""
    for state in states.values():
        left, right = state["args"].window_size
        state["args"].window_size = left + 1, right


def weights_of_all_experts_not_of_the_chosen(states: States) -> None:
    for state in states.values():
        state["args"].moe_router_pre_softmax = True


FAULTS: dict[Callable[[States], None], tuple[str, str]] = {
    heads_not_interleaved: ("llama_tp2_pp2", ""),
    gate_up_cut_as_one: ("llama_tp2_pp2", ""),
    stale_tied_copy: ("qwen2_tied_tp2_uneven", ""),
    no_tied_copy: ("qwen2_tied_tp2_uneven", "output_layer.weight"),
    no_expert_bias: ("deepseek_v3_tp2_ep2", "mlp.router.expert_bias"),
    zero_expert_bias: ("deepseek_v3_tp2_ep2", ""),
    experts_on_the_wrong_rank: ("mixtral_tp2_ep2", ""),
    layers_in_the_wrong_order: ("qwen3_vpp2", ""),
    llama3_scaling_forgotten: ("llama3_8_heads_2_groups_tp4", ""),
    yarn_without_its_factor_on_scores: ("qwen3_yarn_pp2", ""),
    window_one_too_wide: ("mixtral_window_pp4", ""),
    weights_of_all_experts_not_of_the_chosen: ("mixtral_tp2_ep2", ""),
}
"""What is done wrong: to which case, and the name that Megatron then misses (none: it loads, and the logits differ)."""


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_wrong_layout_is_seen(pool: Callable[[int], Pool], tmp_path: Path, fault: Callable[[States], None]) -> None:
    case, missed = FAULTS[fault]
    cfg, layout = CASES[case]
    expected = write_both(cfg, layout, tmp_path)
    edited(tmp_path / "megatron", fault)
    if missed:
        with pytest.raises(AssertionError, match=rf'Missing key\(s\) in state_dict: ".*{missed}"'):
            difference(pool, cfg, layout, tmp_path, expected)
    else:
        assert difference(pool, cfg, layout, tmp_path, expected) > 100 * TOLERANCE
