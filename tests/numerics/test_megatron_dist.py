"""Megatron-core itself loads and saves `torch_dist` checkpoints: every weight bit for bit, and transformers' logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from convert.copying import copy
from convert.from_hf import open_hf
from convert.megatron.args import to_args
from convert.megatron.dist import begin_dist, open_dist
from convert.megatron.layout import Layout, Rank
from models import FAMILIES, ModelConfig
from scripts.params import load_model
from tests import dist_cases, megatron_cases
from tests.megatron_cases import Sizes
from tests.megatron_shards import Memory, States, cut_up, hf_shapes, put_together
from tests.pool import Pool

TOLERANCE = 2e-4
"""On logits of standard deviation above 1; noise is below 1e-5."""


@pytest.fixture(scope="module", autouse=True)
def megatron() -> None:
    """Megatron-core is there: these tests fail without it, they are not left out."""
    if missing := megatron_cases.what_is_missing():
        pytest.fail(missing, pytrace=False)


def tiny(name: str, **fields: Any) -> ModelConfig:
    plain = {"num_layers": 4, "vocab_size": 500, "sliding_window": None, "full_attention_layers": 0}
    return dataclasses.replace(load_model(f"tiny_{name}", []), **plain | fields)


def random_weights(cfg: ModelConfig) -> Memory:
    draw = torch.Generator().manual_seed(5)
    return Memory({name: torch.randn(shape, generator=draw) for name, shape in hf_shapes(cfg).items()})


def write(source: Memory, cfg: ModelConfig, layout: Layout, root: Path) -> None:
    copy(source, begin_dist(root, cfg, layout, source.metas, to_args(cfg, layout, torch.float32)), workers=2)


LOCAL: dict[str, Any] = {"implementation": "local", "experts": "sequential"}
CASES: dict[str, tuple[ModelConfig, Layout, Sizes]] = {
    "dense_whole_into_tp2_pp2": (tiny("llama"), Layout(**LOCAL), Sizes(tp=2, pp=2)),
    "dense_tp4_into_tp1": (tiny("qwen2"), Layout(tp=2, pp=2, **LOCAL), Sizes()),
    "tied_into_pp4": (tiny("llama", tied_embeddings=True, vocab_size=512), Layout(tp=2, **LOCAL), Sizes(pp=4)),
    "heads_into_tp2_vpp2": (tiny("qwen3"), Layout(tp=4, **LOCAL), Sizes(tp=2, pp=2, vpp=2)),
    "experts_into_tp2_ep2": (tiny("mixtral"), Layout(**LOCAL), Sizes(tp=2, ep=2)),
    "shared_experts_into_pp2_ep2": (tiny("qwen2_moe"), Layout(tp=2, **LOCAL), Sizes(pp=2, ep=2)),
    "latent_first_dense_into_tp2_ep2": (tiny("deepseek_v3"), Layout(pp=2, **LOCAL), Sizes(tp=2, ep=2)),
    "latent_whole_queries_into_tp2_pp2": (tiny("deepseek_v2"), Layout(tp=2, ep=2, **LOCAL), Sizes(tp=2, pp=2)),
}
"""A model, the layout it is written for, and the one Megatron loads it at."""


@pytest.mark.parametrize("case", CASES)
def test_megatron_loads_every_weight(pool: Callable[[int], Pool], tmp_path: Path, case: str) -> None:
    cfg, layout, sizes = CASES[case]
    source = random_weights(cfg)
    write(source, cfg, layout, tmp_path)
    answers = pool(4).run(dist_cases.loaded, str(tmp_path), sizes, None)
    expected = rank_tensors(source, cfg, layout, sizes)
    for number, (chunks, _) in enumerate(answers):
        rank = Rank(number % sizes.tp, number * sizes.pp // 4, number // sizes.tp % sizes.ep)
        for found, whole in zip(chunks, expected[rank], strict=True):
            assert found.keys() == whole.keys()
            for name, tensor in found.items():
                assert torch.equal(tensor, whole[name]), name


def rank_tensors(source: Memory, cfg: ModelConfig, layout: Layout, sizes: Sizes) -> States:
    """What Megatron's models of these sizes hold, the vocabulary as it was padded for another layout."""
    padded = layout.padded_vocab(cfg.vocab_size)
    here = dataclasses.replace(
        layout, tp=sizes.tp, pp=sizes.pp, vpp=sizes.vpp, ep=sizes.ep, vocab_multiple=padded // sizes.tp
    )
    return cut_up(source, cfg, here)[0]


@pytest.mark.parametrize("case", [name for name, (_, _, sizes) in CASES.items() if sizes.tp == 2])
def test_what_megatron_saves_is_read(pool: Callable[[int], Pool], tmp_path: Path, case: str) -> None:
    cfg, layout, sizes = CASES[case]
    source = random_weights(cfg)
    write(source, cfg, layout, tmp_path / "ours")
    pool(4).run(dist_cases.saved, str(tmp_path / "ours"), str(tmp_path / "theirs"), sizes)
    opened = open_dist(tmp_path / "theirs")
    assert opened.format == "torch_dist" and opened.cfg == cfg
    assert opened.layout is not None
    assert (opened.layout.tp, opened.layout.pp, opened.layout.vpp) == (sizes.tp, sizes.pp, sizes.vpp)
    found = put_together(opened.tensors)
    assert found.keys() == source.tensors.keys()
    for name, tensor in source.tensors.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(
    ("family", "layout", "sizes"),
    [
        ("llama", Layout(tp=2), Sizes(tp=2, pp=2)),
        ("qwen3_moe", Layout(), Sizes(tp=2, ep=2)),
        ("deepseek_v3", Layout(tp=2), Sizes(pp=2, ep=2)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_logits_under_the_names_of_transformer_engine(
    pool: Callable[[int], Pool], tmp_path: Path, family: str, layout: Layout, sizes: Sizes
) -> None:
    cfg = tiny(family)
    keys = FAMILIES[family].to_hf_config(cfg)
    del keys["architectures"]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(keys.pop("model_type"), **keys)).eval()
    draw = torch.Generator().manual_seed(11)
    model.load_state_dict({
        name: (1.0 if "norm" in name else 0.0) + 0.2 * torch.randn(tensor.shape, generator=draw)
        for name, tensor in model.state_dict().items()
    })  # fmt: skip
    model.save_pretrained(tmp_path / "hf")
    opened = open_hf(tmp_path / "hf")
    args = to_args(cfg, layout, torch.float32)
    copy(opened.tensors, begin_dist(tmp_path / "megatron", cfg, layout, opened.tensors.metas, args))
    tokens_BT = torch.randint(0, cfg.vocab_size, (2, 24), generator=draw)
    with torch.no_grad():
        expected = model(tokens_BT).logits
    assert expected.std() > 1
    answers = pool(4).run(dist_cases.loaded, str(tmp_path / "megatron"), sizes, tokens_BT)
    found = [logits for _, logits in answers if logits is not None]
    assert len(found) == 4 // sizes.pp
    for logits in found:
        assert (logits[..., : cfg.vocab_size] - expected).abs().max() < TOLERANCE
