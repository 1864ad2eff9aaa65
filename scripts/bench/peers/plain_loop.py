"""The floor every ratio stands on: a plain PyTorch loop over transformers' LlamaForCausalLM, one process.

With ``--keep-freed-memory`` the C library keeps what is freed, as Loom lets it: the share of Loom's lead that any loop
could have by that one setting.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from parallel.host_memory import keep_freed_memory
from scripts.bench import workload
from scripts.bench.peers import plain
from scripts.bench.turns import Turns, parse_args


def main() -> None:
    """Forward, backward, clip, fused AdamW."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--keep-freed-memory", action="store_true")
    workload.Load.add_arguments(parser)
    args, schedule = parse_args(parser)
    if args.keep_freed_memory:
        keep_freed_memory()
    torch.set_num_threads(1)
    load = workload.Load.read(args)
    plain.train(plain.model(load), Path(args.data), load, Turns(args.address, schedule), 1)


if __name__ == "__main__":
    main()
