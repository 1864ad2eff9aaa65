"""Which features go together: the rows the tests try one by one, and README's table made from the same rows.

python scripts/combinations.py            write the table into README.md
python scripts/combinations.py --check    exit code 1 when README.md has another one
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN, END = "<!-- combinations: written by scripts/combinations.py -->", "<!-- end of combinations -->"
PROCESSES = 8
MODELS = {"tiny_llama": set(), "tiny_mixtral": {"experts"}, "tiny_deepseek_v3": {"experts", "latent"}}
"""Models to try a pair on, the plainest first: the first one that has what both features need is taken."""
COMMON = ("model.num_layers=4", "data.global_batch_rows=64", "run.steps=10")


@dataclass(frozen=True)
class Feature:
    """Something a user may switch on: its name, the words that do it, and what the model must have for it.

    ``else_`` are words it wants where the other feature says nothing of their keys.
    """

    name: str
    words: tuple[str, ...] = ()
    needs: frozenset[str] = frozenset()
    else_: tuple[str, ...] = ()


SCHEDULES = ("gpipe", "1f1b", "interleaved", "zero_bubble", "zbv")
TP = Feature("tp", ("parallel.tp=2", "parallel.sequence_parallel=false"))
ROWS = Feature("tp + sequence parallel", ("parallel.tp=2", "parallel.sequence_parallel=true"))
PP = tuple(Feature(f"pp, {name}", ("parallel.pp=2", f"parallel.schedule={name}")) for name in SCHEDULES)
RING = Feature("cp, ring", ("parallel.cp=2", "parallel.context=ring"))
ULYSSES = Feature("cp, ulysses", ("parallel.cp=2", "parallel.context=ulysses"))
EP = Feature("ep", ("parallel.ep=2",), frozenset({"experts"}))
ZERO = tuple(Feature(f"ZeRO {stage}", (f"engine.zero={stage}",)) for stage in range(4))
OFFLOAD = Feature("optimizer offload", ("engine.offload_optimizer=true",))
RECOMPUTE = tuple(Feature(f"recompute {kind}", (f"engine.recompute={kind}",)) for kind in ("none", "selective", "full"))
PRECISION = tuple(Feature(kind, (f"engine.precision={kind}",)) for kind in ("fp32", "bf16", "fp16"))
ATTENTION = (
    *(Feature(f"attention {kind}", (f"engine.attention={kind}",)) for kind in ("sdpa", "eager")),
    Feature("attention flash_attn", ("engine.attention=flash_attn",), else_=("engine.precision=bf16",)),
)
PACKING = tuple(Feature(f"packing {kind}", (f"data.packing={kind}",)) for kind in ("best_fit", "none"))
TIED = Feature("tied embeddings", ("model.tied_embeddings=true",))
LATENT = Feature("latent attention (MLA)", (), frozenset({"latent"}))
FEATURES = (
    TP, ROWS, *PP, RING, ULYSSES, EP, *ZERO, OFFLOAD, *RECOMPUTE, *PRECISION, *ATTENTION, *PACKING, TIED, LATENT
)  # fmt: skip


@dataclass(frozen=True)
class Refused:
    """Pairs, one of each side, that ``trainer.config.check`` refuses, and why."""

    these: tuple[Feature, ...]
    those: tuple[Feature, ...]
    why: str

    def __contains__(self, pair: frozenset[Feature]) -> bool:
        one, other = tuple(pair)
        return (one in self.these and other in self.those) or (other in self.these and one in self.those)


REFUSED = (
    Refused(ZERO[2:], PP, "ZeRO 2 and 3 shard gradients as each backward ends; a pipeline has several under way"),
    Refused((ZERO[3],), (EP,), "ZeRO 3 shards every weight over all data-parallel ranks, and those of ep differ"),
    Refused((ZERO[0],), (OFFLOAD,), "only partitioned optimizer states are offloaded (ZeRO 1 to 3)"),
    Refused(ATTENTION[1:], (RING,), "ring attention joins blocks of keys inside torch's fused kernels"),
    Refused((ATTENTION[2],), (PRECISION[0],), "flash-attn computes in bf16 and fp16"),
)


def why_refused(one: Feature, other: Feature) -> int | None:
    """The row of ``REFUSED`` a pair is in, counted from 1; None when the two work together."""
    return next((i for i, row in enumerate(REFUSED, 1) if frozenset((one, other)) in row), None)


def words(*features: Feature) -> list[str] | None:
    """The command line with all these features on; None where they are alternatives (one key, two values)."""
    needs = frozenset().union(*(feature.needs for feature in features))
    model = next(name for name, has in MODELS.items() if needs <= has)
    chosen: dict[str, str] = {}
    for word in (word for feature in features for word in feature.words):
        key, _, value = word.partition("=")
        if chosen.setdefault(key, value) != value:
            return None
    for word in (word for feature in features for word in feature.else_):
        key, _, value = word.partition("=")
        chosen.setdefault(key, value)
    return [f"model={model}", *COMMON, *(f"{key}={value}" for key, value in chosen.items())]


def pairs() -> Iterator[tuple[Feature, Feature, list[str]]]:
    """Every two features that can be on at once, with the words that do it."""
    for one, other in combinations(FEATURES, 2):
        given = words(one, other)
        if given is not None:
            yield one, other, given


# ---- the table ----------------------------------------------------------------------------------------------------

COLUMNS = {"tp": (TP,), "tp + sp": (ROWS,), "pp": PP, "cp ring": (RING,), "cp ulysses": (ULYSSES,), "ep": (EP,)}
LINES: dict[str, Sequence[Feature]] = {
    "tp": (TP,),
    "tp with sequence parallel": (ROWS,),
    f"pp: {', '.join(SCHEDULES)}": PP,
    "cp ring": (RING,),
    "cp ulysses": (ULYSSES,),
    "ep": (EP,),
    "ZeRO 0, 1": ZERO[:2],
    "ZeRO 2": ZERO[2:3],
    "ZeRO 3": ZERO[3:],
    "optimizer offload": (OFFLOAD,),
    "recompute: none, selective, full": RECOMPUTE,
    "fp32, bf16, fp16": PRECISION,
    "attention: sdpa": ATTENTION[:1],
    "attention: eager, flash_attn": ATTENTION[1:],
    "packing: best_fit, none": PACKING,
    "tied embeddings": (TIED,),
    "latent attention (MLA)": (LATENT,),
}
"""Rows of the table; features in one row must get the same mark everywhere."""


def cell(these: Sequence[Feature], those: Sequence[Feature]) -> str:
    """Whether all pairs of two sides work: a tick, the number of the reason, or a dash for alternatives."""
    marks = set()
    for one in these:
        for other in those:
            if one != other and words(one, other) is not None:
                reason = why_refused(one, other)
                marks.add("✓" if reason is None else str(reason))
    assert len(marks) <= 1, f"one cell says {marks} for {these[0].name} and {those[0].name}"
    return next(iter(marks), "–")


def table() -> str:
    """The region of README.md, without its markers."""
    lines = [f"| | {' | '.join(COLUMNS)} |", f"|---|{'---|' * len(COLUMNS)}"]
    for name, features in LINES.items():
        lines.append(f"| {name} | {' | '.join(cell(features, column) for column in COLUMNS.values())} |")
    lines += ["", "✓ works; – an alternative; a number: refused before start, for this reason:", ""]
    for number, row in enumerate(REFUSED, 1):
        sides = " with ".join(_named(side) for side in (row.these, row.those))
        lines.append(f"{number}. {sides}: {row.why}.")
    return "\n".join(lines)


def _named(side: Sequence[Feature]) -> str:
    return "pp" if side == PP else " and ".join(feature.name for feature in side)


def readme() -> str:
    """README.md with the table as it should be."""
    before, begin, rest = README.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin and end, f"README.md has no region between {BEGIN} and {END}"
    return f"{before}{begin}\n{table()}\n{end}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 when it is out of date")
    check = parser.parse_args().check
    text = readme()
    stale = README.read_text() != text
    if stale:
        print(f"README.md: the table of combinations {'is out of date' if check else 'written'}")
    if stale and not check:
        README.write_text(text)
    return 1 if check and stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
