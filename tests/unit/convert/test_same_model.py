"""Which fields make two models compute different things."""

import dataclasses
from typing import Any

import pytest

from convert.same_model import differing
from models import RopeConfig
from models.config import ModelConfig
from scripts.params import load_model

YARN = RopeConfig(scaling="yarn", factor=8.0)
QWEN = load_model("tiny_qwen2", [])
MOE = load_model("tiny_deepseek_v3", [])
assert MOE.moe is not None


def with_rope(cfg: ModelConfig, **values: Any) -> ModelConfig:
    return dataclasses.replace(cfg, rope=dataclasses.replace(YARN, **values))


def with_moe(**values: Any) -> ModelConfig:
    assert MOE.moe is not None
    return dataclasses.replace(MOE, moe=dataclasses.replace(MOE.moe, **values))


SAME = {
    "a length that goes without saying": (with_rope(QWEN), with_rope(QWEN, original_max_seq_len=QWEN.max_seq_len)),
    "a factor that goes without saying": (with_rope(QWEN), with_rope(QWEN, mscale=0.7)),
    "unused mscales": (with_rope(QWEN, mscale=1.0, mscale_all_dim=1.0), with_rope(QWEN, attention_factor=1.0)),
    "bounds of another scaling": (with_rope(QWEN), with_rope(QWEN, high_freq_factor=9.0)),
    "no window": (
        dataclasses.replace(QWEN, sliding_window=None, full_attention_layers=0),
        dataclasses.replace(QWEN, sliding_window=None, full_attention_layers=3),
    ),
    "training": (with_moe(bias_rate=0.1, balance_loss=0.1, z_loss=1.0), dataclasses.replace(MOE, init_std=1.0)),
    "one group": (with_moe(groups=1, groups_kept=1), with_moe(groups=1, groups_kept=1, group_score="max")),
}
OTHER = {
    "rope.original_max_seq_len": (with_rope(QWEN), with_rope(QWEN, original_max_seq_len=64)),
    "rope.attention_factor": (with_rope(QWEN), with_rope(QWEN, attention_factor=1.0)),
    "rope.mscale_all_dim": (with_rope(MOE, mscale=1.0, mscale_all_dim=1.0), with_rope(MOE, attention_factor=1.0)),
    "rope.truncate": (with_rope(QWEN), with_rope(QWEN, truncate=False)),
    "full_attention_layers": (QWEN, dataclasses.replace(QWEN, full_attention_layers=1)),
    "moe.groups_kept": (MOE, with_moe(groups_kept=4)),
    "head": (QWEN, dataclasses.replace(QWEN, head="scalar")),
}


@pytest.mark.parametrize("case", SAME)
def test_said_differently(case: str) -> None:
    a, b = SAME[case]
    assert a != b and differing(a, b) == []


@pytest.mark.parametrize("key", OTHER)
def test_another_computation(key: str) -> None:
    assert differing(*OTHER[key]) == [key]


def test_a_missing_section() -> None:
    assert {"moe.top_k", "moe.score"} <= set(differing(MOE, dataclasses.replace(MOE, moe=None)))
