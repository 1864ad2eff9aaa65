"""What tests and the pools run for models that compare pictures and texts."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch

from data.pictures.types import Pictures
from models.config import ModelConfig
from models.dual.encoder import Encoded
from parallel.sharding import SINGLE, Place
from scripts.params import load_model
from tests.tp_cases import here, model_of

LENGTHS = (9, 7, 7, 4, 12)


def config(name: str, *changes: str) -> ModelConfig:
    """`tiny_clip` or `tiny_siglip`, wide enough in its draws that every weight matters."""
    return load_model(name, ["init_std=0.15", *changes])


def texts(lengths: tuple[int, ...] = LENGTHS, vocab: int = 512, last: int = 511) -> dict[str, Any]:
    """Packed texts of random tokens between 2 and the last but one, each ending in `last`."""
    draw = torch.Generator().manual_seed(1)
    each = [torch.randint(2, vocab - 1, (length,), generator=draw) for length in lengths]
    for text in each:
        text[-1] = last
    return {
        "tokens_T": torch.cat(each),
        "positions_T": torch.cat([torch.arange(length) for length in lengths]),
        "cu_seqlens": torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
    }


def pixels(tiles: int, side: int = 28) -> torch.Tensor:
    """Random pictures [B, 3, side, side]."""
    return torch.randn(tiles, 3, side, side, generator=torch.Generator().manual_seed(2))


def pictures_of(pixels: torch.Tensor, patch: int = 7) -> Pictures:
    """Pictures of one tile each, of which no token of a text tells."""
    tiles, side = len(pixels), pixels.shape[-1] // patch
    patches = pixels.unfold(2, patch, patch).unfold(3, patch, patch).permute(0, 2, 3, 1, 4, 5)
    nothing = torch.zeros(0, dtype=torch.int64)
    return Pictures(patches.reshape(tiles * side * side, -1), ((side, side),) * tiles, nothing, nothing)


def similarities(found: Encoded) -> torch.Tensor:
    """Of every picture with every text, [N, N]."""
    return found.scale * found.image_NW @ found.text_NW.T + found.bias


def seeds(count: int = len(LENGTHS)) -> torch.Tensor:
    """What the similarities are weighed with."""
    return torch.randn(count, count, generator=torch.Generator().manual_seed(3))


def encoded(name: str, place: Place = SINGLE, recompute: Any = "none", parts: int = 1) -> dict[str, Any]:
    """What a model makes of texts and pictures, and every gradient of their weighed similarities.

    Args:
        parts: the pairs come in so many micro-batches.
    """
    model = model_of(config(name), place, recompute)
    found = []
    for mine in torch.arange(len(LENGTHS)).chunk(parts):
        own = slice(int(mine[0]), int(mine[-1]) + 1)
        rows = torch.arange(sum(LENGTHS)).split(LENGTHS)[own]
        whole, at = texts(), torch.cat(rows)
        batch = {key: whole[key][at] for key in ("tokens_T", "positions_T")}
        batch["cu_seqlens"] = torch.tensor([0, *accumulate(LENGTHS[own])], dtype=torch.int32)
        found.append(model(**batch, pictures=pictures_of(pixels(len(LENGTHS))[own])))
    joined = Encoded(*(torch.cat([each[i] for each in found]) for i in (0, 1)), *found[0][2:])
    (similarities(joined) * seeds()).sum().backward()
    told = {key: value.detach() for key, value in joined._asdict().items()}
    return told | {"grads": {key: param.grad for key, param in model.named_parameters()}}


def encoded_in_pool(names: list[str]) -> dict[str, Any]:
    """Tensor parallel over the whole pool; layers are made again."""
    return {name: encoded(name, here(), "full") for name in names}
