"""The textbook's bytes of one optimizer step of one rank, term by term.

Bytes are those of the whole tensor of a collective, and of what a rank sends in a message: what `traffic.Traffic`
counts. Numbers are for one rank, except where a term says "mean": it differs between ranks by what the data (routing)
or the slices of parameters (ZeRO) are, and is exact in the sum over the ranks of its group.

Sources: tensor parallel: Shoeybi et al. 2019, section 3; sequence parallel: Korthikanti et al. 2022, section 4.2.2;
ZeRO: Rajbhandari et al. 2020, section 7; ring: Liu et al. 2023; Ulysses: Jacobs et al. 2023; experts: Lepikhin et al.
2020 (GShard).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from parallel.config import EngineConfig, ParallelConfig

FP32, FP64, INT64 = 4, 8, 8


@dataclass(frozen=True)
class Term:
    """One line of the formula."""

    why: str
    kind: str
    axis: str
    """Name of the axis in `Groups`; "world" for all ranks."""
    bytes: float


@dataclass(frozen=True)
class Part:
    """What of the model is on a rank. Heads and sizes are the whole model's."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    """Layers here, those with experts too."""
    embeds: bool
    makes_loss: bool
    sends_forward: int
    """Stages here whose next stage is on another rank."""
    sends_backward: int
    """Stages here whose stage before is on another rank."""
    dense_bytes: int
    """Gradients of this rank's parameters but experts, fp32."""
    expert_bytes: int = 0
    """Those of experts, where they are dealt out over ep."""
    summed_bytes: int = 0
    """Gradients that several tp ranks have a part of, in the message that sums them."""
    tied_bytes: int = 0
    """The tied embedding here, where its other end is on another rank."""
    moe_layers: int = 0
    experts: int = 0
    top_k: int = 0
    shared_gate: bool = False


@dataclass(frozen=True)
class Micro:
    """What of a micro-batch is on a rank."""

    tokens: int
    """T, of this context-parallel rank."""
    all_tokens: int
    """Of all of them."""
    targets: int
    """Tokens with a target, S."""
    passed: tuple[int, ...] = ()
    """ring: rows of the blocks of keys this rank passes on, step by step; empty where no document is shared."""
    brought: tuple[int, ...] = ()
    """ring: rows of the blocks whose gradients it passes on."""


@dataclass(frozen=True)
class Step:
    """What decides the bytes of a step besides the rank's part and its micro-batches."""

    layout: ParallelConfig
    engine: EngineConfig
    world: int
    device: Literal["cpu", "cuda"] = "cpu"
    """On a CPU (gloo) all-to-alls stand for gathering rows, and for summing and cutting them: the same bytes."""

    @property
    def data(self) -> int:
        """dp x cp."""
        return self.world // (self.layout.tp * self.layout.pp)

    @property
    def scatter(self) -> str:
        """The kind of collective that sums and cuts rows."""
        return "all_to_all" if self.device == "cpu" else "reduce_scatter"

    @property
    def gather(self) -> str:
        """The kind of collective that makes rows whole."""
        return "all_to_all" if self.device == "cpu" else "all_gather"

    @property
    def again(self) -> bool:
        """Whether the backward runs each layer's forward once more. It ends with the layer's last product, so what is
        sent behind that is not sent again."""
        return self.engine.recompute == "full"


def expected(part: Part, micros: Sequence[Micro], step: Step) -> list[Term]:
    """All terms of a step; those of the same reason, kind and axis as one."""
    terms = [term for micro in micros for term in _of_micro_batch(part, micro, step)]
    terms += zero_terms(part, step, len(micros)) + once_terms(part, step)
    merged: dict[tuple[str, str, str], Term] = {}
    for term in terms:
        key = (term.why, term.kind, term.axis)
        before = merged.get(key)
        merged[key] = term if before is None else replace(term, bytes=before.bytes + term.bytes)
    return [term for term in merged.values() if term.bytes]


