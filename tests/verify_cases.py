"""What the pools run to test ``scripts/verify.py``: a record of a run, if asked with a fault planted in each process.

A fault is one a programmer could make: a sum that is left out, a mask that lets too much through, a token that counts
twice. It is in the layout's processes only, as it would be there only.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

import models.blocks.attention
import models.vision.eyes
import parallel.engine
import parallel.experts
import parallel.gradients
import parallel.layers
import parallel.tensor_linear
import trainer.channels
import trainer.loop
import trainer.sequences
import trainer.verify.record
from data.batch import IGNORED, MicroBatch
from models.config import ModelConfig
from parallel.collectives import Pending
from parallel.context import Kind
from parallel.layers import RowLinear
from parallel.matmul import Again
from parallel.sharding import Axis, Cut, Shard
from tests.cases import here
from trainer.config import RunConfig
from trainer.stages.dpo import Dpo
from trainer.stages.next_token import NextToken
from trainer.stages.pairs import num_pairs
from trainer.verify.record import record


def recorded(cfg: RunConfig, fault: str | None = None) -> bytes:
    """This process's record of the shrunk config, pickled by value."""
    groups = here(cfg.parallel)
    if fault is None:
        return pickle.dumps(record(cfg, groups))
    with FAULTS[fault]():
        return pickle.dumps(record(cfg, groups))


def _missing_all_reduce() -> mock._patch:
    """The second layer's feed-forward keeps each rank's part of its sum."""
    whole = RowLinear.forward
    calls: dict[int, int] = {}

    def forward(self: RowLinear, x: torch.Tensor, residual: torch.Tensor, again: Again | None = None) -> torch.Tensor:
        number = calls.setdefault(id(self), len(calls))  # attn, mlp, attn, mlp in the order of their first use
        if number != 3:
            return whole(self, x, residual, again)
        with mock.patch.object(parallel.layers, "leave", lambda x, place: x):
            return whole(self, x, residual, again)

    return mock.patch.object(RowLinear, "forward", forward)


def _missing_backward_sum() -> mock._patch:
    """Column-parallel layers give the layer before only their own part of its gradient."""
    return mock.patch.object(
        parallel.tensor_linear, "start_all_reduce", lambda tensor, axis: Pending(None, lambda: tensor)
    )


def _missing_partial_sum() -> mock._patch:
    """Norm weights keep the gradient of this rank's rows."""
    return mock.patch.object(parallel.engine, "sum_over_tp", lambda pieces, tp: None)


def _mask_leaks() -> mock._patch:
    """A document sees those before it."""
    true = models.blocks.attention.pieces_of
    return mock.patch.object(
        models.blocks.attention,
        "pieces_of",
        lambda borders, window, device: true((0, borders[-1]), window, device),
    )


def _swapped_kv_heads() -> mock._patch:
    """Key and value heads go to the other rank, when cut and when joined."""
    true = Shard.ranges

    def ranges(self: Shard, size: int, rank: int) -> list[tuple[int, int]]:
        held = true(self, size, rank)
        if self.units and self.units != (self.units[0],) * 3 and len(self.units) == 3:
            held[1:] = true(self, size, size - 1 - rank)[1:]
        return held

    return mock.patch.object(Shard, "ranges", ranges)


def _scaled_weight() -> mock._patch:
    """One rank's part of the output projections is 1 % too large."""
    true = Shard.slice

    def slice_(self: Shard, whole: torch.Tensor, cut: Cut) -> torch.Tensor:
        part = true(self, whole, cut)
        return part * 1.01 if self.dim == 1 and cut.tp_rank == 1 else part

    return mock.patch.object(Shard, "slice", slice_)


def _token_learnt_across_the_cut() -> mock._patch:
    """The last token on a cp rank learns the first of another document."""
    true = trainer.loop.local_part

    def local_part(batch: MicroBatch, cp: Axis, kind: Kind) -> MicroBatch:
        part = true(batch, cp, kind)
        if len(part.targets_T) and part is not batch:
            ends = (part.targets_T == IGNORED).nonzero().flatten()
            part.targets_T[ends[-1:]] = 1
        return part

    return mock.patch.object(trainer.loop, "local_part", local_part)


def _denominator_counts_twice() -> mock._patch:
    """Each of two cp ranks counts the targets of both."""
    true = NextToken.count
    return mock.patch.object(NextToken, "count", lambda self, batches: 2 * true(self, batches))


