"""Weights made of other weights: tensors renamed, cut out of packed ones, added as zeros, normalised or grown.

Every one is still read by rows and made when it is asked for, so that nothing is held.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch

from convert.boxes import Columns, Meta, Tensors

SHOWN = 5


class Recipe(Protocol):
    """How one tensor is made."""

    @property
    def sources(self) -> tuple[str, ...]:
        """The tensors it is made of."""
        ...

    def meta(self, of: Mapping[str, Meta]) -> Meta:
        """Its dtype and shape."""
        ...

    def rows(self, of: Tensors, start: int, stop: int) -> torch.Tensor:
        """Its rows [start, stop), all columns."""
        ...


@dataclass(frozen=True)
class Taken:
    """Rows [start, stop) of one tensor (`stop` None: to its end); all of them under another name is a renaming."""

    hf: str
    start: int = 0
    stop: int | None = None

    @property
    def sources(self) -> tuple[str, ...]:
        """The tensor it is taken from."""
        return (self.hf,)

    def meta(self, of: Mapping[str, Meta]) -> Meta:
        """Dtype and shape of the part."""
        dtype, (rows, *rest) = of[self.hf].dtype, of[self.hf].shape
        return Meta(dtype, ((rows if self.stop is None else self.stop) - self.start, *rest))

    def rows(self, of: Tensors, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of the part."""
        return of.rows(self.hf, self.start + start, self.start + stop)


@dataclass(frozen=True)
class Zeros:
    """A tensor of zeros, in the dtype of another."""

    shape: tuple[int, ...]
    like: str

    @property
    def sources(self) -> tuple[str, ...]:
        """It is made of nothing."""
        return ()

    def meta(self, of: Mapping[str, Meta]) -> Meta:
        """Its shape, and the dtype of the other tensor."""
        return Meta(of[self.like].dtype, self.shape)

    def rows(self, of: Tensors, start: int, stop: int) -> torch.Tensor:
        """Zeros."""
        return torch.zeros((stop - start, *self.shape[1:]), dtype=of.metas[self.like].dtype)


@dataclass(frozen=True)
class Normalised:
    """A matrix whose rows are divided by their length (at least 1e-12), counted in fp32."""

    hf: str

    @property
    def sources(self) -> tuple[str, ...]:
        """The matrix as it is stored."""
        return (self.hf,)

    def meta(self, of: Mapping[str, Meta]) -> Meta:
        """As the stored matrix."""
        return of[self.hf]

    def rows(self, of: Tensors, start: int, stop: int) -> torch.Tensor:
        """Rows of length 1, in the stored dtype."""
        rows = of.rows(self.hf, start, stop)
        return torch.nn.functional.normalize(rows.float()).to(rows.dtype)


@dataclass(frozen=True)
class Grown:
    """A matrix of `total` rows: those of another, some replaced, some added; `filler` where nothing else is said."""

    hf: str
    total: int
    placed: Mapping[int, torch.Tensor] = field(repr=False)
    filler: torch.Tensor = field(repr=False)

    @property
    def sources(self) -> tuple[str, ...]:
        """The matrix that grows."""
        return (self.hf,)

    def meta(self, of: Mapping[str, Meta]) -> Meta:
        """As the smaller matrix, with more rows."""
        return Meta(of[self.hf].dtype, (self.total, *of[self.hf].shape[1:]))

    def rows(self, of: Tensors, start: int, stop: int) -> torch.Tensor:
        """Old rows bit by bit, new ones converted to the stored dtype."""
        meta = of.metas[self.hf]
        old = min(stop, meta.shape[0])
        out = torch.empty((stop - start, *meta.shape[1:]), dtype=meta.dtype)
        if start < old:
            out[: old - start].copy_(of.rows(self.hf, start, old))
        out[max(0, old - start) :].copy_(self.filler)
        for row in range(start, stop):
            if row in self.placed:
                out[row - start].copy_(self.placed[row])
        return out


class Reshaped:
    """Tensors made of those of another by recipes. Is `convert.boxes.Tensors`."""

    def __init__(self, of: Tensors, recipes: Mapping[str, Recipe]) -> None:
        self.of, self.recipes = of, dict(recipes)
        self.metas = {name: recipe.meta(of.metas) for name, recipe in recipes.items()}

    def rows(self, hf: str, start: int, stop: int, columns: Columns | None = None) -> torch.Tensor:
        """Rows [start, stop) of one tensor, all columns or some."""
        rows = self.recipes[hf].rows(self.of, start, stop)
        return rows if columns is None else rows[:, slice(*columns)].clone()


def check_names(where: str, found: Mapping[str, Meta], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Compare names and shapes of weights with what their config.json promises.

    Raises:
        ValueError: tensors are missing, have another shape, or belong to another model; names the first five.
    """
    missing = [name for name in expected if name not in found]
    unused = [name for name in found if name not in expected]
    unequal = [
        f"{name}: {list(found[name].shape)} in the file, {list(shape)} by config.json"
        for name, shape in expected.items()
        if name in found and found[name].shape != shape
    ]
    said = [
        f"{len(names)} tensors {what}:{listed(names)}"
        for names, what in (
            (missing, "are missing"),
            (unequal, "have another shape"),
            (unused, "have no place in this model"),
        )
        if names
    ]
    if said:
        raise ValueError(f"the weights in {where} are not those its config.json describes:\n" + "\n".join(said))


def listed(lines: Iterable[str]) -> str:
    """The first five lines, and how many more there are; each on a line of its own."""
    every = list(lines)
    more = [f"... and {len(every) - SHOWN} more"] if len(every) > SHOWN else []
    return "".join(f"\n  {line}" for line in every[:SHOWN] + more)
