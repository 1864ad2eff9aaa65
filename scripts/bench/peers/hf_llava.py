"""transformers' own LLaVA in a plain loop with fused AdamW: batches are padded to their longest sample.

With ``--ready`` pictures are decoded before the first step, so that the loop has nothing to do but to train.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, LlavaForConditionalGeneration

from parallel.host_memory import keep_freed_memory
from scripts.bench import picture_load, workload
from scripts.bench.peers import plain
from scripts.bench.picture_load import Sample
from scripts.bench.turns import Turns, parse_args


class Looker:
    """From files to pixels, as transformers does it with Pillow."""

    def __init__(self, folder: Path, ready: bool) -> None:
        self._folder = folder
        self._processor: Any = CLIPImageProcessorPil.from_pretrained(folder / "start")
        self._kept: dict[str, torch.Tensor] | None = {} if ready else None

    def __call__(self, names: list[str]) -> torch.Tensor:
        """[pictures, 3, TILE, TILE]"""
        return torch.cat([self._one(name) for name in names])

    def _one(self, name: str) -> torch.Tensor:
        if self._kept is not None and name in self._kept:
            return self._kept[name]
        with Image.open(self._folder / name) as image:
            pixels = self._processor(image.convert("RGB"), return_tensors="pt")["pixel_values"]
        if self._kept is not None:
            self._kept[name] = pixels
        return pixels


def padded(samples: list[Sample], look: Callable[[list[str]], torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the model takes, filled up to the longest sample."""
    longest = max(len(sample.ids) for sample in samples)
    ids = torch.full((len(samples), longest), workload.PAD)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for row, sample in enumerate(samples):
        length = len(sample.ids)
        ids[row, :length] = torch.tensor(sample.ids)
        labels[row, sample.prompt : length] = ids[row, sample.prompt : length]
        mask[row, :length] = 1
    names = [name for sample in samples for name in sample.images]
    batch = {"input_ids": ids, "labels": labels}
    if int(mask.min()) == 0:
        batch["attention_mask"] = mask
    return batch | ({"pixel_values": look(names)} if names else {})


def main() -> None:
    """Forward, backward, clip, fused AdamW, on the same samples again and again."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch", type=int, default=picture_load.SAME_SAMPLES, help="samples of a forward")
    parser.add_argument("--samples", type=int, default=picture_load.SAME_SAMPLES, help="of a step")
    parser.add_argument("--ready", action="store_true", help="pictures are decoded before the first step")
    parser.add_argument("--keep-freed-memory", action="store_true")
    args, schedule = parse_args(parser)
    if args.keep_freed_memory:
        keep_freed_memory()
    torch.set_num_threads(1)
    folder, turns = Path(args.data), Turns(args.address, schedule)
    samples, look = picture_load.read(folder), Looker(folder, args.ready)
    model: Any = LlavaForConditionalGeneration.from_pretrained(folder / "start", attn_implementation="sdpa").train()
    update = plain.optimizer(model)
    for group in update.param_groups:
        group["weight_decay"] = 0.0  # Loom spares norms and biases; without any decay losses can be compared
    for step in range(schedule.total):
        mine = [samples[(step * args.samples + i) % len(samples)] for i in range(args.samples)]
        learnt = sum(len(sample.ids) - sample.prompt for sample in mine)
        total = 0.0
        for at in range(0, len(mine), args.batch):
            loss = model(**padded(mine[at : at + args.batch], look), num_items_in_batch=learnt).loss
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), workload.CLIP)
        update.step()
        update.zero_grad()
        turns.step(sum(len(sample.ids) for sample in mine), total)


if __name__ == "__main__":
    main()
