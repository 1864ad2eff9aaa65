"""What the pools run for a model that turns by time, row and column: two packed documents with pictures."""

from __future__ import annotations

import os
from itertools import pairwise
from typing import Any

import torch

from data.pictures.positions import rotary_positions
from data.pictures.types import Pictures
from parallel.sharding import SINGLE, Place
from scripts.params import load_model
from tests.cases import run_config
from tests.tp_cases import here, model_of

GRIDS = ((4, 8), (6, 2))
STARTS, BORDERS = (3, 18), (0, 15, 27)


def turned(place: Place = SINGLE, recompute: Any = "none", flat: bool = False) -> torch.Tensor:
    """Log-probabilities of the tokens; `flat` leaves out where they stand in their pictures."""
    model = model_of(load_model("tiny_qwen2_vl", []), place, recompute)
    draw = torch.Generator().manual_seed(3)
    patches = torch.randn(sum(a * b for a, b in GRIDS), 3 * 2 * 7 * 7, generator=draw)
    tokens = torch.randint(0, 500, (BORDERS[-1] + 1,), generator=draw)
    counts = [a * b // 4 for a, b in GRIDS]
    slots = torch.cat([torch.arange(at, at + count) for at, count in zip(STARTS, counts, strict=True)])
    shapes = [(1, a // 2, b // 2) for a, b in GRIDS]
    places = [
        torch.from_numpy(rotary_positions(stop - start, [(at - start, shape)]))
        for start, stop, at, shape in zip(BORDERS, BORDERS[1:], STARTS, shapes, strict=False)
    ]
    told, _ = model(
        tokens[:-1],
        torch.cat([torch.arange(stop - start) for start, stop in pairwise(BORDERS)]),
        torch.tensor(BORDERS),
        targets_T=tokens[1:],
        output="log_probs",
        pictures=Pictures(patches, GRIDS, slots, torch.arange(sum(counts))),
        rotary_3T=None if flat else torch.cat(places, 1),
    )
    told.sum().backward()
    return told.detach()


def turned_in_pool(sequence_parallel: bool) -> torch.Tensor:
    return turned(here(sequence_parallel), "full")


def run_in(folder: str, words: list[str]) -> None:
    """``train.py`` with these command-line words, started in a folder."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        run_config(words)
    finally:
        os.chdir(before)
