"""Reading a checkpoint by range, and restoring every part of the training state."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from parallel.sharding import REPLICATED, WHOLE
from tests import checkpoint_cases
from trainer import checkpoint


@pytest.fixture
def scattered(tmp_path: Path) -> checkpoint.Checkpoint:
    """Elements 0 to 9 of ``w`` [2, 5] in pieces of 3, 4, 1 and 2 on three ranks, not in order."""
    pieces = [[1, 0, 3], [0, 3, 4], [2, 7, 1], [1, 8, 2]]
    for rank in range(3):
        mine = {f"param/w@0:{at}": torch.arange(at, at + size).float() for owner, at, size in pieces if owner == rank}
        save_file(mine, tmp_path / f"rank_{rank:05d}.safetensors")
    shuffled = [(rank, 0, at, size) for rank, at, size in (pieces[n] for n in (2, 0, 3, 1))]
    tensors = {"w": {"shape": [2, 5], "shard": dataclasses.asdict(REPLICATED), "tp": 1, "ep": 1, "pieces": shuffled}}
    (tmp_path / "state.json").write_text(json.dumps({"format": checkpoint.FORMAT, "tensors": tensors}))
    return checkpoint.Checkpoint(tmp_path)


def test_every_range_is_read_across_pieces(scattered: checkpoint.Checkpoint) -> None:
    for start in range(10):
        for stop in range(start, 11):
            found = scattered.read_range("param", "w", WHOLE, start, stop - start)
            assert found.tolist() == list(range(start, stop)), (start, stop)
    assert scattered.tensor("w").tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert [(name, tensor.shape) for name, tensor in scattered.weights()] == [("w", (2, 5))]


@pytest.mark.parametrize("damage", ["missing", "truncated", "empty"])
def test_a_damaged_rank_file_is_named_with_a_way_out(scattered: checkpoint.Checkpoint, damage: str) -> None:
    file = scattered.folder / "rank_00001.safetensors"
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-10] if damage == "truncated" else b"")
    with pytest.raises(ValueError, match=rf"cannot read {file}.*run\.resume=PATH"):
        scattered.tensor("w")


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(("zero", "other"), [(0, 3), (1, 2), (2, 0), (3, 1)])
def test_everything_is_restored_bit_by_bit(pool, tmp_path: Path, zero: int, other: int) -> None:
    """Three fp16 steps, the second skipped: weights, moments, AdamW's two steps, the halved scale, each rank's RNG."""
    before = pool(2).run(checkpoint_cases.trained, str(tmp_path), zero, 3)
    for stage in (zero, other):
        after = pool(2).run(checkpoint_cases.restored, str(tmp_path), stage, "fp16")
        for rank in range(2):
            for kind in ("master", "exp_avg", "exp_avg_sq"):
                assert equal(before[rank][kind], after[rank][kind]), kind
                assert any(tensor.abs().sum() > 0 for tensor in after[rank][kind].values())
            assert after[rank]["steps"] == before[rank]["steps"] == 2
            assert after[rank]["scale"] == {"value": 2.0**15, "good_steps": 1}
            assert after[rank]["draw"] == before[rank]["draw"]
    assert before[0]["draw"] != before[1]["draw"]


def test_the_loss_scale_belongs_to_fp16(pool, tmp_path: Path) -> None:
    pool(2).run(checkpoint_cases.trained, str(tmp_path), 1, 1)
    assert pool(2).run(checkpoint_cases.restored, str(tmp_path), 1, "bf16")[0]["scale"]["value"] == 1.0
