"""A decoder cut over two processes has the loss, logits and gradients of the whole one. The file is its own worker."""

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import torch
import torch.distributed as dist

from models import ModelConfig, build
from models.init import InitSource
from parallel.materialise import materialise
from parallel.sharding import Axis, Place, shard_of

ROOT = Path(__file__).resolve().parents[3]
TOKENS, BORDERS = 24, [0, 9, 24]


def config() -> ModelConfig:
    return ModelConfig(
        "llama", 32, 16, 24, 2, 4, 2, 4, 64, qkv_bias=True, attention_out_bias=True, mlp_bias=True, init_std=0.3
    )


def run(axis: Axis) -> dict[str, torch.Tensor]:
    """Loss, logits and local gradients of the decoder cut over `axis`."""
    cfg = config()
    place = Place(tp=axis)
    model = build(cfg, place)
    materialise(model, InitSource(cfg, 3), place.cut, torch.device("cpu"))
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 32, (TOKENS,), generator=draw)
    targets = torch.randint(0, 32, (TOKENS,), generator=draw)
    targets[::4] = -100
    positions = torch.cat([torch.arange(b - a) for a, b in pairwise(BORDERS)])
    loss, losses = model(tokens, positions, BORDERS, 15, targets, 0.1)
    loss.backward()
    found = {"loss": loss.detach(), "losses": losses}
    with torch.no_grad():
        found["logits"] = model(tokens, positions, BORDERS, 15, output="head")
    return found | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_two_processes_equal_one(tmp_path: Path) -> None:
    """Tolerance 1e-6 of each tensor's largest value: the same fp32 sums in another order."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    workers = [subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)], env=env) for rank in range(2)]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    cut = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    whole = run(Axis())
    params = dict(build(config()).named_parameters())
    assert set(cut[0]) == set(whole) == set(params) | {"loss", "losses", "logits"}
    for name, expected in whole.items():
        by_rank = [found[name] for found in cut]
        if name in params:
            shard = shard_of(params[name])
            if shard.dim is not None:
                assert by_rank[0].shape != expected.shape, f"{name} was not cut"
            merged = shard.merge(dict(zip(shard.cuts(2, 1), by_rank, strict=shard.dim is not None)))
        else:
            merged = by_rank[1]
        torch.testing.assert_close(
            merged, expected, rtol=0, atol=1e-6 * max(1.0, expected.abs().max().item()), msg=name
        )


def worker(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save(run(Axis(2, rank, dist.group.WORLD)), folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    worker(int(sys.argv[1]), Path(sys.argv[2]))