def _loss_reported_twice() -> mock._patch:
    """Every tp rank adds its loss to the channels'."""
    return mock.patch.object(parallel.engine.Engine, "_reported", lambda self, metrics: metrics)


def _stale_tied_end() -> mock._patch:
    """First and last stage each keep their own gradient of the tied embedding."""
    return mock.patch.object(parallel.engine.Engine, "_sum_tied_ends", lambda self: None)


def _rows_stay_with_their_experts() -> mock._patch:
    """Rows that went to the experts of another rank do not come back."""
    true = parallel.experts.Dispatch.from_experts

    def from_experts(self: parallel.experts.Dispatch, rows: torch.Tensor) -> torch.Tensor:
        back = true(self, rows)
        mine = torch.zeros_like(back)
        if self.ep.rank == 0:
            mine.copy_(back)
        return mine

    return mock.patch.object(parallel.experts.Dispatch, "from_experts", from_experts)


def _bias_on_every_rank() -> mock._patch:
    """Each tp rank adds the whole bias of a row-parallel layer before the sum."""
    true = parallel.layers.linear

    def forward(self: RowLinear, x: torch.Tensor, residual: torch.Tensor, again: Again | None = None) -> torch.Tensor:
        return parallel.layers.leave(true(x, self.weight, self.bias, again=again), self.place) + residual

    return mock.patch.object(RowLinear, "forward", forward)


def _shared_heads_keep_their_part() -> mock._patch:
    """The gradients of a key/value head that lies on several tp ranks are not summed over them."""
    return mock.patch.object(parallel.gradients, "shared_ranges", lambda param, tp: [])


def _norm_counts_twice() -> mock._patch:
    """The global norm takes replicated parameters once for each tp rank."""
    true = parallel.engine.global_norm
    return mock.patch.object(
        parallel.engine, "global_norm", lambda pieces, groups, holders: true(pieces, groups, holders) * 1.1
    )


def _pairs_count_on_every_rank() -> mock._patch:
    """Every rank that has a part of a pair counts it."""
    return mock.patch.object(Dpo, "count", lambda self, batches: float(sum(num_pairs(batch) for batch in batches)))


def _half_a_document() -> mock._patch:
    """The log-probability of an answer is that of this rank's tokens."""
    return mock.patch.object(trainer.sequences, "sum_over", lambda x, axis: x)


def _reference_of_the_policy() -> mock._patch:
    """The reference is given the weights that were asked for first, the policy's."""
    true, seeds = trainer.verify.record.UnevenSource, list[int]()

    def source(cfg: ModelConfig, seed: int) -> trainer.verify.record.UnevenSource:
        seeds.append(seed)
        return true(cfg, seeds[0])

    return mock.patch.object(trainer.verify.record, "UnevenSource", source)


def _pairs_reported_twice() -> mock._patch:
    """The columns of a pair are summed over ranks that have the same."""
    true = trainer.channels.local_sums

    def local_sums(*given: Any) -> trainer.channels.Sums:
        return {name: tuple(2 * x for x in row) for name, row in true(*given).items()}

    return mock.patch.object(trainer.channels, "local_sums", local_sums)


def _features_of_own_rows_only() -> mock._patch:
    """What a tp rank's rows say of a picture's features is not summed over tp."""
    return mock.patch.object(models.vision.eyes, "copy_to", lambda x, axis: x)


FAULTS: dict[str, Callable[[], mock._patch]] = {
    "missing_all_reduce": _missing_all_reduce,
    "missing_backward_sum": _missing_backward_sum,
    "missing_partial_sum": _missing_partial_sum,
    "mask_leaks": _mask_leaks,
    "swapped_kv_heads": _swapped_kv_heads,
    "scaled_weight": _scaled_weight,
    "token_learnt_across_the_cut": _token_learnt_across_the_cut,
    "denominator_counts_twice": _denominator_counts_twice,
    "loss_reported_twice": _loss_reported_twice,
    "stale_tied_end": _stale_tied_end,
    "rows_stay_with_their_experts": _rows_stay_with_their_experts,
    "bias_on_every_rank": _bias_on_every_rank,
    "shared_heads_keep_their_part": _shared_heads_keep_their_part,
    "norm_counts_twice": _norm_counts_twice,
    "pairs_count_on_every_rank": _pairs_count_on_every_rank,
    "half_a_document": _half_a_document,
    "reference_of_the_policy": _reference_of_the_policy,
    "pairs_reported_twice": _pairs_reported_twice,
    "features_of_own_rows_only": _features_of_own_rows_only,
}
"""Name -> a patch that plants it, to be entered."""
