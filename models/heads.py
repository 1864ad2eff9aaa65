"""Heads: what is computed from the last hidden states."""

import torch
from torch import nn

from models.config import ModelConfig
from parallel.collectives import copy_to, gather_from
from parallel.layers import parameter
from parallel.linear_loss import linear_loss
from parallel.matmul import linear
from parallel.sharding import REPLICATED, Place, Shard


class LMHead(nn.Module):
    """Logits over the vocabulary, or straight the loss. `tied` is the embedding's parameter, registered here too."""

    def __init__(self, cfg: ModelConfig, place: Place, loss_chunk: int, tied: nn.Parameter | None) -> None:
        super().__init__()
        self.place, self.loss_chunk = place, loss_chunk
        shape = (cfg.vocab_size, cfg.hidden_size)
        self.weight = parameter(shape, Shard(0, (cfg.vocab_size,), pad=True), "normal", place) if tied is None else tied

    def forward(
        self, hidden_TD: torch.Tensor, targets_T: torch.Tensor | None = None, loss_weight: float = 1.0
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Logits [T, V] of all tokens; with targets (loss_weight x loss sum, loss of each token), see `linear_loss`."""
        if targets_T is not None:
            return linear_loss(hidden_TD, self.weight, targets_T, loss_weight, self.loss_chunk, self.place.tp)
        return gather_from(linear(copy_to(hidden_TD, self.place.tp), self.weight), self.place.tp)


class ScalarHead(nn.Module):
    """One number a token: a reward or a value. hidden [T, D] -> fp32 [T]."""

    def __init__(self, cfg: ModelConfig, place: Place) -> None:
        super().__init__()
        self.weight = parameter((1, cfg.hidden_size), REPLICATED, "normal", place)

    def forward(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        return linear(hidden_TD, self.weight).squeeze(1).float()