def _of_micro_batch(part: Part, micro: Micro, step: Step) -> list[Term]:
    terms = []
    if step.layout.tp > 1:
        rows = sequence_parallel_terms if step.layout.sequence_parallel else tensor_parallel_terms
        terms += rows(part, micro, step)
    if step.layout.pp > 1:
        terms += pipeline_terms(part, micro, step)
    if step.layout.cp > 1:
        terms += (ring_terms if step.layout.context == "ring" else ulysses_terms)(part, micro, step)
    if step.layout.ep > 1 and part.moe_layers:
        terms += expert_terms(part, micro, step)
    return terms


def tensor_parallel_terms(part: Part, micro: Micro, step: Step) -> list[Term]:
    """Two sums of all hidden states a layer forward, two of their gradients backward; one behind the embedding."""
    hidden = micro.tokens * part.hidden * FP32
    terms = [
        Term("layers, forward", "all_reduce", "tp", 2 * part.layers * hidden),
        Term("layers, backward", "all_reduce", "tp", 2 * part.layers * hidden),
        Term("layers made again", "all_reduce", "tp", step.again * part.layers * hidden),
        Term("embedding", "all_reduce", "tp", part.embeds * hidden),
        *_router_terms(part, micro, micro.tokens),
    ]
    if part.makes_loss:
        asked = micro.targets * part.hidden * FP32
        terms += [*_loss_terms(micro), Term("loss: hidden gradient", "all_reduce", "tp", asked)]
    return terms


