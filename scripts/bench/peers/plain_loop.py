"""The floor every ratio stands on: a plain PyTorch loop over transformers' LlamaForCausalLM, one process.

With ``--keep-freed-memory`` the C library keeps what is freed, as Loom lets it: the share of Loom's lead that any loop
could have by that one setting.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaForCausalLM

from parallel.host_memory import keep_freed_memory
from scripts.bench import workload
from scripts.bench.turns import Turns, parse_args


def main() -> None:
    """Forward, backward, clip, fused AdamW."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--keep-freed-memory", action="store_true")
    args, schedule = parse_args(parser)
    if args.keep_freed_memory:
        keep_freed_memory()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = LlamaForCausalLM(workload.llama_config())
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=workload.LEARNING_RATE,
        betas=workload.BETAS,
        weight_decay=workload.WEIGHT_DECAY,
        fused=True,
    )
    ids_RT = torch.from_numpy(np.load(Path(args.data) / "pretrain.npy"))
    batches = ids_RT.split(workload.MICRO_BATCH)
    turns = Turns(args.address, schedule)
    for step in range(schedule.total):
        batch_BT = batches[step % len(batches)]
        loss = model(input_ids=batch_BT, labels=batch_BT).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), workload.CLIP)
        optimizer.step()
        optimizer.zero_grad()
        turns.step(batch_BT.numel(), loss.item())


if __name__ == "__main__":
    main()
