"""The decoder, written once for all families. Input is packed: [T] tokens, no batch dim.

A decoder may be only a chunk of the model (pipeline stage): some layers, with the embedding if it is the first and the
head if it is the last. Parameter names are the whole model's at any cut. With sequence parallel the hidden states
between layers are `[R, D]`, R = ceil(T / tp) rows of this rank; rows after T are padding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from models.blocks.attention import Attention, Packing
from models.blocks.branches import Branches, branch_context
from models.blocks.context import Context
from models.blocks.embedding import token_embedding
from models.blocks.mla import LatentAttention
from models.blocks.mlp import SwiGLU
from models.blocks.moe import MoE
from models.blocks.norm import RMSNorm
from models.blocks.rope import Rope
from models.blocks.router import Tokens
from models.blocks.virtual import Given, Longer, Prefix, Prompt, VirtualTokens, lengthened
from models.config import ModelConfig, Runtime
from models.heads import LMHead, ScalarHead
from models.vision.eyes import Connection, Pictures, build_eyes, read, see
from models.vision.gated import Reading
from parallel.sharding import SINGLE, Place, tie_ends

PLAIN = Runtime()


@dataclass(frozen=True)
class Chunk:
    """The layers [first, stop) of a model, with the embedding before or the head behind them where it says so."""

    first: int
    stop: int
    embeds: bool
    heads: bool

    @staticmethod
    def whole(cfg: ModelConfig) -> "Chunk":
        """All of the model."""
        return Chunk(0, cfg.num_layers, True, True)


class Layer(nn.Module):
    """Pre-norm attention and feed-forward, hidden [R, D] -> [R, D]."""

    def __init__(self, cfg: ModelConfig, index: int, place: Place, runtime: Runtime) -> None:
        super().__init__()
        self.selective = runtime.recompute == "selective"
        self.attn_norm = RMSNorm(cfg.hidden_size, cfg.norm_eps, place, place.splits_rows)
        self.attn = (
            LatentAttention(cfg, place, runtime.attention)
            if cfg.mla is not None
            else Attention(cfg, index, place, runtime.attention)
        )
        self.mlp_norm = RMSNorm(cfg.hidden_size, cfg.norm_eps, place, place.splits_rows)
        self.mlp = (MoE if cfg.is_moe(index) else SwiGLU)(cfg, place, self.selective)

    def forward(self, hidden_RD: torch.Tensor, packing: Packing, tokens: Tokens) -> torch.Tensor:
        normed, again = self.attn_norm(hidden_RD, self.selective)
        hidden_RD = self.attn(normed, hidden_RD, again, packing)
        normed, again = self.mlp_norm(hidden_RD, self.selective)
        if isinstance(self.mlp, MoE):
            return self.mlp(normed, hidden_RD, again, tokens)
        return self.mlp(normed, hidden_RD, again)


class Decoder(nn.Module):
    """Embedding, layers, final norm and head, or the chunk of them that `chunk` says."""

    def __init__(self, cfg: ModelConfig, place: Place, runtime: Runtime, chunk: Chunk) -> None:
        super().__init__()
        self.cfg, self.place, self.runtime, self.chunk = cfg, place, runtime, chunk
        self.rope = Rope(cfg)
        self.embed = token_embedding(cfg, place) if chunk.embeds else None
        self.virtual: VirtualTokens | None = None
        self.vision: nn.Module | None = None
        self.connector: Connection | None = None
        if cfg.vision is not None and chunk.embeds:
            again = runtime.recompute == "full"
            self.vision, self.connector = build_eyes(cfg.vision, cfg.hidden_size, place, again, cfg.num_layers)
        if cfg.tied_embeddings and cfg.head == "lm" and self.embed is not None and not chunk.heads:
            tie_ends(self.embed.weight, None, "embed.weight")
        # A dict by layer number, so that names stay those of the whole model.
        self.layers = nn.ModuleDict({str(i): Layer(cfg, i, place, runtime) for i in range(chunk.first, chunk.stop)})
        self.norm: RMSNorm | None = None
        self.head: LMHead | ScalarHead | None = None
        if chunk.heads:
            self.norm = RMSNorm(cfg.hidden_size, cfg.norm_eps, place, place.splits_rows)
        if chunk.heads and cfg.head == "lm":
            tied = self.embed.weight if cfg.tied_embeddings and self.embed is not None else None
            self.head = LMHead(cfg, place, runtime, tied)
            if cfg.tied_embeddings and tied is None:
                tie_ends(None, self.head.weight, "embed.weight")
        elif chunk.heads:
            self.head = ScalarHead(cfg, place)

    def forward(
        self,
        tokens_T: torch.Tensor,
        positions_T: torch.Tensor,
        cu_seqlens: torch.Tensor | Sequence[int],
        max_seqlen: int | None = None,
        targets_T: torch.Tensor | None = None,
        loss_weight: float = 1.0,
        output: Literal["hidden", "head", "log_probs"] = "hidden",
        channel_T: torch.Tensor | None = None,
        hidden_RD: torch.Tensor | None = None,
        temperature: float = 1.0,
        branches: Branches | None = None,
        pictures: Pictures | None = None,
        rotary_3T: torch.Tensor | None = None,
    ) -> Any:
        """Run packed documents.

        Args:
            tokens_T, positions_T: int64 [T]; positions restart at each document.
            cu_seqlens: borders of the documents, [N + 1], starting with 0 and ending with T; on the CPU. With context
                parallel of all ranks' tokens, of which those here are given (`parallel.context.token_ranges`).
            max_seqlen: longest document; taken from `cu_seqlens`, so it may be left out.
            targets_T: int64 [T], -100 where there is none; asks for the loss, or for log-probabilities.
            loss_weight: what the sum of token losses is multiplied with.
            output: without targets, the hidden states after the final norm [R, D] or what the head makes of them
                (logits [T, V], or values [T]). With targets, `log_probs` instead of the loss.
            channel_T: int64 [T], the channel of each token; routers count their loads by it.
            hidden_RD: what the chunk before gave; the first chunk takes the tokens instead.
            temperature: of the log-probabilities: those of `softmax(logits / temperature)`.
            branches: documents whose first tokens another one holds (`models.blocks.branches`); the borders are those
                of the tokens that are here.
            pictures: what the embedding's chunk sees.
            rotary_3T: int64 [3, T], time, row and column of each token, for a model whose `rope.sections` turn by them;
                without it all three are its position.

        Returns:
            The hidden states [R, D], from a chunk that is not the last. With targets: (`loss_weight` x loss sum, a
            differentiable scalar; loss of each token, detached fp32 [T]), or the log-probability of each target and the
            entropy there, both fp32 [T], differentiable, in nats, 0 without a target, the same on every tp rank. All
            weights are used inside module forwards, so that ZeRO-3 gathers them.
        """
        longer: Longer | None = None
        if isinstance(self.virtual, Prompt) and self.virtual.on:
            given = Given(tokens_T, positions_T, cu_seqlens, targets_T, channel_T, branches)
            longer = lengthened(given, self.virtual.count)
            tokens_T, positions_T, cu_seqlens, targets_T, channel_T, branches = longer.given
            if rotary_3T is not None:  # virtual tokens are text: those behind them count on
                moved = rotary_3T + self.virtual.count
                rotary_3T = positions_T.repeat(3, 1).index_copy_(1, longer.own_T, moved)
        packing, reading = self.packing_of(tokens_T, positions_T, cu_seqlens, branches, rotary_3T), None
        if self.embed is not None:
            missing = -tokens_T.shape[0] % self.place.tp.size if self.place.splits_rows else 0
            padded_T = F.pad(tokens_T, (0, missing)) if missing else tokens_T
            hidden_RD, reading = self._embedded(padded_T, pictures, packing.borders)
        if longer is not None and self.virtual is not None:
            hidden_RD = self.virtual(hidden_RD, longer.virtual_L)
        assert hidden_RD is not None, "only the first chunk begins with tokens"
        tokens = Tokens.of(tokens_T, packing.borders, channel_T, self.place, positions_T)
        hidden_RD = self._layers(hidden_RD, packing, tokens, reading)
        if self.norm is None or self.head is None:
            return hidden_RD
        hidden_RD = self.norm(hidden_RD)[0]
        if targets_T is not None:
            assert self.cfg.head == "lm", "targets are tokens: a scalar head has no loss of its own"
            asked = temperature if output == "log_probs" else None
            out = self.head(hidden_RD, targets_T, loss_weight, asked)
        elif output == "hidden":
            out = hidden_RD
        else:
            out = self.head(hidden_RD)
            out = out[: tokens_T.shape[0]] if self.place.splits_rows else out
        return out if longer is None else longer.cut(out)

    def _embedded(
        self, tokens_T: torch.Tensor, pictures: Pictures | None, borders: Sequence[int]
    ) -> tuple[torch.Tensor, Reading | None]:
        """The embedded tokens with what they show, or beside it what they read of it."""
        assert self.embed is not None
        hidden_RD, vision = self.embed(tokens_T), self.cfg.vision
        if self.vision is None or self.connector is None or vision is None:
            assert pictures is None, "a model without a vision tower sees no pictures"
            return hidden_RD, None
        if vision.cross is not None:
            return hidden_RD, read(hidden_RD, self.vision, self.connector, pictures, vision, borders)
        return see(hidden_RD, self.vision, self.connector, pictures, vision, self.place), None

    def _layers(
        self, hidden_RD: torch.Tensor, packing: Packing, tokens: Tokens, reading: Reading | None
    ) -> torch.Tensor:
        for number, layer in self.layers.items():
            if self.connector is not None and number in self.connector.gated:
                hidden_RD = self._run(self.connector.gated[number], hidden_RD, reading)
            hidden_RD = self._run(layer, hidden_RD, packing, tokens)
        return hidden_RD

    def _run(self, layer: nn.Module, hidden_RD: torch.Tensor, *given: Any) -> torch.Tensor:
        if self.runtime.recompute == "full" and torch.is_grad_enabled():
            out = checkpoint(layer, hidden_RD, *given, use_reentrant=False, preserve_rng_state=False)
            assert isinstance(out, torch.Tensor)
            return out
        return layer(hidden_RD, *given)

    def packing_of(
        self,
        tokens_T: torch.Tensor,
        positions_T: torch.Tensor,
        cu_seqlens: torch.Tensor | Sequence[int],
        branches: Branches | None = None,
        rotary_3T: torch.Tensor | None = None,
    ) -> Packing:
        """What all layers share for these documents, see `forward`."""
        borders = tuple(cu_seqlens.tolist()) if isinstance(cu_seqlens, torch.Tensor) else tuple(cu_seqlens)
        lengths = [b - a for a, b in pairwise(borders)]
        windows = {self.cfg.window(int(i)) for i in self.layers}
        place, context, here = self.place, None, lengths
        prefix = self.virtual.ahead if isinstance(self.virtual, Prefix) else 0
        if place.cp.size > 1:
            assert rotary_3T is None, "context parallel sees no pictures"
            context = Context.of(place.cp, place.context, borders, windows, tokens_T.device)
            here = context.lengths_here
        shared = branches is not None and any(tokens for _, tokens in branches)
        if shared or prefix:
            assert context is None, "under context parallel every document has all its tokens"
            turns = "keys that turn by their document's length cannot be shared"
            assert not shared or self.cfg.rope.scaling != "dynamic", turns
            context = branch_context(borders, branches, windows, tokens_T.device, prefix)
        assert borders[0] == 0 and sum(here) == tokens_T.shape[0], (
            f"borders {borders} not of {tokens_T.shape[0]} tokens"
        )
        if context is not None and context.kind == "ulysses":  # attention sees all tokens
            positions_T, here = torch.cat([torch.arange(n, device=tokens_T.device) for n in lengths]), lengths
        if prefix:
            positions_T, lengths = positions_T + prefix, [length + prefix for length in lengths]
            rotary_3T = None if rotary_3T is None else rotary_3T + prefix
        cos_TK, sin_TK = self.rope.tables(positions_T, lengths, here, rotary_3T)
        return Packing.of(cos_TK, sin_TK, borders, windows, context, prefix > 0)


def build(cfg: ModelConfig, place: Place = SINGLE, runtime: Runtime = PLAIN, chunk: Chunk | None = None) -> Decoder:
    """A decoder on the meta device: names, shapes and records of every parameter, no memory."""
    assert not cfg.compares, "a pair of encoders is no decoder"
    with torch.device("meta"):
        return Decoder(cfg, place, runtime, chunk or Chunk.whole(cfg))