def sequence_parallel_terms(part: Part, micro: Micro, step: Step) -> list[Term]:
    """Each sum is cut in two: rows gathered before, summed and scattered behind; rows are gathered once more for the
    weight gradient, which plain tensor parallel has kept. Experts keep theirs too: the router's rows are among them."""
    tp = step.layout.tp
    rows = -(-micro.tokens // tp) * tp
    hidden = rows * part.hidden * FP32
    kept = part.moe_layers  # blocks that do not gather their rows again
    terms = [
        Term("layers, forward", step.gather, "tp", 2 * part.layers * hidden),
        Term("layers, forward", step.scatter, "tp", 2 * part.layers * hidden),
        Term("layers, backward", step.gather, "tp", 2 * part.layers * hidden),
        Term("layers, backward", step.scatter, "tp", 2 * part.layers * hidden),
        Term("rows again for the weights", step.gather, "tp", (2 * part.layers - kept) * hidden),
        Term("layers made again", step.gather, "tp", step.again * 2 * part.layers * hidden),
        Term("layers made again", step.scatter, "tp", step.again * part.layers * hidden),
        Term("embedding", step.scatter, "tp", part.embeds * hidden),
        Term("embedding, backward", step.gather, "tp", part.embeds * hidden),
        *_router_terms(part, micro, rows),
    ]
    if part.makes_loss:
        terms += [
            Term("loss: hidden states", step.gather, "tp", hidden),
            *_loss_terms(micro),
            Term("loss: hidden gradient", step.scatter, "tp", hidden if micro.targets else 0),
        ]
    return terms


def _loss_terms(micro: Micro) -> list[Term]:
    """Of each token the largest logit, then the sum of the exponentials and the logit that was asked for."""
    return [Term("loss: softmax over the vocabulary", "all_reduce", "tp", 3 * micro.targets * FP32)]


def _router_terms(part: Part, micro: Micro, rows: int) -> list[Term]:
    """What the router gave to experts that are cut: the gradient of the k weights of a token; and that of the shared
    expert's gate, for all rows."""
    numbers = part.moe_layers * (micro.tokens * part.top_k + rows * part.shared_gate)
    return [Term("router weights, backward", "all_reduce", "tp", numbers * FP32)]


def pipeline_terms(part: Part, micro: Micro, step: Step) -> list[Term]:
    """A boundary between stages on different ranks: hidden states one way, their gradients the other."""
    rows = -(-micro.tokens // (step.layout.tp if step.layout.sequence_parallel else 1))
    hidden = rows * part.hidden * FP32
    return [
        Term("hidden states to the next stage", "send", "pp", part.sends_forward * hidden),
        Term("their gradients to the stage before", "send", "pp", part.sends_backward * hidden),
    ]


def ring_terms(part: Part, micro: Micro, step: Step) -> list[Term]:
    """Keys and values of every other rank pass by, again in the backward, with their gradients behind them."""
    row = 2 * max(part.kv_heads // step.layout.tp, 1) * part.head_dim * FP32 * part.layers
    return [
        Term("keys and values, forward", "send", "cp", (1 + step.again) * sum(micro.passed) * row),
        Term("keys and values, backward", "send", "cp", sum(micro.passed) * row),
        Term("their gradients", "send", "cp", sum(micro.brought) * row),
    ]


def ulysses_terms(part: Part, micro: Micro, step: Step) -> list[Term]:
    """q, k and v to the ranks of their heads, the result back; the same backward."""
    cp, tp = step.layout.cp, step.layout.tp
    heads, groups = part.heads // tp, max(part.kv_heads // tp, 1)
    width = heads + 2 * max(groups, cp)  # fewer heads than ranks: each goes to several
    scattered = micro.tokens * width * part.head_dim * FP32 * part.layers
    spread = micro.all_tokens * width // cp * part.head_dim * FP32 * part.layers
    gathered = micro.all_tokens * heads // cp * part.head_dim * FP32 * part.layers
    back = micro.tokens * heads * part.head_dim * FP32 * part.layers
    return [
        Term("q, k, v to their heads", "all_to_all", "cp", (1 + step.again) * scattered),
        Term("results to their tokens", "all_to_all", "cp", (1 + step.again) * gathered),
        Term("results, backward", "all_to_all", "cp", back),
        Term("q, k, v, backward", "all_to_all", "cp", spread),
    ]


def expert_terms(part: Part, micro: Micro, step: Step) -> list[Term]:
    """k rows of each token to their experts and back, forward and backward (mean: routing is not even)."""
    routed = part.moe_layers * micro.tokens * part.top_k
    hidden, weights = routed * part.hidden * FP32, routed * FP32
    counts = part.moe_layers * part.experts * INT64
    return [
        Term("counts of rows", "all_to_all", "ep", (1 + step.again) * counts),
        Term("rows to experts (mean)", "all_to_all", "ep", (1 + step.again) * (hidden + weights)),
        Term("rows from experts (mean)", "all_to_all", "ep", hidden),
        Term("their gradients, backward (mean)", "all_to_all", "ep", 2 * hidden + weights),
    ]


def zero_terms(part: Part, step: Step, micro_batches: int) -> list[Term]:
    """Gradients to their owners and weights back: 2 x the parameters; ZeRO 3 gathers before each forward and each
    backward instead, 3 x. ZeRO 2 and 3 hand gradients on with every micro-batch (under a pipeline, once)."""
    terms = []
    sizes = [("data", step.data, part.dense_bytes)]
    if part.expert_bytes:
        sizes.append(("expert_data", step.data // step.layout.ep, part.expert_bytes))
    times = micro_batches if step.engine.zero >= 2 else 1
    for axis, ranks, size in sizes:
        if ranks == 1:
            continue
        if step.engine.zero == 0:
            terms.append(Term("gradients", "all_reduce", axis, size))
        elif step.engine.zero < 3:
            terms.append(Term("gradients to their owners", "reduce", axis, times * size))
            terms.append(Term("weights back", "all_gather", axis, size))
        else:
            terms.append(Term("gradients to their owners", "reduce_scatter", axis, times * size))
            terms.append(Term("weights for forward and backward", "all_gather", axis, 2 * times * size))
    return terms


def once_terms(part: Part, step: Step) -> list[Term]:
    """What the layout owes the gradients between their reduction and the update."""
    terms = [Term("global norm", "all_reduce", "world", FP64 * (step.world > 1))]
    if step.layout.tp > 1:
        slices = step.data if step.engine.zero else 1
        terms.append(Term("gradients that tp ranks share (mean)", "all_reduce", "tp", part.summed_bytes / slices))
    if part.tied_bytes:
        terms.append(Term("tied embedding", "all_reduce", "ends", part.tied_bytes))
    return terms
