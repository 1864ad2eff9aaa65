"""Loom's generator on the benchmark's prompts."""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch

from models.generation import GeneratorConfig, SamplingConfig
from parallel.host_memory import keep_freed_memory
from scripts.bench.generation_work import Work
from scripts.bench.turns import Turns, parse_args
from trainer.inference.loading import load_generator


def main() -> None:
    """A step is all prompts once; every turn draws the same samples."""
    parser = argparse.ArgumentParser()
    Work.add_arguments(parser)
    args, schedule = parse_args(parser)
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    work = Work.read(args)
    config = GeneratorConfig(max_rows=args.rows, max_cached_tokens=max(32768, args.rows * 1024))
    generator = load_generator(args.model, device=torch.device("cpu"), config=config)
    settings = SamplingConfig(
        max_new_tokens=work.new_tokens, samples=work.samples, stop_tokens=work.stop_tokens,
        temperature=1.0 if work.samples > 1 else 0.0,
    )  # fmt: skip
    turns = Turns(args.address, schedule)
    for number in range(schedule.total):
        if number < schedule.warmup:
            made = generator.generate(work.prompts[:4], replace(settings, max_new_tokens=4))
        else:
            made = generator.generate(work.prompts, settings)
            work.keep(args.name, [list(each.tokens) for each in made])
        turns.step(sum(len(each.tokens) for each in made), 0.0)


if __name__ == "__main__":
    main()
