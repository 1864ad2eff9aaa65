"""What experts cost beside a dense layer of the same active FLOPs: ``python scripts/bench/moe.py [--quick]``.

One decoder layer (attention and feed-forward) forward and backward, on two gloo processes with one thread each. Taken
in turns: the dense layer, the layer with all experts on each process, and the layer with the experts shared out over
both (ep=2). Every process brings as many tokens, so a token's active FLOPs are the same in all three. A token's cost is
the median over the rounds of the CPU-seconds of both processes, and of the seconds of the slower one.
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import os
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist

from models import ModelConfig, build
from models.config import MoEConfig
from models.decoder import Chunk
from models.init import InitSource
from parallel.host_memory import keep_freed_memory
from parallel.materialise import materialise
from parallel.sharding import SINGLE, Axis, Place

PROCESSES = 2
Times = dict[str, list[tuple[float, float]]]
"""contender -> for each round CPU-seconds and seconds"""


def configs(args: argparse.Namespace) -> tuple[ModelConfig, ModelConfig]:
    """The dense layer and the one with experts; a token multiplies with equally many weights, but for the router."""
    ffn = args.ffn
    sizes = (512, args.hidden, ffn, 1, args.hidden // 64, args.hidden // 128, 64, args.tokens)
    moe = MoEConfig(args.experts, args.top_k, ffn // args.top_k)
    return ModelConfig("qwen3", *sizes), ModelConfig("qwen3_moe", *sizes, moe=moe)


def contender(cfg: ModelConfig, place: Place, args: argparse.Namespace) -> Callable[[], None]:
    """Forward and backward of a layer whose router spreads the tokens as it will."""
    model = build(cfg, place, chunk=Chunk(0, 1, False, False))
    materialise(model, InitSource(cfg, 1), place.cut, torch.device("cpu"))
    draw = torch.Generator().manual_seed(2 + (dist.get_rank()))
    hidden = torch.randn(args.tokens, cfg.hidden_size, generator=draw).requires_grad_()
    grad = torch.randn(args.tokens, cfg.hidden_size, generator=draw)
    document = args.tokens // args.documents
    borders = list(range(0, args.tokens + 1, document))
    tokens, positions = torch.zeros(args.tokens, dtype=torch.int64), torch.arange(document).repeat(args.documents)

    def run() -> None:
        model.zero_grad(set_to_none=True)
        model(tokens, positions, borders, hidden_RD=hidden).backward(grad)
        hidden.grad = None

    return run


def worker(rank: int, store: str, pipe: Connection, args: argparse.Namespace) -> None:
    """One of the processes: all contenders in turns."""
    torch.set_num_threads(1)
    keep_freed_memory()
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=PROCESSES)
    dense, moe = configs(args)
    shared = Place(ep=Axis(PROCESSES, rank, dist.group.WORLD))
    runs = {
        "dense": contender(dense, SINGLE, args),
        "experts, all here": contender(moe, SINGLE, args),
        "experts, ep=2": contender(moe, shared, args),
    }
    times: Times = {name: [] for name in runs}
    for round_ in range(args.rounds + 2):
        for name, run in runs.items():
            dist.barrier()
            cpu, wall = time.process_time(), time.perf_counter()
            for _ in range(args.steps):
                run()
            taken = time.process_time() - cpu, time.perf_counter() - wall
            if round_ >= 2:
                times[name].append(taken)
    pipe.send(times)
    dist.destroy_process_group()


def table(both: list[Times], args: argparse.Namespace) -> str:
    """Costs of a token, and their ratio to the dense layer's."""
    tokens = args.tokens * args.steps
    lines = [f"{'contender':20s} {'CPU us/token':>13s} {'ratio':>6s} {'wall us/token':>14s} {'ratio':>6s}"]
    first: tuple[float, float] | None = None
    for name in both[0]:
        rounds = list(zip(*(times[name] for times in both), strict=True))
        cpu = median(sum(each[0] for each in turn) for turn in rounds) / tokens / PROCESSES * 1e6
        wall = median(max(each[1] for each in turn) for turn in rounds) / tokens * 1e6
        first = first or (cpu, wall)
        lines.append(f"{name:20s} {cpu:13.2f} {cpu / first[0]:6.2f} {wall:14.2f} {wall / first[1]:6.2f}")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512, help="a multiple of 128")
    parser.add_argument("--ffn", type=int, default=1408, help="of the dense layer; an expert has this / top-k")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=2048, help="of each process")
    parser.add_argument("--documents", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3, help="of a turn")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    args = parser.parse_args()
    args.rounds = 3 if args.quick else args.rounds
    return args


def main() -> None:
    args = arguments()
    os.environ.update(OMP_NUM_THREADS="1")
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(PROCESSES):
            ours, theirs = context.Pipe()
            process = context.Process(target=worker, args=(rank, f"{folder}/store", theirs, args))
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        both = [pipe.recv() for pipe in pipes]
        for process in processes:
            process.join()
    print(f"hidden {args.hidden}, feed-forward {args.ffn}, {args.experts} experts, {args.top_k} a token,")
    print(f"{args.tokens} tokens a process in {args.documents} documents, {args.rounds} rounds of {args.steps} steps")
    print(table(both, args))


if __name__ == "__main__":
    main()
