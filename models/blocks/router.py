"""The router: which experts a token goes to, with what weights, and what that costs in auxiliary losses.

Scores and choice are fp32 at every precision. The auxiliary losses never become part of the loss that is reported:
their gradient joins that of the weights in the backward (`_Attach`), so they work in any pipeline stage. What is
counted for the metrics is counted there too: once a micro-batch however often the layer is made again, never in
evaluation.
Sources: Shazeer et al. 2017; Fedus et al. 2021 (Switch, the balancing loss); Zoph et al. 2022 (z-loss); DeepSeek-AI
2024 (V2: groups; V3: correction bias, balance within a sequence); Qiu et al. 2025 (balance over the global batch).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from models.config import MoEConfig
from parallel.collectives import all_reduce
from parallel.context import token_ranges
from parallel.dropout import token_keys
from parallel.layers import parameter
from parallel.matmul import Again, linear
from parallel.sharding import REPLICATED, Place

TINY = 1e-20
"""Added to a sum of weights before it divides (DeepSeek-V3's value)."""


@dataclass(frozen=True)
class Tokens:
    """The tokens of a forward as routers see them: their documents and channels."""

    borders: tuple[int, ...]
    """Of all documents of the micro-batch, as in cu_seqlens."""
    count: int
    """Tokens on this rank, T."""
    device: torch.device
    channel_T: torch.Tensor | None
    place: Place
    words: tuple[torch.Tensor, torch.Tensor] | None = None
    """The tokens themselves and their positions, int64 [T]; only training asks for them."""

    @staticmethod
    def of(
        tokens_T: torch.Tensor,
        borders: Sequence[int],
        channel_T: torch.Tensor | None,
        place: Place,
        positions_T: torch.Tensor | None = None,
    ) -> "Tokens":
        """The tokens this rank has of the micro-batch with these document borders."""
        words = None if positions_T is None else (tokens_T, positions_T)
        return Tokens(tuple(borders), tokens_T.shape[0], tokens_T.device, channel_T, place, words)

    @cached_property
    def key_T(self) -> torch.Tensor:
        """int64 [T]: what tells each token apart in every layout (`parallel.dropout`)."""
        assert self.words is not None
        return token_keys(*self.words)

    @cached_property
    def place_T(self) -> torch.Tensor | None:
        """int64 [T]: where the tokens here stand among all of the micro-batch; None = here are all."""
        cp = self.place.cp
        if cp.size == 1:
            return None
        ranges = token_ranges(self.borders, cp.size, self.place.context)[cp.rank]
        return torch.cat([torch.arange(a, b) for a, b in ranges] or [torch.arange(0)]).to(self.device)

    @cached_property
    def length_N(self) -> torch.Tensor:
        """int64 [N]: tokens of each document, over all ranks."""
        return torch.tensor([b - a for a, b in pairwise(self.borders)], device=self.device)

    @cached_property
    def all_doc_T(self) -> torch.Tensor:
        """int64: the document of every token of the micro-batch."""
        return torch.arange(len(self.borders) - 1, device=self.device).repeat_interleave(self.length_N)

    @cached_property
    def doc_T(self) -> torch.Tensor:
        """int64 [T]: the document of each token here."""
        return self.all_doc_T if self.place_T is None else self.all_doc_T[self.place_T]


@dataclass(frozen=True)
class Choice:
    """Where tokens go. `kept_Tk` is None where every expert takes all that come."""

    weight_Tk: torch.Tensor
    expert_Tk: torch.Tensor
    kept_Tk: torch.Tensor | None


@dataclass
class Ledger:
    """What one router needs to know of a step and what it writes down in it (see `models/routing.py`)."""

    weight: float
    """What the sum over tokens of the auxiliary losses is multiplied with."""
    load_E: torch.Tensor
    """fp32: tokens each expert got of the last global batch over the even share."""
    by_channel: torch.Tensor
    """fp64 [C, E + 3]: choices of each expert; tokens; sum of their entropies; choices dropped."""
    overall: torch.Tensor
    """fp64 [E + 2]: sums over tokens of the probabilities, of the balancing loss by sequence, of the z-loss."""

    def add(self, by_channel: torch.Tensor, overall: torch.Tensor) -> None:
        """Count one micro-batch."""
        self.by_channel += by_channel
        self.overall += overall


class _Attach(torch.autograd.Function):
    """Identity on the weights; the backward gives `aux` its gradient and counts the micro-batch."""

    @staticmethod
    def forward(
        ctx: Any, weight_Tk: torch.Tensor, aux: torch.Tensor, ledger: Ledger, counted: tuple[torch.Tensor, ...]
    ) -> torch.Tensor:
        ctx.ledger, ctx.counted = ledger, counted
        return weight_Tk.view_as(weight_Tk)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        ctx.ledger.add(*ctx.counted)
        aux = grad.new_full((), ctx.ledger.weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        return grad, aux, None, None


class Router(nn.Module):
    """x [T, D] -> which `top_k` of the experts each token goes to, and with what weights.

    `weight [E, D]` and the correction `bias [E]` (a buffer, moved by `RouterBook`) are alike on all tp ranks: the rows
    that enter are all rows, so each rank has the whole gradient.
    """

    def __init__(self, hidden: int, moe: MoEConfig, place: Place) -> None:
        super().__init__()
        self.moe = moe
        self.weight = parameter((moe.num_experts, hidden), REPLICATED, "normal", place)
        self.bias: torch.Tensor | None
        self.register_buffer("bias", torch.zeros(moe.num_experts) if moe.correction_bias else None)
        self.ledger: Ledger | None = None
        """Set during a training step."""

    def forward(self, x_TD: torch.Tensor, again: Again | None, tokens: Tokens) -> Choice:
        moe = self.moe
        with torch.autocast(x_TD.device.type, enabled=False):
            logit_TE = linear(x_TD.float(), self.weight.float(), again=_in_fp32(x_TD, again))
            score_TE = logit_TE.softmax(1) if moe.score == "softmax" else logit_TE.sigmoid()
            expert_Tk = choose(score_TE.detach(), moe, self.bias)
            weight_Tk = score_TE.gather(1, expert_Tk)
            if moe.normalize:
                weight_Tk = weight_Tk / (weight_Tk.sum(1, keepdim=True) + TINY)
            if moe.scale != 1.0:
                weight_Tk = weight_Tk * moe.scale
            kept_Tk = within_capacity(expert_Tk, tokens, moe) if moe.capacity is not None else None
            if self.ledger is not None and weight_Tk.requires_grad:
                aux, counted = self._account(self.ledger, logit_TE, score_TE, expert_Tk, kept_Tk, tokens)
                weight_Tk = _Attach.apply(weight_Tk, aux, self.ledger, counted)
        return Choice(weight_Tk, expert_Tk, kept_Tk)

    def _account(
        self,
        ledger: Ledger,
        logit_TE: torch.Tensor,
        score_TE: torch.Tensor,
        expert_Tk: torch.Tensor,
        kept_Tk: torch.Tensor | None,
        tokens: Tokens,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """The sum over tokens of the weighted auxiliary losses (differentiable), and what is counted."""
        moe = self.moe
        prob_TE = score_TE if moe.score == "softmax" else score_TE / (score_TE.sum(1, keepdim=True) + TINY)
        prob_E = prob_TE.sum(0)
        square_T = logit_TE.logsumexp(1).square()
        by_sequence = prob_E.new_zeros(())
        if moe.balance_over == "sequence":
            by_sequence = (prob_TE * sequence_loads(expert_Tk, tokens, moe)[tokens.doc_T]).sum()
        balance = by_sequence if moe.balance_over == "sequence" else prob_E @ ledger.load_E
        aux = moe.balance_loss * balance + moe.z_loss * square_T.sum()
        with torch.no_grad():
            overall = torch.cat([prob_E, by_sequence.view(1), square_T.sum().view(1)]).double()
            entropy_T = torch.special.entr(prob_TE).sum(1)
            by_channel = _by_channel(ledger.by_channel, expert_Tk, kept_Tk, entropy_T, tokens.channel_T)
        return aux, (by_channel, overall)


def _in_fp32(x: torch.Tensor, again: Again | None) -> Again | None:
    """How the backward makes an fp32 input of the router that is not kept."""
    if again is not None:
        return Again(lambda *kept: again.fn(*kept).float(), again.tensors)
    return None if x.dtype is torch.float32 else Again(torch.Tensor.float, (x.detach(),))


def choose(score_TE: torch.Tensor, moe: MoEConfig, bias_E: torch.Tensor | None) -> torch.Tensor:
    """The `top_k` experts of each token, int64 [T, k], of its best groups; the bias counts for the choice only."""
    if bias_E is not None:
        score_TE = score_TE + bias_E
    if moe.groups > 1:
        inside_TGX = score_TE.unflatten(1, (moe.groups, -1))
        best_TG = inside_TGX.amax(2) if moe.group_score == "max" else inside_TGX.topk(2, 2)[0].sum(2)
        closed_TG = torch.ones_like(best_TG, dtype=torch.bool)
        closed_TG.scatter_(1, best_TG.topk(moe.groups_kept, 1)[1], False)
        score_TE = inside_TGX.masked_fill(closed_TG[:, :, None], float("-inf")).flatten(1)
    return score_TE.topk(moe.top_k, 1)[1]


@torch.no_grad()
def sequence_loads(expert_Tk: torch.Tensor, tokens: Tokens, moe: MoEConfig) -> torch.Tensor:
    """fp32 [N, E]: the choices each expert got of a document (all ranks' tokens) over its even share."""
    documents = len(tokens.borders) - 1
    count_NE = torch.zeros(documents * moe.num_experts, device=expert_Tk.device)
    at_Tk = tokens.doc_T[:, None] * moe.num_experts + expert_Tk
    count_NE.index_add_(0, at_Tk.flatten(), count_NE.new_ones(at_Tk.numel()))
    count_NE = all_reduce(count_NE, tokens.place.cp).view(documents, moe.num_experts)
    return count_NE * (moe.num_experts / moe.top_k / tokens.length_N.clamp(min=1))[:, None]


@torch.no_grad()
def within_capacity(expert_Tk: torch.Tensor, tokens: Tokens, moe: MoEConfig) -> torch.Tensor:
    """bool [T, k]: which choices their experts take.

    Of each document alone, so that it depends neither on what is packed beside it nor on the layout: an expert takes
    the first ceil(capacity x k x length / E) of the document's tokens that chose it. Earlier tokens are served first.
    """
    assert moe.capacity is not None
    k, here_T = moe.top_k, tokens.place_T
    if here_T is not None:  # a document's tokens may lie on several ranks: each learns all choices
        every = expert_Tk.new_zeros(tokens.borders[-1], k)
        every[here_T] = expert_Tk
        expert_Tk = all_reduce(every, tokens.place.cp)
    key_M = (tokens.all_doc_T[:, None] * moe.num_experts + expert_Tk).flatten()
    sorted_M, order_M = torch.sort(key_M, stable=True)
    first_M = torch.searchsorted(sorted_M, sorted_M)
    rank_M = torch.arange(len(key_M), device=key_M.device) - first_M
    takes_N = torch.ceil(moe.capacity * k * tokens.length_N / moe.num_experts)
    kept_M = torch.empty_like(key_M, dtype=torch.bool)
    kept_M[order_M] = rank_M < takes_N[sorted_M // moe.num_experts]
    kept_Tk = kept_M.view(-1, k)
    return kept_Tk if here_T is None else kept_Tk[here_T]


def _by_channel(
    like: torch.Tensor,
    expert_Tk: torch.Tensor,
    kept_Tk: torch.Tensor | None,
    entropy_T: torch.Tensor,
    channel_T: torch.Tensor | None,
) -> torch.Tensor:
    """fp64 [C, E + 3], as in `Ledger.by_channel`, of one micro-batch."""
    width, (tokens, k) = like.shape[1], expert_Tk.shape
    counted = torch.zeros(like.numel(), dtype=torch.float64, device=expert_Tk.device)
    channel_T = torch.zeros(tokens, dtype=torch.int64, device=counted.device) if channel_T is None else channel_T
    row_T = channel_T * width
    counted.index_add_(0, (row_T[:, None] + expert_Tk).flatten(), counted.new_ones(tokens * k))
    counted.index_add_(0, row_T + width - 3, counted.new_ones(tokens))
    counted.index_add_(0, row_T + width - 2, entropy_T.double())
    if kept_Tk is not None:
        counted.index_add_(0, row_T + width - 1, (~kept_Tk).sum(1).double())
    return counted.view_as(like)
