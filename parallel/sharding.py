"""How a parameter is cut over the parallel axes: the record every parameter carries, which cuts and joins.

A fused parameter (q|k|v rows, gate|up rows) is several parts along one dim; each part is cut by itself, so that
rank r holds `[q_r | k_r | v_r]` and a layer works on its own heads without moving a row.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Axis:
    """One parallel axis as seen from this process: how many ranks, which one this is, and their process group."""

    size: int = 1
    rank: int = 0
    group: ProcessGroup | None = None


ALONE = Axis()


@dataclass(frozen=True)
class Place:
    """Where a model runs: the axes its layers are cut along, as seen from this process."""

    tp: Axis = field(default_factory=Axis)
    """Cuts layers: heads, feed-forward, vocabulary."""
    cp: Axis = field(default_factory=Axis)
    """Cuts the tokens of a micro-batch."""
    ep: Axis = field(default_factory=Axis)
    """Deals out the experts; its ranks hold different tokens."""
    sequence_parallel: bool = False
    """Between the tensor-parallel layers every tp rank keeps its rows of the hidden states only."""
    context: Literal["ulysses", "ring"] = "ring"
    """How attention reaches the tokens of other cp ranks."""

    @property
    def cut(self) -> "Cut":
        """Which part of each parameter this place holds."""
        return Cut(self.tp.size, self.tp.rank, self.ep.size, self.ep.rank)

    @property
    def splits_rows(self) -> bool:
        """Whether hidden states between layers are cut over tp (sequence parallel with more than one rank)."""
        return self.sequence_parallel and self.tp.size > 1


SINGLE = Place()
"""No cutting: one rank holds everything."""


@dataclass(frozen=True)
class Cut:
    """Which part of a whole parameter a rank holds."""

    tp: int = 1
    tp_rank: int = 0
    ep: int = 1
    ep_rank: int = 0


WHOLE = Cut()


@dataclass(frozen=True)
class Shard:
    """How the whole tensor is cut. `dim=None`: not over tp.

    `parts` are the sizes, in the whole tensor, of the fused chunks along `dim`; their sum is the whole size.
    """

    dim: int | None = None
    parts: tuple[int, ...] = ()
    units: tuple[int, ...] = ()
    """Things of each part that stay together (heads); empty where any row may be cut off. A part with fewer units than
    ranks is replicated: each unit lies on ranks / units neighbouring ranks, which must sum its gradients."""
    experts: bool = False
    """Dim 0 counts experts, dealt out over ep in consecutive blocks."""
    pad: bool = False
    """Where the ranks do not divide the part, the last ranks end in rows that are no rows of the whole (zeros)."""

    def local_parts(self, size: int) -> tuple[int, ...]:
        """Rows of each part that one of `size` ranks holds, padding included."""
        return tuple(self._local_part(i, size) for i in range(len(self.parts)))

    def _local_part(self, i: int, size: int) -> int:
        part = self.parts[i]
        if self.copies(i, size) > 1:
            return part // self.units[i]
        if self.pad:
            return -(-part // size)
        assert part % size == 0 and (not self.units or self.units[i] % size == 0), f"{self} is not cut in {size}"
        return part // size

    def copies(self, part: int, size: int) -> int:
        """On how many ranks each row of a part lies."""
        if not self.units or self.units[part] >= size:
            return 1
        assert size % self.units[part] == 0, f"{self}: {size} ranks do not share {self.units[part]} units"
        return size // self.units[part]

    def ranges(self, size: int, rank: int) -> list[tuple[int, int]]:
        """What `rank` of `size` holds of each part, as [start, stop) along `dim` of the whole."""
        held, first = [], 0
        for i, (part, local) in enumerate(zip(self.parts, self.local_parts(size), strict=True)):
            at = rank // self.copies(i, size) * local
            held.append((first + min(at, part), first + min(at + local, part)))
            first += part
        return held

    def local_shape(self, whole: Sequence[int], cut: Cut) -> tuple[int, ...]:
        """The shape a rank holds of a whole tensor of shape `whole`."""
        local = list(whole)
        if self.experts:
            assert whole[0] % cut.ep == 0, f"{whole[0]} experts are not dealt out over {cut.ep} ranks"
            local[0] //= cut.ep
        if self.dim is not None:
            assert sum(self.parts) == whole[self.dim], f"{self.parts} do not fill dim {self.dim} of {tuple(whole)}"
            local[self.dim] = sum(self.local_parts(cut.tp))
        return tuple(local)

    def whole_shape(self, local: Sequence[int], ep: int = 1) -> tuple[int, ...]:
        """The shape of the whole tensor, from the shape one rank holds."""
        shape = list(local)
        if self.experts:
            shape[0] *= ep
        if self.dim is not None:
            shape[self.dim] = sum(self.parts)
        return tuple(shape)

    def slice(self, whole: torch.Tensor, cut: Cut) -> torch.Tensor:
        """The part of a whole tensor that a rank holds. A view where one range is cut, a copy where several are."""
        shape = self.local_shape(whole.shape, cut)
        if self.experts:
            whole = whole.chunk(cut.ep)[cut.ep_rank]
        if self.dim is None or cut.tp == 1:
            return whole
        pieces = [whole.narrow(self.dim, a, b - a) for a, b in self.ranges(cut.tp, cut.tp_rank)]
        missing = shape[self.dim] - sum(piece.shape[self.dim] for piece in pieces)
        if missing:
            pieces.append(whole.new_zeros(*shape[: self.dim], missing, *shape[self.dim + 1 :]))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, self.dim)

    def merge(self, locals_: Mapping[Cut, torch.Tensor]) -> torch.Tensor:
        """Join the parts of all ranks into the whole tensor; the inverse of `slice`."""
        cut, first = next(iter(locals_.items()))
        if len(locals_) == 1:
            return first
        whole = first.new_empty(self.whole_shape(first.shape, cut.ep))
        for cut, local in locals_.items():
            self.put(whole, cut, local)
        return whole

    def put(self, whole: torch.Tensor, cut: Cut, local: torch.Tensor) -> None:
        """Write one rank's part to its place in the whole tensor."""
        block = whole.chunk(cut.ep)[cut.ep_rank] if self.experts else whole
        if self.dim is None:
            block.copy_(local)
            return
        at = 0
        for (start, stop), rows in zip(self.ranges(cut.tp, cut.tp_rank), self.local_parts(cut.tp), strict=True):
            block.narrow(self.dim, start, stop - start).copy_(local.narrow(self.dim, at, stop - start))
            at += rows

    def own(self, cut: Cut) -> Cut:
        """`cut` without the axes this tensor is not cut along."""
        tp = (cut.tp, cut.tp_rank) if self.dim is not None else (1, 0)
        ep = (cut.ep, cut.ep_rank) if self.experts else (1, 0)
        return Cut(*tp, *ep)

    def cuts(self, tp: int, ep: int) -> list[Cut]:
        """The different parts the tensor falls into on tp x ep ranks, each once."""
        tps = range(tp) if self.dim is not None else range(1)
        eps = range(ep) if self.experts else range(1)
        sizes = (tp if self.dim is not None else 1, ep if self.experts else 1)
        return [Cut(sizes[0], t, sizes[1], e) for e in eps for t in tps]


