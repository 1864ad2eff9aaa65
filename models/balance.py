"""Which layers each pipeline stage gets: the cut whose heaviest stage (or rank) is lightest, found exactly.

Costs are the matrix products of a step (`models/flops.py`): a third each for the output, the gradient of the input and
the gradient of the weight. A frozen part makes no weight gradient; where nothing before it is trained either, no
gradient has to pass it, and only its forward is left. (Attention has no weights: two thirds of it are gradients of its
inputs.) The embedding is a look-up and counts nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from models.config import ModelConfig
from models.decoder import Chunk
from models.flops import step_flops
from parallel.config import ParallelConfig
from parallel.schedules import stage_ids

USUAL_ROW = 4096


@dataclass(frozen=True)
class Costs:
    """FLOPs of the parts of a model in one step, or anything in proportion to them."""

    layers: tuple[float, ...]
    head: float = 0.0

    def stage(self, first: int, stop: int) -> float:
        """Of the layers [first, stop), and the head if they are the last."""
        return sum(self.layers[first:stop]) + (self.head if stop == len(self.layers) else 0.0)


@dataclass(frozen=True)
class Trained:
    """Which parts of a model are trained."""

    layers: tuple[bool, ...]
    embedding: bool = True
    head: bool = True


def costs_of(cfg: ModelConfig, row_length: int, trained: Trained | None = None) -> Costs:
    """The costs of a document of `row_length` tokens, each with a target."""

    def up_to(layers: int, lengths: list[int]) -> float:
        return step_flops(replace(cfg, num_layers=layers), lengths, row_length)

    # Layers differ in their windows and experts by their number, so each is what it adds to those before it.
    counts = range(cfg.num_layers + 1)
    whole = [b - a for a, b in pairwise([up_to(n, [row_length]) for n in counts])]
    bare = [b - a for a, b in pairwise([up_to(n, [1] * row_length) for n in counts])]  # nothing to attend to
    head = up_to(0, [row_length])
    if trained is None:
        return Costs(tuple(whole), head)
    passed, layers = trained.embedding, []
    for all_of_it, linear, learns in zip(whole, bare, trained.layers, strict=True):
        backward = 2 / 3 * all_of_it - (0.0 if learns else 1 / 3 * linear)
        layers.append(1 / 3 * all_of_it + (backward if passed or learns else 0.0))
        passed = passed or learns
    return Costs(tuple(layers), head * (1.0 if trained.head else 2 / 3 if passed else 1 / 3))


def split_layers(costs: Costs, stages: int) -> tuple[int, ...]:
    """Layers of each stage, at least one each: the heaviest stage is as light as can be; of equals a more even cut."""
    layers = len(costs.layers)
    assert stages <= layers, f"{layers} layers do not fill {stages} stages"
    before = _starting_sums(costs)
    # best[stop] = (heaviest stage, sum of squares, cuts) of the layers before `stop` in the stages so far
    best: dict[int, tuple[float, float, tuple[int, ...]]] = {0: (0.0, 0.0, ())}
    for stage in range(stages):
        found: dict[int, tuple[float, float, tuple[int, ...]]] = {}
        last = layers if stage == stages - 1 else None
        for first, (top, squares, cuts) in best.items():
            for stop in range(last or first + 1, layers - (stages - stage - 1) + 1):
                cost = before[stop] - before[first]
                option = (max(top, cost), squares + cost * cost, (*cuts, stop - first))
                found[stop] = min(found.get(stop, option), option)
        best = found
    return best[layers][2]


def split_v(costs: Costs, ranks: int) -> tuple[int, ...]:
    """Layers of each of 2 x `ranks` stages, rank r holding stages r and 2 `ranks` - 1 - r: the heaviest rank is as
    light as it can be; of equals a more even cut."""
    layers = len(costs.layers)
    assert 2 * ranks <= layers, f"{layers} layers do not fill {2 * ranks} stages"
    before = _starting_sums(costs)
    even = _even(layers, 2 * ranks)
    edges = [0, *accumulate(even)]
    stage = [before[b] - before[a] for a, b in pairwise(edges)]
    bound = max(stage[r] + stage[-1 - r] for r in range(ranks)) * (1 + 1e-9)  # a cut no heavier than this exists
    # From the outside in: best[first, stop] = what is left to cut, with the heaviest rank, squares and cuts outside.
    best: dict[tuple[int, int], tuple[float, float, tuple[tuple[int, int], ...]]] = {(0, layers): (0.0, 0.0, ())}
    for rank in range(ranks):
        found: dict[tuple[int, int], tuple[float, float, tuple[tuple[int, int], ...]]] = {}
        inner = 2 * (ranks - rank - 1)
        for (first, stop), (top, squares, cuts) in best.items():
            for a in range(first + 1, stop - inner):
                front = before[a] - before[first]
                if front > bound:
                    break
                for b in range(stop - 1, a + inner - 1, -1) if inner else (a,):
                    back = before[stop] - before[b]
                    if front + back > bound:
                        break
                    if before[b] - before[a] > bound * inner / 2:
                        continue
                    option = (max(top, front + back), squares + front**2 + back**2, (*cuts, (a - first, stop - b)))
                    found[a, b] = min(found.get((a, b), option), option)
        best = found
    _, _, cuts = min(best.values())
    return (*(front for front, _ in cuts), *(back for _, back in reversed(cuts)))


def _starting_sums(costs: Costs) -> list[float]:
    """Cost of everything before each border; the head belongs to the last layer."""
    sums = [0.0, *accumulate(costs.layers)]
    sums[-1] += costs.head
    return sums


def _even(layers: int, stages: int) -> list[int]:
    return [layers * (s + 1) // stages - layers * s // stages for s in range(stages)]


def stage_layers(cfg: ModelConfig, layout: ParallelConfig, row_length: int, trained: Trained | None) -> tuple[int, ...]:
    """Layers of each stage of the whole pipeline: as given by hand, else balanced."""
    stages = layout.pp * layout.stages_per_rank
    if layout.stage_layers is not None:
        given = layout.stage_layers
        assert len(given) == stages and sum(given) == cfg.num_layers and min(given) > 0, f"{given} were not checked"
        return given
    costs = costs_of(cfg, row_length, trained)
    return split_v(costs, layout.pp) if layout.schedule == "zbv" else split_layers(costs, stages)


def chunks_of(
    cfg: ModelConfig, layout: ParallelConfig, rank: int, row_length: int | None = None, trained: Trained | None = None
) -> list[Chunk]:
    """The chunks of the model that a pipeline rank holds, in the order of the model.

    Args:
        row_length: tokens of a document to balance for; all ranks say the same. Layers differ by it only if they differ
            in their windows, but the head weighs less beside long attention.
        trained: what is trained; everything by default.
    """
    if layout.pp == 1:
        return [Chunk.whole(cfg)]
    row_length = row_length or min(cfg.max_seq_len, USUAL_ROW)
    counts = stage_layers(cfg, layout, row_length, trained)
    edges = [0, *accumulate(counts)]
    last = len(counts) - 1
    ids = stage_ids(layout.schedule, layout.pp, layout.stages_per_rank, rank)
    return [Chunk(edges[i], edges[i + 1], i == 0, i == last) for i in ids]
