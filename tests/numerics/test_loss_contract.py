"""The loss contract: how a global batch is cut changes neither loss nor gradients (tolerance 1e-6 relative, fp32)."""

from __future__ import annotations

import pytest
import torch

from models import build
from models.init import InitSource
from parallel.groups import Groups
from parallel.materialise import materialise
from parallel.sharding import WHOLE, Axis
from tests import cases

CUTS = [  # (processes, rows of a micro-batch): 8 rows a step, accumulation follows
    pytest.param(1, 8, id="one batch"),
    pytest.param(1, 1, id="accumulate 8"),
    pytest.param(2, 2, id="dp 2 x accumulate 2"),
    pytest.param(2, 4, id="dp 2"),
    pytest.param(4, 1, id="dp 4 x accumulate 2"),
]


def plain_reference(steps: int) -> dict:
    """The same training without engine, micro-batches or DeepSpeed: one batch, one loss, torch's AdamW."""
    groups = Groups(0, 1, torch.device("cpu"), Axis())
    model = build(cases.TINY)
    materialise(model, InitSource(cases.TINY, seed=3), WHOLE, torch.device("cpu"))
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    adamw = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=1e-2,
        betas=(0.9, 0.95),
        eps=1e-4,
    )
    out: dict = {"losses": [], "norm": []}
    for step in range(steps):
        (batch,) = cases.my_micro_batches(step, groups, 8)
        logits = model(batch.tokens_T, batch.positions_T, batch.cu_seqlens, output="head")
        loss = torch.nn.functional.cross_entropy(logits.double(), batch.targets_T)  # mean over targets != -100
        loss.backward()
        if step == 0:
            out["grads"] = {n: p.grad.flatten().clone() for n, p in model.named_parameters() if p.grad is not None}
        out["norm"].append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        for group in adamw.param_groups:
            group["lr"] = cases.OptimConfig(lr=1e-2).lr_at(step, 100)
        adamw.step()
        adamw.zero_grad()
        out["losses"].append(loss.item())
    out["weights"] = {n: p.detach().flatten() for n, p in model.named_parameters()}
    return out


@pytest.fixture(scope="module")
def reference() -> dict:
    return plain_reference(4)


@pytest.mark.parametrize(("processes", "micro_rows"), CUTS)
def test_any_cut_of_the_global_batch_is_the_same_training(pool, reference, processes: int, micro_rows: int) -> None:
    for result in pool(processes).run(cases.train, 1, micro_rows, clip=0.0)[:1]:
        assert cases.distance(reference["grads"], result["grads"]) <= 1e-6
    result = pool(processes).run(cases.train, 1, micro_rows)[0]
    assert cases.relative(reference["losses"], result["losses"]) <= 1e-6
    assert cases.relative(reference["norm"], result["norm"]) <= 1e-6
    assert cases.distance(reference["weights"], result["weights"]) <= 1e-5


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("processes", [1, 2])
def test_zero_stages_train_alike(pool, reference, zero: int, processes: int) -> None:
    result = pool(processes).run(cases.train, zero, 2)[0]
    assert cases.relative(reference["losses"], result["losses"]) <= 1e-6
    assert cases.relative(reference["norm"], result["norm"]) <= 1e-6
    assert cases.distance(reference["weights"], result["weights"]) <= 1e-5


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_optimizer_offload_trains_alike(pool, reference, zero: int) -> None:
    result = pool(2).run(cases.train, zero, 2, offload=True)[0]
    assert cases.relative(reference["losses"], result["losses"]) <= 1e-6
    assert cases.distance(reference["weights"], result["weights"]) <= 1e-5


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("zero", [1, 3])
def test_recompute_trains_alike(pool, reference, recompute: str, zero: int) -> None:
    result = pool(2).run(cases.train, zero, 2, recompute=recompute)[0]
    assert cases.relative(reference["losses"], result["losses"]) <= 1e-6
    assert cases.distance(reference["weights"], result["weights"]) <= 1e-5


@pytest.mark.parametrize("zero", [0, 1, 3])
def test_tied_embeddings_train_alike_at_any_stage(pool, zero: int) -> None:
    one = pool(1).run(cases.train, 2, 8, tied=True)[0]
    two = pool(2).run(cases.train, zero, 1, tied=True)[0]
    assert "head.weight" not in one["weights"]
    assert cases.relative(one["losses"], two["losses"]) <= 1e-6
    assert cases.distance(one["weights"], two["weights"]) <= 1e-5


def test_channels_are_token_exact_at_any_layout(pool) -> None:
    """Losses by channel do not depend on the cut, a channel may be missing on a rank and another may appear late."""
    one, two, four = (pool(n).run(cases.train, 1, 1)[0]["metrics"] for n in (1, 2, 4))
    assert "channel/late/loss" not in one[0] and "channel/late/loss" in one[2]
    for a, b, c in zip(one, two, four, strict=True):
        assert a.keys() == b.keys() == c.keys()
        for key in a:
            assert a[key] == pytest.approx(b[key], rel=1e-6) == pytest.approx(c[key], rel=1e-6), key
        names = [n for n in cases.NAMES if f"channel/{n}/loss" in a]
        total = sum(a[f"channel/{n}/loss"] * a[f"channel/{n}/tokens"] for n in names)
        assert total / a["train/tokens"] == pytest.approx(a["train/loss"], rel=1e-12)
        expected = sum(
            b.num_targets
            for b in cases.my_micro_batches(one.index(a), cases.Groups(0, 1, torch.device("cpu"), Axis()), 8)
        )
        assert a["train/tokens"] == expected
