"""The engine from the outside, at every ZeRO stage on two processes; references are plain torch or worked by hand."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

from models import build
from models.init import InitSource
from parallel.groups import Groups
from parallel.materialise import materialise
from parallel.sharding import WHOLE, Axis
from tests import cases, engine_cases

ALONE = Groups(0, 1, torch.device("cpu"), Axis())
ZERO = pytest.mark.parametrize("zero", [0, 1, 2, 3])


def plain(batches: list) -> tuple[dict[str, torch.Tensor], float, float]:
    """Gradient, its norm and the mean loss of these micro-batches as one batch, by torch alone."""
    model = build(cases.TINY)
    materialise(model, InitSource(cases.TINY, seed=3), WHOLE, torch.device("cpu"))
    total = torch.zeros((), dtype=torch.float64)
    count = sum(batch.num_targets for batch in batches)
    for batch in batches:
        logits = model(batch.tokens_T, batch.positions_T, batch.cu_seqlens, output="head")
        total = total + torch.nn.functional.cross_entropy(logits.double(), batch.targets_T, reduction="sum")
    (total / count).backward()
    grads = {name: p.grad.flatten().clone() for name, p in model.named_parameters() if p.grad is not None}
    norm = float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g.double()) for g in grads.values()])))
    return grads, norm, total.item() / count


@functools.cache
def plain_step() -> tuple[dict[str, torch.Tensor], float, float]:
    return plain(cases.my_micro_batches(0, ALONE, 8))


@ZERO
def test_a_micro_batch_without_target_on_one_rank_changes_nothing(pool, zero: int) -> None:
    """Rank 1 has one micro-batch to learn from and two mute ones, rank 0 has three; the mean is over the four."""
    batches = [engine_cases.documents(number, True) for number in range(4)]
    grads, norm, loss = plain(batches)
    for result in pool(2).run(engine_cases.mute_micro_batch, zero):
        total, count = result["sums"].sum(0).tolist()
        assert count == sum(batch.num_targets for batch in batches) == 4 * (16 + 4)
        assert total / count == pytest.approx(loss, rel=1e-6)
        assert result["norm"] == pytest.approx(norm, rel=1e-6)
        assert cases.distance(grads, result["gradient"]) <= 1e-6


@ZERO
def test_a_global_batch_without_target_is_refused(pool, zero: int) -> None:
    for message, weights_stayed in pool(2).run(engine_cases.nothing_to_learn, zero):
        assert "no valid token on any rank" in message
        assert weights_stayed


@ZERO
def test_the_norm_is_torchs_and_without_clip_the_gradient_is_left(pool, zero: int) -> None:
    grads, norm, _ = plain_step()
    for result in pool(2).run(engine_cases.clipped, zero, 0.0):
        assert result["norm"] == pytest.approx(norm, rel=1e-6)
        assert cases.distance(grads, result["gradient"]) <= 1e-6


@ZERO
def test_clipping_scales_the_whole_gradient(pool, zero: int) -> None:
    """The reported norm is the one before clipping; AdamW sees clip / norm times the gradient (torch adds 1e-6)."""
    grads, norm, _ = plain_step()
    clip = 0.25 * norm
    for result in pool(2).run(engine_cases.clipped, zero, clip):
        assert result["norm"] == pytest.approx(norm, rel=1e-6)
        expected = {name: grad * 0.25 for name, grad in grads.items()}
        assert cases.distance(expected, result["gradient"]) <= 1e-5


@ZERO
def test_a_norm_below_the_clip_is_not_raised(pool, zero: int) -> None:
    grads, norm, _ = plain_step()
    result = pool(2).run(engine_cases.clipped, zero, 3.0 * norm)[0]
    assert cases.distance(grads, result["gradient"]) <= 1e-6


@ZERO
def test_accumulation_is_one_optimizer_step(pool, zero: int) -> None:
    """Four micro-batches a rank, two steps: AdamW counts two, and the weights are those of one micro-batch a rank
    without any sharding; the second step sees what the first one changed."""
    (expected, steps) = pool(2).run(engine_cases.accumulated, 0, 1)[0]
    assert steps == 2
    for weights, counted in pool(2).run(engine_cases.accumulated, zero, 4):
        assert counted == 2
        assert cases.distance(expected, weights) <= 1e-5


@ZERO
def test_the_step_takes_the_rate_it_is_given(pool, zero: int) -> None:
    """Not the one the optimizer was made with: rate 0 moves nothing, twice the rate moves twice as far."""
    still, once, twice = pool(2).run(engine_cases.moved, zero, [0.0, 0.01, 0.02])[0]
    assert not any(delta.any() for delta in still.values())
    assert all(delta.any() for delta in once.values())
    assert cases.distance({name: 2 * delta for name, delta in once.items()}, twice) <= 1e-4


@ZERO
def test_evaluate_is_the_training_forward_and_leaves_nothing(pool, zero: int) -> None:
    """Same numbers bit for bit, no gradient, no gathered weight, training mode; and the next step is not disturbed."""
    for result in pool(2).run(engine_cases.evaluated, zero):
        forward_only, training = result["metrics"]
        assert torch.equal(forward_only, training)
        assert forward_only[..., 1].sum() > 0
        assert result["modes"] == {(False, False)}, "(gradients enabled, training mode) inside the evaluation"
        assert (result["grads"], result["whole"], result["training"]) == (0, 0, True)
        assert result["same"]
        # After the step the weights are others: the evaluation must see the new ones (a descent on the same batch).
        assert result["after"].sum(0)[..., 0].sum() < forward_only.sum(0)[..., 0].sum() - 1e-3


@pytest.mark.parametrize("hidden_size", [32, 33])
@ZERO
def test_fragments_cover_every_element_once(pool, zero: int, hidden_size: int) -> None:
    """And lie where they say, also where two ranks cannot share a tensor evenly (33)."""
    ranks = pool(2).run(engine_cases.covered, zero, hidden_size)
    cfg = dataclasses.replace(cases.TINY, hidden_size=hidden_size)
    source = InitSource(cfg, seed=3)
    expected = {name: source.tensor(name).flatten() for name, _ in build(cfg).named_parameters()}
    seen = {name: torch.zeros(len(whole), dtype=torch.int64) for name, whole in expected.items()}
    for rank in ranks:
        for name, start, master, states in rank:
            stop = start + len(master)
            assert master.dtype is torch.float32
            assert states == {"exp_avg": len(master), "exp_avg_sq": len(master)}
            assert torch.equal(master, expected[name][start:stop]), name
            seen[name][start:stop] += 1
    assert all((count == 1).all() for count in seen.values())
    assert all(rank for rank in ranks), "a rank owns nothing"


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
@ZERO
def test_a_gradient_that_is_not_finite_stops_fp32(pool, zero: int, factor: float) -> None:
    """On one rank of two: both hear of it, and neither weights nor moments nor the step count moved."""
    for result in pool(2).run(engine_cases.bad_step, zero, "fp32", factor):
        assert "gradient is not finite" in result["error"] and "optim.lr" in result["error"]
        assert result["unchanged"]
        assert result["steps"] == (1, 1)


@ZERO
def test_a_skipped_fp16_step_never_happened(pool, zero: int) -> None:
    """The scale halves, AdamW does not move, and training goes on as if the batch had not been there."""
    results = pool(2).run(engine_cases.bad_step, zero, "fp16", float("inf"))
    expected = pool(2).run(engine_cases.good_steps, zero, "fp16", [0, 2], 2.0**15)[0]
    for result in results:
        assert result["skipped"] and not result["error"]
        assert result["unchanged"]
        assert (result["steps"], result["next_steps"]) == ((1, 1), 2)
        assert result["scale"] == (65536.0, 32768.0)
        assert all(torch.equal(result["next"][name], expected[name]) for name in expected)


@pytest.mark.parametrize("zero", [1, 3])
def test_not_finite_with_an_offloaded_optimizer(pool, zero: int) -> None:
    result = pool(2).run(engine_cases.bad_step, zero, "fp32", float("nan"), offload=True)[0]
    assert "gradient is not finite" in result["error"] and result["unchanged"] and result["steps"] == (1, 1)


TEXTBOOK = {0: 2, 1: 2, 2: 2, 3: 3}


@ZERO
def test_bytes_on_the_wire(pool, zero: int) -> None:
    """One step moves 2, 2, 2 and 3 times the parameters (Rajbhandari et al. 2020, section 7), within 1 %.

    Counted where collectives reach torch's process groups, an all-reduce twice. Left out is nothing: what small
    messages there are (norm, overflow flag) stay below 100 bytes and are asserted to.
    """
    for counted in pool(2).run(engine_cases.wire, zero):
        moved = sum(row[2] for row in counted["kinds"].values())
        assert moved == pytest.approx(TEXTBOOK[zero] * counted["parameters"], rel=0.01)
        big = {kind for kind, row in counted["kinds"].items() if row[1] > 100}
        expected = {0: {"allreduce_"}, 3: {"_allgather_base_", "_reduce_scatter_base_"}}
        assert big == expected.get(zero, {"reduce_", "_allgather_base_"})
