"""What a Q-Former has besides its queries to read texts: words, feed-forwards of their own, and the heads of its first
stage.

Source: Li et al. 2023, BLIP-2, section 3.2; Devlin et al. 2019 (the head over words).
Legend: T rows of texts, W width of the Q-Former, V words, P width of the space where both are compared.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from models.config import ModelConfig
from models.dual.encoder import LARGEST_SCALE
from models.vision.config import QFormerConfig
from models.vision.layers import FeedForward, LayerNorm, Linear
from parallel.collectives import gather_from
from parallel.layers import VocabEmbedding, parameter
from parallel.sharding import REPLICATED, Place, Shard
from parallel.tensor_linear import column_linear

IGNORED = -100


class Positions(nn.Module):
    """A learnt row for each place in a text: int64 [T] -> [T, W]."""

    def __init__(self, count: int, width: int, place: Place) -> None:
        super().__init__()
        self.weight = parameter((count, width), REPLICATED, "normal", place)

    def forward(self, positions_T: torch.Tensor) -> torch.Tensor:
        return F.embedding(positions_T, self.weight)


class TextLayer(nn.Module):
    """The feed-forward of texts in a layer whose attention they share with the queries."""

    def __init__(self, cfg: QFormerConfig, place: Place) -> None:
        super().__init__()
        self.mlp = FeedForward(cfg.hidden_size, cfg.intermediate_size, "gelu", place)
        self.mlp_norm = LayerNorm(cfg.hidden_size, cfg.norm_eps, place)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp_norm(self.mlp(x, x))


class WordHead(nn.Module):
    """The loss of the next word: a layer, a norm, and the words' own table with a bias.

    Args:
        words: the embedding's parameter, registered here too.
        chunk: rows whose logits exist at once.
    """

    def __init__(self, vocab: int, cfg: QFormerConfig, place: Place, words: nn.Parameter, chunk: int) -> None:
        super().__init__()
        self.place, self.vocab, self.chunk, self.weight = place, vocab, chunk, words
        self.dense = Linear(cfg.hidden_size, cfg.hidden_size, True, place)
        self.norm = LayerNorm(cfg.hidden_size, cfg.norm_eps, place)
        self.bias = parameter((vocab,), Shard(0, (vocab,), pad=True), "zeros", place)

    def forward(self, hidden_TW: torch.Tensor, targets_T: torch.Tensor, smoothing: float) -> torch.Tensor:
        """Cross-entropy of each target, fp32 [T]; 0 where there is none (-100).

        Args:
            smoothing: share of the target's probability that all words have in equal parts.
        """
        x = self.norm(F.gelu(self.dense(hidden_TW)))
        losses = []
        for rows, targets in zip(x.split(self.chunk), targets_T.split(self.chunk), strict=True):
            if torch.is_grad_enabled():
                found = checkpoint(
                    self._losses, rows, targets, smoothing, use_reentrant=False, preserve_rng_state=False
                )
                assert isinstance(found, torch.Tensor)
                losses.append(found)
            else:
                losses.append(self._losses(rows, targets, smoothing))
        return torch.cat(losses)

    def _losses(self, rows: torch.Tensor, targets: torch.Tensor, smoothing: float) -> torch.Tensor:
        return F.cross_entropy(
            self.logits(rows), targets, reduction="none", ignore_index=IGNORED, label_smoothing=smoothing
        )

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        """fp32 [T, V] of rows behind the norm."""
        own = column_linear(rows, self.weight, self.bias, self.place)
        return gather_from(own.float(), self.place.tp)[:, : self.vocab]


class TextSide(nn.Module):
    """Words and places, feed-forwards of the layers, and what is asked of the last layer."""

    def __init__(self, cfg: ModelConfig, own: QFormerConfig, place: Place, chunk: int) -> None:
        super().__init__()
        self.words = VocabEmbedding(cfg.vocab_size, own.hidden_size, "normal", place)
        self.positions = Positions(cfg.max_seq_len, own.hidden_size, place)
        self.layers = nn.ModuleList(TextLayer(own, place) for _ in range(own.num_layers))
        self.head = WordHead(cfg.vocab_size, own, place, self.words.weight, chunk)
        self.match = Linear(own.hidden_size, 2, True, place)
        self.image_proj = Linear(own.hidden_size, own.width, True, place)
        self.text_proj = Linear(own.hidden_size, own.width, True, place)
        self.temperature = Temperature(place)


class Temperature(nn.Module):
    """What similarities are multiplied with: learnt, its logarithm kept, at most 100 as in CLIP."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.scale = parameter((1,), REPLICATED, "clip_scale", place)

    def forward(self) -> torch.Tensor:
        return self.scale.float()[0].clamp(max=math.log(LARGEST_SCALE)).exp()
