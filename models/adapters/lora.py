"""Linear layers with adapters of low rank. They take the place of the plain ones and share their weights."""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import nn

from models.adapters.config import LoraConfig
from models.adapters.targets import Layer, Linear, take_over
from models.blocks.mla import DownLinear
from parallel.collectives import all_reduce, leave
from parallel.dropout import Dropout
from parallel.layers import ColumnLinear, RowLinear, parameter
from parallel.low_rank import Beside, Packed, frozen_linear
from parallel.matmul import Again
from parallel.nf4 import Nf4, pack_
from parallel.sharding import REPLICATED, SINGLE, Place, Shard, keep, shard_of
from parallel.switch import Switch

Pair = tuple[torch.Tensor, torch.Tensor]


class LowRank(nn.Module):
    """The parameters of the adapters of one layer, cut as the layer is. `layer.chosen` is not empty.

    `a` [n r, I] and `b` [outputs of the n adapted parts, r]; `magnitude` [outputs] with DoRA; `start_a`, `start_b`,
    frozen, with PiSSA: what was taken out of the weight.
    """

    def __init__(self, layer: Layer, base: Linear, cfg: LoraConfig, place: Place) -> None:
        super().__init__()
        shard, r = shard_of(base.weight), cfg.rank
        ends = list(accumulate(layer.outputs_here(shard, place.tp.size), initial=0))
        self.beside = Beside(cfg.scale, tuple((ends[i], ends[i + 1]) for i in layer.chosen))
        self.outputs = ends[-1]
        outputs = sum(layer.runs)
        # Whole over tp, a parameter's gradient is a part where ranks see other outputs, inputs or rows.
        by_rows = place.splits_rows if isinstance(base, DownLinear) else True
        of_a = Shard(1, (layer.inputs,)) if shard.dim == 1 else REPLICATED
        of_b = Shard(0, layer.runs, layer.units) if shard.dim == 0 else REPLICATED

        def pair() -> tuple[nn.Parameter, nn.Parameter]:
            a = parameter((len(layer.chosen) * r, layer.inputs), of_a, "adapter", place, by_rows and shard.dim != 1)
            return a, parameter((outputs, r), of_b, "adapter", place, by_rows and shard.dim != 0)

        self.a, self.b = pair()
        partial = by_rows and shard.dim != 0
        self.magnitude = parameter((outputs,), of_b, "adapter", place, partial) if cfg.dora else None
        self.start_a, self.start_b = pair() if cfg.init == "pissa" else (None, None)
        for start in (self.start_a, self.start_b):
            if start is not None:
                keep(start)

    def factor(self, weight: torch.Tensor, place: Place | None) -> torch.Tensor:
        """DoRA: what each output here is multiplied with, [O]; 1 where there is no adapter.

        magnitude / |row of W + s B A|, of which only the magnitude is trained. The product B A is not made: the square
        of a row is |w|^2 + 2 s <w, b A> + s^2 b (A A^T) b. `place` is given where rows are cut over tp.
        """
        assert self.magnitude is not None
        with torch.no_grad():
            a, b, s = self.a.float(), self.b.float(), self.beside.scale
            factors = a.chunk(len(self.beside.spans))
            squares, grams = [], []
            for (start, stop), a_i, b_i in zip(self.beside.spans, factors, self.beside.rows(b), strict=True):
                rows = weight[start:stop].float()
                cross = (b_i * (rows @ a_i.t())).sum(1)
                squares.append(rows.square().sum(1) + 2 * s * cross)
                grams.append(a_i @ a_i.t())
            if place is not None:
                message = torch.cat([*squares, *(gram.flatten() for gram in grams)])
                parts = all_reduce(message, place.tp).split([t.numel() for t in (*squares, *grams)])
                squares = list(parts[: len(squares)])
                grams = [part.view_as(gram) for part, gram in zip(parts[len(squares) :], grams, strict=True)]
            own = [((b_i @ gram) * b_i).sum(1) for b_i, gram in zip(self.beside.rows(b), grams, strict=True)]
            norm = torch.cat([(w + s * s * d).sqrt() for w, d in zip(squares, own, strict=True)])
        found, at, end = [], 0, 0
        for start, stop in self.beside.spans:
            found += [norm.new_ones(start - end), self.magnitude[at : at + stop - start] / norm[at : at + stop - start]]
            at, end = at + stop - start, stop
        return torch.cat([*found, norm.new_ones(self.outputs - end)])


