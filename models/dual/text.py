"""The text side of a model that compares: which rows the encoder sees, and which of them stands for the text.

Legend: T tokens of all texts, N texts, R rows that are encoded, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from models.blocks.pieces import Piece, pieces_of
from models.config import ModelConfig
from models.vision.config import PooledConfig, TowerConfig
from models.vision.tower_layers import Seen
from parallel.layers import parameter
from parallel.sharding import REPLICATED, Place


class Positions(nn.Module):
    """Learnt positions: [R] -> [R, D]."""

    def __init__(self, cfg: ModelConfig, place: Place) -> None:
        super().__init__()
        self.weight = parameter((cfg.max_seq_len, cfg.hidden_size), REPLICATED, "normal", place)

    def forward(self, positions_R: torch.Tensor) -> torch.Tensor:
        return nn.functional.embedding(positions_R, self.weight)


@dataclass(frozen=True)
class TextRows:
    """What the encoder sees of a micro-batch's texts."""

    tokens_R: torch.Tensor
    positions_R: torch.Tensor
    seen: Seen
    pooled_N: torch.Tensor
    """The row whose vector is the text's."""


def layer_config(cfg: ModelConfig) -> TowerConfig:
    """The layers of the text encoder, which are those of its tower: the activation is the tower's too."""
    assert cfg.vision is not None
    return TowerConfig(
        kind="clip",
        hidden_size=cfg.hidden_size,
        intermediate_size=cfg.intermediate_size,
        num_layers=cfg.num_layers,
        num_heads=cfg.num_heads,
        patch_size=1,
        image_size=1,
        norm_eps=cfg.norm_eps,
        activation=cfg.vision.tower.activation,
    )


def text_rows(
    cfg: ModelConfig, tokens_T: torch.Tensor, positions_T: torch.Tensor, borders: tuple[int, ...]
) -> TextRows:  # fmt: skip
    """Packed texts as the family reads them: CLIP each token and those before it, of which the last (the end of the
    text) has seen all; SigLIP all of a text that is filled up to `max_seq_len`, and its last place.

    Args:
        tokens_T, positions_T: int64 [T]
        borders: [N + 1]
    """
    device = tokens_T.device
    stops_N = torch.tensor(borders[1:], device=device)
    if cfg.family == "clip":
        return TextRows(tokens_T, positions_T, Seen(pieces_of(borders, None, device), causal=True), stops_N - 1)
    assert cfg.vision is not None and isinstance(cfg.vision.connector, PooledConfig)
    texts, length = len(borders) - 1, cfg.max_seq_len
    starts_N = torch.tensor(borders[:-1], device=device)
    text_T = torch.repeat_interleave(torch.arange(texts, device=device), stops_N - starts_N)
    tokens_R = tokens_T.new_full((texts * length,), cfg.vision.connector.pad_id)
    tokens_R = tokens_R.index_copy(0, text_T * length + positions_T, tokens_T)
    places_R = torch.arange(length, device=device).repeat(texts)
    last_N = torch.arange(1, texts + 1, device=device) * length - 1
    return TextRows(tokens_R, places_R, Seen((Piece(0, texts * length, 0, texts),)), last_N)
