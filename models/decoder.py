"""The decoder, written once for all families. Input is packed: [T] tokens, no batch dim."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from models.blocks.attention import Attention, Packing
from models.blocks.embedding import token_embedding
from models.blocks.mlp import SwiGLU
from models.blocks.norm import RMSNorm
from models.blocks.rope import Rope
from models.config import ModelConfig, Runtime
from models.heads import LMHead, ScalarHead
from parallel.sharding import SINGLE, Axis

PLAIN = Runtime()


class Layer(nn.Module):
    """Pre-norm attention and feed-forward, hidden [T, D] -> [T, D]."""

    def __init__(self, cfg: ModelConfig, index: int, axis: Axis, runtime: Runtime) -> None:
        super().__init__()
        self.selective = runtime.recompute == "selective"
        self.attn_norm = RMSNorm(cfg.hidden_size, cfg.norm_eps, axis)
        self.attn = Attention(cfg, index, axis, runtime.attention)
        self.mlp_norm = RMSNorm(cfg.hidden_size, cfg.norm_eps, axis)
        self.mlp = SwiGLU(cfg, axis, self.selective)

    def forward(self, hidden_TD: torch.Tensor, packing: Packing) -> torch.Tensor:
        normed, again = self.attn_norm(hidden_TD, self.selective)
        hidden_TD = self.attn(normed, hidden_TD, again, packing)
        normed, again = self.mlp_norm(hidden_TD, self.selective)
        return self.mlp(normed, hidden_TD, again)


class Decoder(nn.Module):
    """Embedding, layers, final norm and head."""

    def __init__(self, cfg: ModelConfig, axis: Axis, runtime: Runtime) -> None:
        super().__init__()
        self.cfg, self.runtime = cfg, runtime
        self.rope = Rope(cfg)
        self.embed = token_embedding(cfg, axis)
        self.layers = nn.ModuleList(Layer(cfg, i, axis, runtime) for i in range(cfg.num_layers))
        self.norm = RMSNorm(cfg.hidden_size, cfg.norm_eps, axis)
        self.head: LMHead | ScalarHead
        if cfg.head == "lm":
            self.head = LMHead(cfg, axis, runtime.loss_chunk, self.embed.weight if cfg.tied_embeddings else None)
        else:
            self.head = ScalarHead(cfg, axis)

    def forward(
        self,
        tokens_T: torch.Tensor,
        positions_T: torch.Tensor,
        cu_seqlens: torch.Tensor | Sequence[int],
        max_seqlen: int | None = None,
        targets_T: torch.Tensor | None = None,
        loss_weight: float = 1.0,
        output: Literal["hidden", "head"] = "hidden",
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Run packed documents.

        Args:
            tokens_T, positions_T: int64 [T]; positions restart at each document.
            cu_seqlens: borders of the documents, [N + 1], starting with 0 and ending with T; on the CPU.
            max_seqlen: longest document; taken from `cu_seqlens`, so it may be left out.
            targets_T: int64 [T], -100 where there is none; asks for the loss.
            loss_weight: what the sum of token losses is multiplied with.
            output: without targets, the hidden states after the final norm [T, D] or what the head makes of them
                (logits [T, V], or values [T]).

        Returns:
            With targets: (`loss_weight` x loss sum, a differentiable scalar; loss of each token, detached fp32 [T]).
            All weights are used inside module forwards, so that ZeRO-3 gathers them.
        """
        borders = tuple(cu_seqlens.tolist()) if isinstance(cu_seqlens, torch.Tensor) else tuple(cu_seqlens)
        assert borders[0] == 0 and borders[-1] == tokens_T.shape[0], (
            f"borders {borders} do not cover {tokens_T.shape[0]}"
        )
        lengths = [b - a for a, b in pairwise(borders)]
        cos_TK, sin_TK = self.rope.tables(positions_T, lengths)
        packing = Packing.of(cos_TK, sin_TK, borders, {self.cfg.window(i) for i in range(self.cfg.num_layers)})
        hidden_TD = self.embed(tokens_T)
        remake = self.runtime.recompute == "full" and torch.is_grad_enabled()
        for layer in self.layers:
            if remake:
                hidden_TD = checkpoint(layer, hidden_TD, packing, use_reentrant=False, preserve_rng_state=False)
            else:
                hidden_TD = layer(hidden_TD, packing)
        hidden_TD, _ = self.norm(hidden_TD)
        if targets_T is not None:
            assert self.cfg.head == "lm", "targets are tokens: a scalar head has no loss of its own"
            return self.head(hidden_TD, targets_T, loss_weight)
        return self.head(hidden_TD) if output == "head" else hidden_TD


def build(cfg: ModelConfig, axis: Axis = SINGLE, runtime: Runtime = PLAIN) -> Decoder:
    """A decoder on the meta device: names, shapes and records of every parameter, no memory."""
    with torch.device("meta"):
        return Decoder(cfg, axis, runtime)
