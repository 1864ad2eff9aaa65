"""Vision towers alone and over tensor parallel ranks: recompute, tiles that do not see each other, blank blocks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from models.blocks.pieces import pieces_of
from models.vision.config import (
    ImageConfig,
    ProjectorConfig,
    VisionConfig,
)
from models.vision.eyes import build_eyes
from models.vision.tower_layers import Seen, self_attention, sequence_attention
from parallel.sharding import SINGLE, Cut, is_kept, is_partial, shard_of
from tests.pool import Pool
from tests.tower_cases import CASES, looked, looked_in_pool, patches_of, tower_of


@pytest.mark.parametrize("name", CASES)
def test_recompute_changes_no_bit(name: str) -> None:
    plain, again = (looked(CASES[name], SINGLE, recompute) for recompute in (False, True))
    assert torch.equal(plain["features"], again["features"])
    assert plain["grads"].keys() == again["grads"].keys()
    for key, grad in plain["grads"].items():
        assert torch.equal(grad, again["grads"][key]) if grad is not None else again["grads"][key] is None, key


@pytest.mark.parametrize("name", CASES)
def test_bf16_stays_near(name: str) -> None:
    """Under autocast features and gradients are within 5 % of the fp32 ones (in norm), rows between layers fp32."""
    plain = looked(CASES[name], SINGLE)
    with torch.autocast("cpu", torch.bfloat16):
        low = looked(CASES[name], SINGLE, recompute=True)
    normed = CASES[name].cfg.norms_features
    assert low["features"].dtype is (torch.bfloat16 if normed else torch.float32)
    for key, found in {**low["grads"], "features": low["features"]}.items():
        expected = plain["features"] if key == "features" else plain["grads"][key]
        if found is not None and expected.norm() > 1e-3:
            assert (found.float() - expected).norm() < 0.05 * expected.norm(), key


def test_attention_of_other_devices_equals_that_of_the_cpu() -> None:
    """Sequences of different lengths in runs: outputs and gradients to 1e-5."""
    heads, pieces = 2, pieces_of([0, 3, 6, 11, 12], None, torch.device("cpu"))
    qkv = torch.randn(12, 3 * heads * 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
    seed = torch.randn(12, heads * 8, generator=torch.Generator().manual_seed(2))
    found = []
    for out in (self_attention(qkv * 1.0, heads, Seen(pieces)), sequence_attention(qkv, heads, pieces)):
        found.append((out, torch.autograd.grad(out, qkv, seed)[0]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_what_is_not_run_is_frozen_and_saved(name: str) -> None:
    tower = tower_of(CASES[name], SINGLE)
    grads = looked(CASES[name], SINGLE)["grads"]
    kept = {key for key, param in tower.named_parameters() if is_kept(param)}
    assert kept == {key for key, grad in grads.items() if grad is None}
    runs = CASES[name].cfg.runs
    assert {key.split(".")[1] for key in kept if key.startswith("layers.")} == {str(i) for i in range(runs, 3)}


@pytest.mark.parametrize("name", ["clip", "siglip_normed", "qwen2_vl", "qwen2_5_vl"])
def test_a_tile_does_not_know_of_others(name: str) -> None:
    """Features of each tile alone, and of all together, differ by rounding only (1e-5)."""
    case = CASES[name]
    tower, patches_PX = tower_of(case, SINGLE), patches_of(case)
    with torch.no_grad():
        together = tower(patches_PX, case.grids)
        sizes = [high * wide for high, wide in case.grids]
        alone = [tower(x, (grid,)) for x, grid in zip(patches_PX.split(sizes), case.grids, strict=True)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_a_blank_block_runs_every_weight(name: str) -> None:
    """What a rank without a picture looks at: every weight that pictures train gets a gradient."""
    case = CASES[name]
    tower = tower_of(case, SINGLE)
    side = case.block
    blank_PX = torch.zeros(side * side, patches_of(case).shape[1])
    features = tower(blank_PX, ((side, side),))
    assert features.shape == (side * side + case.cfg.keep_class, case.cfg.hidden_size)
    (features.sum() * 0.0).backward()
    for key, param in tower.named_parameters():
        assert (param.grad is None) == is_kept(param), key
        assert param.grad is None or not param.grad.any(), key


def test_eyes_give_the_tower_the_side_of_the_connectors_blocks() -> None:
    case = CASES["qwen2_vl"]
    cfg = VisionConfig("loom", case.cfg, ProjectorConfig(), ImageConfig(mode="native"))
    with torch.device("meta"):
        one, _ = build_eyes(cfg, 24, SINGLE, False)
    assert one.block == 1 and not one.recompute  # pyright: ignore


@pytest.mark.parametrize("ranks", [2, 4])
def test_tensor_parallel_equals_one_process(pool: Callable[[int], Pool], ranks: int) -> None:
    """Features to 1e-5 of the largest on every rank; every gradient, after cutting, to 1e-5 of the largest."""
    names = list(CASES) if ranks == 2 else ["clip", "intern_6b", "qwen2_5_vl"]
    found = pool(ranks).run(looked_in_pool, names)
    for name in names:
        whole = looked(CASES[name], SINGLE)
        tower = tower_of(CASES[name], SINGLE)
        for rank in range(ranks):
            got = found[rank][name]
            _close(got["features"], whole["features"], f"{name}: features")
            for key, param in tower.named_parameters():
                grad, expected = got["grads"][key], whole["grads"][key]
                assert not is_partial(param) and (grad is None) == (expected is None), key
                if grad is not None:
                    own = shard_of(param).slice(expected, Cut(ranks, rank))
                    _close(grad, own, f"{name}: {key}", expected.abs().max().item())


def _close(found: torch.Tensor, expected: torch.Tensor, what: str, scale: float | None = None) -> None:
    scale = expected.abs().max().item() if scale is None else scale
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * scale, msg=lambda m: f"{what}: {m}")
