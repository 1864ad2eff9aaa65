"""Tokens per CPU-second of the decoder against transformers' LlamaForCausalLM, both with fused AdamW, interleaved.

Usage: python scripts/bench/bench_model.py [--steps 12] [--profile]
One process, one thread, fp32; the model of conf/model/bench_256.yaml, sequence 512, micro-batch 2.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from models import FAMILIES, ModelConfig, Runtime, build
from models.init import InitSource
from parallel.materialise import materialise
from parallel.sharding import SINGLE, WHOLE
from scripts.params import load_model

ROWS, SEQ = 2, 512


def ours(cfg: ModelConfig, recompute: Any, chunk: int) -> Callable[[torch.Tensor], float]:
    """A training step of the decoder on tokens [rows, seq + 1]."""
    model = build(cfg, SINGLE, Runtime("sdpa", recompute, chunk))
    materialise(model, InitSource(cfg, 0), WHOLE, torch.device("cpu"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    positions = torch.arange(SEQ).repeat(ROWS)
    borders = [SEQ * i for i in range(ROWS + 1)]

    def step(tokens: torch.Tensor) -> float:
        inputs, targets = tokens[:, :-1].flatten(), tokens[:, 1:].flatten()
        loss, _ = model(inputs, positions, borders, SEQ, targets, 1.0 / targets.numel())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def theirs(cfg: ModelConfig) -> Callable[[torch.Tensor], float]:
    """A training step of transformers' model on the same tokens."""
    keys = FAMILIES[cfg.family].to_hf_config(cfg)
    del keys["architectures"]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(keys.pop("model_type"), **keys))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(tokens: torch.Tensor) -> float:
        logits = model(tokens[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--chunk", type=int, default=1024)
    parser.add_argument("--recompute", default="none")
    parser.add_argument("--profile", action="store_true", help="print the operators of three steps of the decoder")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    cfg = load_model("bench_256", [])
    steps = {"decoder": ours(cfg, args.recompute, args.chunk), "transformers": theirs(cfg)}
    if args.profile:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            for _ in range(3):
                steps["decoder"](torch.randint(0, cfg.vocab_size, (ROWS, SEQ + 1)))
        print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=30, max_name_column_width=60))
        return
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(args.steps + 2):
        tokens = torch.randint(0, cfg.vocab_size, (ROWS, SEQ + 1))
        for name, step in steps.items():
            start = time.process_time()
            step(tokens)
            if i >= 2:
                seconds[name].append(time.process_time() - start)
    rates = {name: ROWS * SEQ / statistics.median(times) for name, times in seconds.items()}
    for name, rate in rates.items():
        print(
            f"{name:14s} {rate:8.0f} tokens per CPU-second   {1000 * statistics.median(seconds[name]):7.1f} ms a step"
        )
    ratios = [b / a for a, b in zip(seconds["decoder"], seconds["transformers"], strict=True)]
    print(f"ratio          {statistics.median(ratios):8.3f}   (quartiles {statistics.quantiles(ratios, n=4)})")


if __name__ == "__main__":
    main()
