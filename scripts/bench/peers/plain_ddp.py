"""The plain loop under DistributedDataParallel on gloo: the floor of wall time for two processes."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from scripts.bench import workload
from scripts.bench.peers import plain
from scripts.bench.turns import Turns, parse_args


def main() -> None:
    """As ``plain_loop``, with every rank on its own micro-batches."""
    parser = argparse.ArgumentParser()
    workload.Load.add_arguments(parser)
    args, schedule = parse_args(parser)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    load = workload.Load.read(args)
    model = DistributedDataParallel(plain.model(load), gradient_as_bucket_view=True)
    plain.train(model, Path(args.data), load, Turns(args.address, schedule, dist.get_rank()), dist.get_world_size())
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