REPLICATED = Shard()


def set_layout(param: torch.nn.Parameter, shard: Shard, init: str, partial: bool = False) -> None:
    """Write on a parameter how it is cut (`shard`), how it is drawn (`init`, see `models/init.py`), and whether each tp
    rank's gradient is only a part of the whole (`partial`): the engine sums those over tp once a step."""
    for key, value in (("shard", shard), ("init", init), ("partial", partial)):
        setattr(param, key, value)


def shard_of(param: torch.Tensor) -> Shard:
    """The cut recorded on a parameter. A parameter without a record is our mistake."""
    return param.__dict__["shard"]


def init_of(param: torch.Tensor) -> str:
    """The name of the rule a parameter is drawn by."""
    return param.__dict__["init"]


def tie_ends(embedding: torch.nn.Parameter | None, head: torch.nn.Parameter | None, name: str) -> None:
    """Mark the copies of a tied parameter that the first and the last pipeline stage hold: the engine sums their
    gradients, and the head's copy counts and is saved under the embedding's name."""
    for param, end in ((embedding, "first"), (head, "last")):
        if param is not None:
            vars(param).update(twin=end, named=name)


def name_of(param: torch.Tensor, name: str) -> str:
    """The global name of a parameter that its module calls `name`."""
    return param.__dict__.get("named", name)


def keep(param: torch.nn.Parameter) -> None:
    """Freeze a parameter that belongs to what is trained: it is saved with it."""
    param.requires_grad_(False)
    vars(param)["kept"] = True


def belong_to_base(param: torch.nn.Parameter) -> None:
    """Undo `keep`: it is frozen, and saved with the model that an adapter is put on."""
    vars(param).pop("kept", None)


def is_kept(param: torch.Tensor) -> bool:
    """Whether a frozen parameter is saved with those that are trained."""
    return param.__dict__.get("kept", False)


def idle(param: torch.nn.Parameter) -> torch.nn.Parameter:
    """Mark a parameter that is there only because an optimizer must have one: it stays 0 and is saved nowhere."""
    vars(param)["idle"] = True
    return param


def is_idle(param: torch.Tensor) -> bool:
    """Whether a parameter only keeps an optimizer from being empty."""
    return param.__dict__.get("idle", False)


def is_partial(param: torch.Tensor) -> bool:
    """Whether the gradients of a replicated parameter must be summed over tp."""
    return param.__dict__["partial"]
