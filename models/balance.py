"""Which layers each pipeline stage gets: the cut whose heaviest stage (or rank) is lightest, found exactly.

Costs are times in units of a FLOP of a matrix product. The products of a step (`models/flops.py`) are a third each for
the output, the gradient of the input and the gradient of the weight. A frozen part makes no weight gradient; where
nothing before it is trained either, no gradient has to pass it, and only its forward is left. (Attention and what works
element by element have no weights to speak of.) The embedding is a look-up and counts nothing.

By FLOPs alone the head of the benchmark's model weighs 1.2 layers; it takes the time of 0.7 to 0.9, because its one
large product is the fastest part of a model. Measured on a CPU thread (hidden size 256 and 512, 1,024 tokens): products
at 120 to 150 GFLOP/s, causal attention over 512 and 1,024 tokens at 30 to 55, and beside them, for each token and
element of the hidden state, the time of 3,000 FLOPs in norms, rotation, SwiGLU and residuals: nothing to a large model.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from models.config import ModelConfig
from models.decoder import Chunk
from models.flops import step_flops
from parallel.config import ParallelConfig
from parallel.schedules import stage_ids

USUAL_ROW = 4096
ATTENTION_SLOWNESS = 3.0
"""Time of a FLOP of attention, in those of a product."""
ELEMENT_WISE = 3000.0
"""Time a layer spends beside products and attention, for each token and element of the hidden state."""


@dataclass(frozen=True)
class Costs:
    """Times of the parts of a model in one step, in any unit."""

    layers: tuple[float, ...]
    head: float = 0.0
    eyes: float = 0.0
    """Of tower and connector, before the first layer. With them a first stage may have no layer."""

    def stage(self, first: int, stop: int) -> float:
        """Of the layers [first, stop), with the head if they are the last; of the first stage without the eyes."""
        return sum(self.layers[first:stop]) + (self.head if stop == len(self.layers) else 0.0)

    @property
    def least(self) -> int:
        """Layers of the first stage, at least."""
        return 0 if self.eyes else 1


@dataclass(frozen=True)
class Trained:
    """Which parts of a model are trained."""

    layers: tuple[bool, ...]
    embedding: bool = True
    head: bool = True
    vision: bool = True


def costs_of(cfg: ModelConfig, row_length: int, trained: Trained | None = None) -> Costs:
    """The costs of a document of `row_length` tokens, each with a target."""

    def up_to(layers: int, lengths: list[int]) -> float:
        return step_flops(replace(cfg, num_layers=layers), lengths, row_length)

    # Layers differ in their windows and experts by their number, so each is what it adds to those before it.
    counts = range(cfg.num_layers + 1)
    whole = [b - a for a, b in pairwise([up_to(n, [row_length]) for n in counts])]
    products = [b - a for a, b in pairwise([up_to(n, [1] * row_length) for n in counts])]  # nothing to attend to
    beside = ELEMENT_WISE * cfg.hidden_size * row_length
    times = [p + ATTENTION_SLOWNESS * (w - p) + beside for w, p in zip(whole, products, strict=True)]
    head = up_to(0, [row_length])
    eyes = _eyes(cfg, row_length, trained is None or trained.vision)  # they stand before the first layer
    if trained is None:
        return Costs(tuple(times), head, eyes)
    passed, layers = trained.embedding, []
    for all_of_it, linear, learns in zip(times, products, trained.layers, strict=True):
        backward = 2 / 3 * all_of_it - (0.0 if learns else 1 / 3 * linear)
        layers.append(1 / 3 * all_of_it + (backward if passed or learns else 0.0))
        passed = passed or learns
    return Costs(tuple(layers), head * (1.0 if trained.head else 2 / 3 if passed else 1 / 3), eyes)


def _eyes(cfg: ModelConfig, row_length: int, trained: bool) -> float:
    """Time of the tower for a row, the connector's with it, which is small. How many pictures rows have is not known
    here: half of the tokens stand for some."""
    if cfg.vision is None:
        return 0.0
    tower, connector = cfg.vision.tower, cfg.vision.connector
    features = row_length / 2
    per_tile = cfg.vision.features_per_tile
    patches = features * (connector.block**2 if per_tile is None or tower.native else tower.grid**2 / per_tile)
    weights = tower.num_layers * tower.hidden_size * (4 * tower.hidden_size + 2 * tower.intermediate_size)
    return (6.0 if trained else 2.0) * weights * patches + ELEMENT_WISE * tower.hidden_size * patches


def split_layers(costs: Costs, stages: int) -> tuple[int, ...]:
    """Layers of each stage, at least one each (of a first one with eyes none): the heaviest stage is as light as it can
    be; of equals a more even cut."""
    layers = len(costs.layers)
    assert stages <= layers, f"{layers} layers do not fill {stages} stages"
    before = _starting_sums(costs)
    # best[stop] = (heaviest stage, sum of squares, cuts) of the layers before `stop` in the stages so far
    best: dict[int, tuple[float, float, tuple[int, ...]]] = {0: (0.0, 0.0, ())}
    for stage in range(stages):
        found: dict[int, tuple[float, float, tuple[int, ...]]] = {}
        last = layers if stage == stages - 1 else None
        least = 1 if stage else costs.least
        for first, (top, squares, cuts) in best.items():
            for stop in range(last or first + least, layers - (stages - stage - 1) + 1):
                cost = before[stop] - (before[first] if stage else 0.0)
                option = (max(top, cost), squares + cost * cost, (*cuts, stop - first))
                found[stop] = min(found.get(stop, option), option)
        best = found
    return best[layers][2]


def split_v(costs: Costs, ranks: int) -> tuple[int, ...]:
    """Layers of each of 2 x `ranks` stages, rank r holding stages r and 2 `ranks` - 1 - r: the heaviest rank is as
    light as it can be; of equals a more even cut. A first stage with eyes may have no layer."""
    layers = len(costs.layers)
    assert 2 * ranks <= layers, f"{layers} layers do not fill {2 * ranks} stages"
    before = _starting_sums(costs)
    bound = _heaviest_of_some_v(before, ranks, costs.least) * (1 + 1e-9)
    # From the outside in: best[first, stop] of what is left to cut = heaviest rank and sum of squares outside.
    best, steps = {(0, layers): (0.0, 0.0)}, []
    for inner in range(2 * (ranks - 1), -1, -2):
        outer = inner == 2 * (ranks - 1)
        least = costs.least if outer else 1
        found: dict[tuple[int, int], tuple[float, float]] = {}
        came: dict[tuple[int, int], tuple[int, int]] = {}
        for (first, stop), (top, squares) in best.items():
            for a in range(first + least, stop - inner):
                front = before[a] - (0.0 if outer else before[first])
                if front > bound:
                    break
                # What is left must fit the inner ranks; at least a layer each, and nothing if there are none.
                most = bisect_right(before, before[a] + bound * inner / 2) - 1 if inner else a
                for b in range(min(stop - 1, most), a + inner - 1, -1):
                    back = before[stop] - before[b]
                    if front + back > bound:
                        break
                    option = (max(top, front + back), squares + front * front + back * back)
                    if (a, b) not in found or option < found[a, b]:
                        found[a, b], came[a, b] = option, (first, stop)
        best = found
        steps.append(came)
    at, fronts, backs = min(best, key=best.__getitem__), [], []
    for came in reversed(steps):
        first, stop = came[at]
        fronts.append(at[0] - first)
        backs.append(stop - at[1])
        at = first, stop
    return (*reversed(fronts), *backs)


def _starting_sums(costs: Costs) -> list[float]:
    """Cost of everything before each border, the eyes in all of them; the head belongs to the last layer."""
    sums = [*accumulate(costs.layers, initial=costs.eyes)]
    sums[-1] += costs.head
    return sums


def _heaviest_of_some_v(before: list[float], ranks: int, least: int) -> float:
    """The heaviest rank of a good cut, so that the search for the best one leaves out whatever is heavier."""
    low, high = before[-1] / ranks * (1 - 1e-6), before[-1]  # no cut is heavier than everything
    while high - low > 1e-6 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if _fits_v(before, ranks, middle, least) else (middle, high)
    return high


def _fits_v(before: list[float], ranks: int, bound: float, least: int) -> bool:
    """Whether taking as much as fits from the back, for every share of the front, finds a cut within `bound`."""
    left = {0: len(before) - 1}  # first layer left -> the end of what is left
    for inner in range(2 * (ranks - 1), -1, -2):
        found: dict[int, int] = {}
        outer = inner == 2 * (ranks - 1)
        for first, stop in left.items():
            for a in range(first + (least if outer else 1), stop - inner):
                front = before[a] - (0.0 if outer else before[first])
                if front > bound:
                    break
                b = max(bisect_left(before, before[stop] - (bound - front)), a + inner)
                if b < stop and (inner or b == a):
                    found[a] = min(found.get(a, b), b)
        left = found
    return bool(left)


def stage_layers(cfg: ModelConfig, layout: ParallelConfig, row_length: int, trained: Trained | None) -> tuple[int, ...]:
    """Layers of each stage of the whole pipeline: as given by hand, else balanced."""
    stages = layout.pp * layout.stages_per_rank
    if layout.stage_layers is not None:
        given = layout.stage_layers
        assert len(given) == stages and sum(given) == cfg.num_layers and min(given[1:]) > 0, f"{given} were not checked"
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