class Adapter(Switch):
    """What an adapted layer has beside its weight: adapters, or none over a weight in 4 bits."""

    def __init__(self, low_rank: LowRank | None, nf4: bool, dropout: Dropout | None = None) -> None:
        super().__init__()
        self.low_rank, self.nf4, self.dropout = low_rank, nf4, dropout
        self.packed: Nf4 | None = None

    def pair(self) -> Pair | None:
        """The adapters to compute with now. Switched off, PiSSA's are those of the start: the model it started from."""
        low_rank = self.low_rank
        if low_rank is None:
            return None
        if self.on:
            return low_rank.a, low_rank.b
        return None if low_rank.start_a is None or low_rank.start_b is None else (low_rank.start_a, low_rank.start_b)

    def product(
        self,
        base: Linear,
        x: torch.Tensor,
        again: Again | None,
        place: Place = SINGLE,
        bias: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The layer's outputs, of a row layer without the sum over tp."""
        weight: torch.Tensor | Packed = base.weight if self.packed is None else self.packed
        low_rank = self.low_rank
        beside = low_rank.beside if low_rank is not None else Beside(1.0, ())
        kept = self.dropout.kept(x) if self.dropout is not None and self.on else None
        if low_rank is None or low_rank.magnitude is None or not self.on:
            return frozen_linear(x, weight, self.pair(), beside, bias, residual, again, place, kept)
        # Dropout goes before the weight too where that is part of what is turned, as in `peft`.
        inside, again = (x, again) if kept is None else (kept.of(x), None)
        out = frozen_linear(inside, weight, self.pair(), beside, again=again, place=place)
        cut = base.place if isinstance(base, AdaptedRow) and base.place.tp.size > 1 else None
        whole = base.weight if self.packed is None else self.packed.dense(torch.float32)
        out = out * low_rank.factor(whole, cut).to(out.dtype)
        if kept is not None:
            out = out + frozen_linear(x - inside, weight, None, beside, place=place)
        out = out if bias is None else out + bias
        return out if residual is None else residual + out


class _Adapted(nn.Module):
    """The part that all adapted layers share."""

    adapter: Adapter
    weight: nn.Parameter

    def pack(self) -> None:
        """Called when the weight was filled: puts it into 4 bits where it is to be."""
        if self.adapter.nf4:
            self.adapter.packed = pack_(self.weight)


class AdaptedColumn(_Adapted, ColumnLinear):
    """`ColumnLinear` with adapters."""

    def __init__(self, base: ColumnLinear, adapter: Adapter) -> None:
        take_over(self, base, adapter)
        self.place = base.place

    def forward(self, x: torch.Tensor, again: Again | None = None) -> torch.Tensor:
        return self.adapter.product(self, x, again, self.place, self.bias)


class AdaptedDown(_Adapted, DownLinear):
    """`DownLinear` with adapters."""

    def __init__(self, base: DownLinear, adapter: Adapter) -> None:
        take_over(self, base, adapter)

    def forward(self, x: torch.Tensor, again: Again | None = None) -> torch.Tensor:
        return self.adapter.product(self, x, again, bias=self.bias)


class AdaptedRow(_Adapted, RowLinear):
    """`RowLinear` with adapters."""

    place: Place

    def __init__(self, base: RowLinear, adapter: Adapter) -> None:
        take_over(self, base, adapter)
        self.place = base.place

    def forward(self, x: torch.Tensor, residual: torch.Tensor, again: Again | None = None) -> torch.Tensor:
        if self.place.tp.size == 1:
            return self.adapter.product(self, x, again, bias=self.bias, residual=residual)
        out = leave(self.adapter.product(self, x, again), self.place)
        if self.bias is not None:
            out = out + self.bias
        return residual + out


def adapted(base: Linear, low_rank: LowRank | None, nf4: bool, dropout: Dropout | None = None) -> Linear:
    """The layer with adapters that takes the place of a plain one."""
    adapter = Adapter(low_rank, nf4, dropout)
    if isinstance(base, ColumnLinear):
        return AdaptedColumn(base, adapter)
    return AdaptedRow(base, adapter) if isinstance(base, RowLinear) else AdaptedDown(base, adapter)
