"""Heads: what is computed from the last hidden states. Under sequence parallel they come as this rank's rows [R, D]."""

import torch
from torch import nn

from models.config import ModelConfig, Runtime
from parallel.collectives import gather_from, join_rows
from parallel.layers import parameter
from parallel.linear_loss import linear_loss
from parallel.matmul import linear
from parallel.sharding import REPLICATED, Place, Shard
from parallel.tensor_linear import column_linear
from parallel.vocab import token_log_probs


class LMHead(nn.Module):
    """Logits over the vocabulary, or straight the loss. `tied` is the embedding's parameter, registered here too."""

    def __init__(self, cfg: ModelConfig, place: Place, runtime: Runtime, tied: nn.Parameter | None) -> None:
        super().__init__()
        self.place, self.runtime, self.vocab = place, runtime, cfg.vocab_size
        shape = (cfg.vocab_size, cfg.hidden_size)
        self.weight = parameter(shape, Shard(0, (cfg.vocab_size,), pad=True), "normal", place) if tied is None else tied

    def forward(
        self,
        hidden_RD: torch.Tensor,
        targets_T: torch.Tensor | None = None,
        loss_weight: float = 1.0,
        temperature: float | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Logits of all rows, padding rows included, for the vocabulary [T, V]; with targets (loss_weight x loss sum,
        loss of each token), see `linear_loss`; with targets and a temperature their (log-probability, entropy), see
        `log_probs`. All in here, because ZeRO-3 gathers a module's weights for its forward only."""
        if targets_T is not None and temperature is not None:
            return self.log_probs(hidden_RD, targets_T, temperature)
        if targets_T is not None:
            chunk = self.runtime.loss_chunk
            return linear_loss(hidden_RD, self.weight, targets_T, loss_weight, chunk, self.place, vocab=self.vocab)
        logits = gather_from(self.columns(hidden_RD), self.place.tp)
        return logits if logits.shape[1] == self.vocab else logits[:, : self.vocab]

    def log_probs(
        self, hidden_RD: torch.Tensor, tokens_T: torch.Tensor, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability of each token and the entropy at it, see `parallel.vocab.token_log_probs`."""
        if temperature != 1.0:
            hidden_RD = hidden_RD / temperature
        chunk, keep = self.runtime.loss_chunk, self.runtime.loss_keep
        return token_log_probs(hidden_RD, self.weight, tokens_T, self.place, self.vocab, chunk, keep)

    def columns(self, hidden_RD: torch.Tensor) -> torch.Tensor:
        """Logits of all rows for this rank's part of the vocabulary, [T, ceil(V / tp)], padding included."""
        return column_linear(hidden_RD, self.weight, None, self.place)


class ScalarHead(nn.Module):
    """One number a token: a reward or a value. hidden [R, D] -> fp32, all rows [T], padding rows included."""

    def __init__(self, cfg: ModelConfig, place: Place) -> None:
        super().__init__()
        self.place = place
        self.weight = parameter((1, cfg.hidden_size), REPLICATED, "normal", place, place.splits_rows)

    def forward(self, hidden_RD: torch.Tensor) -> torch.Tensor:
        values = linear(hidden_RD, self.weight).squeeze(1).float()
        return join_rows(values, self.place.tp) if self.place.splits_rows else values
