"""The plain loop under DistributedDataParallel on gloo: the floor of wall time for two processes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaForCausalLM

from scripts.bench import workload
from scripts.bench.turns import Turns, parse_args


def main() -> None:
    """As ``plain_loop``, with every rank on its own rows."""
    args, schedule = parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = DistributedDataParallel(LlamaForCausalLM(workload.llama_config()), gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=workload.LEARNING_RATE,
        betas=workload.BETAS,
        weight_decay=workload.WEIGHT_DECAY,
        fused=True,
    )
    batches = torch.from_numpy(np.load(Path(args.data) / "pretrain.npy")).split(workload.MICRO_BATCH)[rank::world]
    turns = Turns(args.address, schedule, rank)
    for step in range(schedule.total):
        batch_BT = batches[step % len(batches)]
        loss = model(input_ids=batch_BT, labels=batch_BT).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), workload.CLIP)
        optimizer.step()
        optimizer.zero_grad()
        turns.step(batch_BT.numel(), loss.item())
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
