"""Adapters against `peft`: losses, every gradient, weights after steps, in one process; and the formats both ways."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from convert import merge_adapter
from convert.peft_files import read_peft, write_peft
from convert.to_hf import export
from models import ModelConfig
from models.adapters.config import Ia3Config, LoraConfig
from models.config import MoEConfig
from parallel.groups import ALL_DATA, Groups
from parallel.sharding import Axis
from tests import adapter_cases, peft_reference
from tests.cases import TINY, my_parts
from tests.pool import Pool

TOLERANCE = 1e-5
ONE = Groups(0, 1, torch.device("cpu"), Axis())
"""For the batches: in this process no group is joined, other tests count on that."""
MIXED = ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj")
MIXTRAL = dataclasses.replace(TINY, family="mixtral", moe=MoEConfig(num_experts=4, top_k=2, expert_size=48))
EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
QWEN = dataclasses.replace(TINY, family="qwen2", qkv_bias=True, tied_embeddings=True)


def lora(**about: Any) -> tuple[LoraConfig, Any]:
    """A kind of LoRA, ours and theirs."""
    from peft import LoraConfig as Theirs

    ours = LoraConfig(rank=4, alpha=6, **about)
    options = {"use_rslora": ours.rank_stabilized, "use_dora": ours.dora, "target_modules": list(ours.targets)}
    if "all-linear" in ours.targets:
        options["target_modules"] = "all-linear"
    elif ours.targets[-1] in EXPERTS:
        options["target_modules"] = [name for name in ours.targets if name not in EXPERTS]
        options["target_parameters"] = [name for name in ours.targets if name in EXPERTS]
    return ours, Theirs(r=4, lora_alpha=6, task_type="CAUSAL_LM", **options)


def ia3() -> tuple[Ia3Config, Any]:
    """IA3, ours and theirs."""
    from peft import IA3Config as Theirs

    names = ["k_proj", "v_proj", "down_proj"]
    return Ia3Config(), Theirs(target_modules=names, feedforward_modules=["down_proj"], task_type="CAUSAL_LM")


ROWS = [
    ("lora", TINY, lambda: lora()),
    ("lora on some, biases, tied", QWEN, lambda: lora(targets=MIXED)),
    ("rslora", TINY, lambda: lora(rank_stabilized=True)),
    ("lora on experts", MIXTRAL, lambda: lora(targets=("q_proj", *EXPERTS))),
    ("rslora on down of experts", MIXTRAL, lambda: lora(rank_stabilized=True, targets=EXPERTS[1:])),
    ("dora", TINY, lambda: lora(dora=True)),
    ("lora with dropout", TINY, lambda: lora(dropout=0.25)),
    ("dora with dropout, biases, tied", QWEN, lambda: lora(dropout=0.25, dora=True, targets=MIXED)),
    ("dora on some, biases, tied", QWEN, lambda: lora(dora=True, targets=MIXED)),
    ("ia3", TINY, ia3),
    ("ia3, biases, tied", QWEN, ia3),
]


@pytest.mark.parametrize(("cfg", "made"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_trains_as_peft_does(cfg: ModelConfig, made: Any, tmp_path: Path, pool: Callable[[int], Pool]) -> None:
    """From an adapter that peft saved; then peft loads the one that was trained here."""
    adapter, theirs = made()
    base = peft_reference.base_folder(cfg, tmp_path / "base")
    model = peft_reference.random_adapter(base, tmp_path / "start", theirs)
    steps = [my_parts(step, ONE, ALL_DATA, 8) for step in range(3)]
    plain = peft_reference.hf_model(base)
    without = [
        float(sum(peft_reference.losses_of(plain, batch) for batch in batches)) / sum(b.num_targets for b in batches)
        for batches in steps
    ]
    at = [peft_reference.drop_as_ours(model, cfg, adapter, 5)] if getattr(adapter, "dropout", 0) else []
    expected = peft_reference.train(model, steps, adapter_cases.LR, adapter_cases.EPS, *at)
    model.eval()
    found = pool(1).run(adapter_cases.train, cfg, adapter, start=str(tmp_path / "start"), zero=0)[0]
    assert found["losses"] == pytest.approx(expected["losses"], rel=TOLERANCE)
    assert found["off"] == pytest.approx(without, rel=1e-6)
    assert abs(found["off"][0] / found["losses"][0] - 1) > 1e-5
    for kind in ("grads", "weights"):
        ours = adapter_cases.gathered(found[kind], cfg, adapter)
        write_peft(tmp_path / kind, cfg, ours, str(base))
        other = peft_reference.adapted(base, tmp_path / kind, train=True)
        for name, param in other.named_parameters():
            if param.requires_grad:
                wanted = expected[kind][name]
                assert float((param - wanted).detach().abs().max() / wanted.abs().max()) < TOLERANCE, name
    batch = steps[0][0]
    both = [
        peft_reference.losses_of(each, batch) for each in (model, peft_reference.adapted(base, tmp_path / "weights"))
    ]
    assert float(both[0]) == pytest.approx(float(both[1]), rel=1e-6)
    folded = merge_adapter.opened(tmp_path / "weights", base)
    export(tmp_path / "folded", folded.cfg, folded.tensors)
    alone = peft_reference.losses_of(peft_reference.hf_model(tmp_path / "folded"), batch)
    assert float(alone) == pytest.approx(float(both[1]), rel=1e-6)
    assert read_peft(tmp_path / "weights", cfg).cfg.name == adapter.name
    assert found["frozen_gradients"] == 0


def test_pissa_is_that_of_peft(tmp_path: Path, pool: Callable[[int], Pool]) -> None:
    """Each layer's B A and the weight without it; trained, the export beside the base as it was is the same model."""
    from peft import LoraConfig as Theirs
    from peft import get_peft_model

    base = peft_reference.base_folder(TINY, tmp_path / "base")
    options: Any = {"init_lora_weights": "pissa", "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    model = get_peft_model(peft_reference.hf_model(base), Theirs(r=4, lora_alpha=6, **options))
    adapter = LoraConfig(rank=4, alpha=6, init="pissa")
    steps = [my_parts(step, ONE, ALL_DATA, 8) for step in range(3)]
    expected = peft_reference.train(model, steps, adapter_cases.LR, adapter_cases.EPS)
    found = pool(1).run(adapter_cases.train, TINY, adapter, zero=0)[0]
    assert found["losses"] == pytest.approx(expected["losses"], rel=TOLERANCE)
    assert found["off"][0] == pytest.approx(found["losses"][0], rel=1e-6)
    write_peft(tmp_path / "trained", TINY, adapter_cases.gathered(found["weights"], TINY, adapter), str(base))
    both = [model, peft_reference.adapted(base, tmp_path / "trained")]
    with torch.no_grad():
        theirs, ours = (float(peft_reference.losses_of(each, steps[0][0])) for each in both)
    assert ours == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize("kind", ["lora", "dora", "pissa"])
def test_a_base_in_four_bits_is_what_its_codes_mean(kind: str, tmp_path: Path, pool: Callable[[int], Pool]) -> None:
    """Trained beside packed weights, as peft beside the weights that bitsandbytes unpacks."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    from peft import get_peft_model

    cfg = dataclasses.replace(TINY, hidden_size=64, intermediate_size=128, head_dim=16)
    adapter, theirs = lora(base="nf4", dora=kind == "dora", targets=("q_proj", "down_proj"))
    base = peft_reference.base_folder(cfg, tmp_path / "base")
    if kind == "pissa":
        adapter, theirs.init_lora_weights = dataclasses.replace(adapter, init="pissa"), "pissa"
        model: Any = get_peft_model(peft_reference.hf_model(base), theirs)
    else:
        model = peft_reference.random_adapter(base, tmp_path / "start", theirs)
    for name, param in model.named_parameters():
        if "_proj." in name and "lora" not in name:
            codes = quantize_4bit(param.data, blocksize=64, quant_type="nf4", compress_statistics=False)
            param.data = dequantize_4bit(*codes)
    steps = [my_parts(step, ONE, ALL_DATA, 8) for step in range(2)]
    expected = peft_reference.train(model, steps, adapter_cases.LR, adapter_cases.EPS)
    start = None if kind == "pissa" else str(tmp_path / "start")
    found = pool(1).run(adapter_cases.train, cfg, adapter, start=start, zero=0, steps=2)[0]
    assert found["losses"] == pytest.approx(expected["losses"], rel=TOLERANCE)
    fresh = pool(1).run(adapter_cases.train, cfg, adapter, zero=0, steps=1)[0]
    assert fresh["losses"] == pytest.approx(fresh["off"], rel=1e-6)
    assert found["bytes"] < 0.6 * 4 * found["parameters"]  # embedding and head stay as they are
