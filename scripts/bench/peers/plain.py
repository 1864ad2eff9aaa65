"""What both plain loops share: the model, the optimizer, and a step of several micro-batches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaForCausalLM

from scripts.bench import workload
from scripts.bench.turns import Turns


def model(load: workload.Load) -> LlamaForCausalLM:
    """The model, drawn from the same seed everywhere."""
    torch.manual_seed(0)
    return LlamaForCausalLM(workload.llama_config(num_hidden_layers=load.layers))


def optimizer(trained: torch.nn.Module) -> torch.optim.Optimizer:
    """Fused AdamW with the numbers all contenders have."""
    return torch.optim.AdamW(
        trained.parameters(),
        lr=workload.LEARNING_RATE,
        betas=workload.BETAS,
        weight_decay=workload.WEIGHT_DECAY,
        fused=True,
    )


def steps(data: Path, load: workload.Load, rank: int, world: int) -> Iterator[list[torch.Tensor]]:
    """The micro-batches [rows, seq_len] of this process, step after step, for ever."""
    batches = torch.from_numpy(np.load(data / "pretrain.npy")).split(load.rows)
    of_step = load.of_step(world)
    assert of_step % world == 0, f"{of_step} micro-batches are not for {world} processes"
    at = 0
    while True:
        yield [batches[(at + i) % len(batches)] for i in range(rank, of_step, world)]
        at += of_step


def train(trained: Any, data: Path, load: workload.Load, turns: Turns, world: int) -> None:
    """Forward, backward, clip, update. With several processes gradients are averaged in the last backward of a step."""
    update = optimizer(trained)
    feed = steps(data, load, turns.rank, world)
    for _ in range(turns.schedule.total):
        batches = next(feed)
        total = 0.0
        for i, batch_BT in enumerate(batches):
            last = i + 1 == len(batches)
            with trained.no_sync() if world > 1 and not last else nullcontext():
                loss = trained(input_ids=batch_BT, labels=batch_BT).loss / len(batches)
                loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), workload.CLIP)
        update.step()
        update.zero_grad()
        turns.step(sum(batch_BT.numel() for batch_BT in batches), total)
