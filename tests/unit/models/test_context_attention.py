"""Attention over documents that several ranks share, against every score written out in float64 in one process."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from models.blocks.attention import Heads
from models.config import RopeConfig
from parallel.config import ParallelConfig
from tests import cp_cases
from tests.cases import distance, relative
from tests.pool import Pool

Pools = Callable[[int], Pool]


def joined(parts: list[Any], tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Result and gradient of all tokens, each from the one rank that has it."""
    place = torch.cat([part[0] for part in parts])
    assert torch.equal(place.sort().values, torch.arange(tokens))
    order = place.argsort()
    return torch.cat([part[1] for part in parts])[order], torch.cat([part[2] for part in parts])[order]


def check(pool: Pools, cp: int, kind: Any, pack: str, heads: Heads, most: float = 1e-6, **how: Any) -> None:
    borders = cp_cases.PACKS[pack]
    wanted = cp_cases.reference(borders, heads)
    found = joined(pool(cp).run(cp_cases.attend, cp, kind, borders, heads, **how), borders[-1])
    for want, got in zip(wanted, found, strict=True):
        assert float((got - want).abs().max() / want.abs().max().clamp_min(1e-3)) <= most


@pytest.mark.parametrize("pack", cp_cases.PACKS)
@pytest.mark.parametrize("cp", [2, 3, 4])
@pytest.mark.parametrize("kind", ["ulysses", "ring"])
def test_equals_one_process(pool: Pools, kind: Any, cp: int, pack: str) -> None:
    """Forward and all gradients, 1e-6 of the largest value; 12 heads that share 3, 2 or 6 keys."""
    for groups in {2: (2, 1), 3: (3, 1), 4: (2, 4)}[cp]:
        check(pool, cp, kind, pack, Heads(12, groups, 8, None))


@pytest.mark.parametrize("window", [1, 6, 40, 290, 1000])
@pytest.mark.parametrize("cp", [2, 3])
@pytest.mark.parametrize("kind", ["ulysses", "ring"])
def test_sliding_windows(pool: Pools, kind: Any, cp: int, window: int) -> None:
    check(pool, cp, kind, "uneven", Heads(6, 3 if cp == 3 else 2, 8, window))


@pytest.mark.parametrize("kind", ["ulysses"])
def test_eager_under_ulysses(pool: Pools, kind: Any) -> None:
    check(pool, 2, kind, "uneven", Heads(4, 2, 8, None), back_end="eager")


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 3e-6), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("kind", ["ulysses", "ring"])
def test_lower_precision(pool: Pools, kind: Any, dtype: torch.dtype, most: float) -> None:
    """fp32 3e-6 (one process and torch's kernel alone differ by 1.3e-6 here), bf16 3e-2."""
    check(pool, 3, kind, "uneven", Heads(6, 3, 8, None), most, dtype=dtype)


DYNAMIC = RopeConfig(scaling="dynamic", factor=2.0, original_max_seq_len=16)
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "dynamic rope": {"rope": DYNAMIC},
    "qk norm": {"qk_norm": True, "tied_embeddings": True},
    "windows": {"family": "qwen2", "sliding_window": 5, "full_attention_layers": 1},
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("cp", [2, 4])
@pytest.mark.parametrize("kind", ["ulysses", "ring"])
def test_decoder_equals_one_process(pool: Pools, kind: Any, cp: int, model: str) -> None:
    """Loss, its sums by channel also in evaluation, the count of targets and every gradient: 1e-5, layers remade."""
    want = cp_cases.decode(1, kind, MODELS[model])
    for got in pool(cp).run(cp_cases.decode, cp, kind, MODELS[model], "full"):
        assert got["count"] == want["count"]
        assert relative([float(want["loss"])], [float(got["loss"])]) <= 1e-5
        for key in ("sums", "evaluated"):
            torch.testing.assert_close(got[key], want[key], rtol=1e-5, atol=0)
        assert distance(want["grads"], got["grads"]) <= 1e-5


LAYOUTS = [
    (2, 0, ParallelConfig(cp=2)),
    (4, 1, ParallelConfig(cp=2, context="ulysses")),
    (4, 1, ParallelConfig(cp=2)),
    (2, 3, ParallelConfig(cp=2)),
    (4, 1, ParallelConfig(cp=2, tp=2, sequence_parallel=True)),
    (4, 1, ParallelConfig(cp=2, tp=2, sequence_parallel=True, context="ulysses")),
]


@pytest.mark.parametrize(("processes", "zero", "layout"), LAYOUTS)
def test_training_equals_one_process(pool: Pools, processes: int, zero: int, layout: ParallelConfig) -> None:
    """With dp=2 or tp=2 where there are four: three clipped steps on packs of down to one token, 1e-5 throughout."""
    want, *_ = pool(1).run(cp_cases.train, zero, ParallelConfig())
    for got in pool(processes).run(cp_cases.train, zero, layout):
        assert relative(want["norm"], got["norm"]) <= 1e-5
        for one, other in zip(want["metrics"], got["metrics"], strict=True):
            assert one.keys() == other.keys()
            assert [one[k] for k in one if k.endswith("tokens")] == [other[k] for k in other if k.endswith("tokens")]
            assert relative(list(one.values()), list(other.values())) <= 1e-5
        assert distance(want["grads"], got["grads"]) <= 1e-5
        assert distance(want["weights"], got["weights"]) <= 1e-5


HEADS = Heads(8, 2, 8, None)


def test_bytes_of_ulysses(pool: Pools) -> None:
    """Forward and backward each move, of T / cp rows, (cp - 1) / cp of 2 H + 2 max(G, cp) heads."""
    cp, tokens = 4, 96
    for sent in pool(cp).run(cp_cases.elements_sent, cp, "ulysses", (0, 50, tokens), HEADS):
        assert sent == {"all_to_all": 2 * tokens // cp * (cp - 1) // cp * (2 * 8 + 2 * cp) * 8, "send": 0}


def test_bytes_of_the_ring(pool: Pools) -> None:
    """Keys and values of T / cp rows go cp - 1 times round forward and backward, and their gradients once more."""
    cp, tokens = 4, 96
    for sent in pool(cp).run(cp_cases.elements_sent, cp, "ring", (0, tokens), HEADS):
        assert sent == {"all_to_all": 0, "send": 3 * (cp - 1) * tokens // cp * 2 * 2 * 8}
    for sent in pool(cp).run(cp_cases.elements_sent, cp, "ring", cp_cases.PACKS["equal"], HEADS):
        assert sent == {"all_to_all": 0, "send": 0}, "whole documents stay where they are"
