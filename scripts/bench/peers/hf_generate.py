"""`transformers.generate` on the benchmark's prompts: padded on the left, prompts of like lengths in one batch."""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM

from parallel.host_memory import keep_freed_memory
from scripts.bench.generation_work import Work
from scripts.bench.turns import Turns, parse_args


def left_padded(prompts: list[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, int64 [N, longest]."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


def main() -> None:
    """A step is all prompts once; every turn draws the same samples."""
    parser = argparse.ArgumentParser()
    Work.add_arguments(parser)
    args, schedule = parse_args(parser)
    torch.set_num_threads(args.threads)
    keep_freed_memory()  # as Loom does: a fairer comparison
    work = Work.read(args)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    ends = list(work.stop_tokens)
    model.generation_config.eos_token_id = ends or None
    model.generation_config.pad_token_id = 0
    settings = {"max_new_tokens": work.new_tokens, "do_sample": work.samples > 1, "num_return_sequences": work.samples}
    if work.samples > 1:
        settings |= {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    turns = Turns(args.address, schedule)

    def texts(prompts: list[list[int]], **changes: int) -> list[list[int]]:
        """New tokens of all samples, each with its end."""
        found: list[list[int]] = [[]] * (len(prompts) * work.samples)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        size = max(1, args.rows // work.samples)
        for start in range(0, len(order), size):
            own = order[start : start + size]
            ids, mask = left_padded([prompts[i] for i in own], 0)
            made = model.generate(ids, attention_mask=mask, **(settings | changes))[:, ids.shape[1] :].tolist()
            for row, tokens in enumerate(made):
                stop = next((at + 1 for at, token in enumerate(tokens) if token in ends), len(tokens))
                found[own[row // work.samples] * work.samples + row % work.samples] = tokens[:stop]
        return found

    for number in range(schedule.total):
        torch.manual_seed(0)
        if number < schedule.warmup:
            found = texts(work.prompts[:4], max_new_tokens=4)
        else:
            found = texts(work.prompts)
            work.keep(args.name, found)
        turns.step(sum(map(len, found)), 0.0)


if __name__ == "__main__":
    main()
