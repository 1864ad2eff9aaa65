"""Pipeline schedules by name: which stages a rank holds, how many micro-batches each needs, how long it idles.

The order of work is that of `torch.distributed.pipelining`:

| name          | source                                                                                         |
|---------------|------------------------------------------------------------------------------------------------|
| `gpipe`       | Huang et al. 2019, GPipe: all forwards, then all backwards                                     |
| `1f1b`        | Narayanan et al. 2021 (PipeDream-flush): as gpipe, with at most pp micro-batches kept          |
| `interleaved` | Narayanan et al. 2021 (Megatron-LM): vpp stages a rank, stage s on rank s mod pp               |
| `zero_bubble` | Qi et al. 2023 (ZB-H1), with vpp stages a rank: weight gradients fill the gaps                 |
| `zbv`         | Qi et al. 2023 (ZB-V): rank r holds stages r and 2 pp - 1 - r, weight gradients fill the gaps  |
"""

from __future__ import annotations

from typing import Literal

Name = Literal["gpipe", "1f1b", "interleaved", "zero_bubble", "zbv"]


def stage_ids(schedule: Name, pp: int, vpp: int, rank: int) -> tuple[int, ...]:
    """The stages a pipeline rank holds, in the order of the model; of pp x vpp in all."""
    if schedule == "zbv":
        assert vpp == 2, "a V has two arms"
        return rank, 2 * pp - 1 - rank
    return tuple(range(rank, pp * vpp, pp))


def allowed_stages(schedule: Name) -> tuple[int, int | None]:
    """The fewest and the most stages a rank may hold (None: any number)."""
    return {"gpipe": (1, 1), "1f1b": (1, 1), "interleaved": (1, None), "zero_bubble": (1, None), "zbv": (2, 2)}[
        schedule
    ]


def fewest_micro_batches(schedule: Name, pp: int) -> int:
    """Micro-batches of a step below which the schedule does not run."""
    return pp if schedule == "1f1b" else 1


def next_micro_batches(schedule: Name, pp: int, micro_batches: int) -> int:
    """The smallest number of micro-batches, from `micro_batches` on, that the schedule runs with.

    The interleaved ones go in n // pp rounds of equally many: n is a multiple of that (any n up to 2 pp - 1 is one).
    """
    count = max(micro_batches, fewest_micro_batches(schedule, pp))
    while schedule in ("interleaved", "zero_bubble") and count % max(1, count // pp):
        count += 1
    return count


def formula_idle_share(schedule: Name, pp: int, vpp: int, micro_batches: int) -> float:
    """Share of a step in which a rank waits, if stages are equal and sending takes no time.

    In units of one micro-batch on one rank (forward, input gradient and weight gradient a third each, n of them):
    filling and draining costs pp - 1 for gpipe and 1f1b; (pp - 1) / vpp for interleaved (Narayanan et al. 2021,
    section 2.2); (pp - 1) / 3 vpp for zero_bubble, where only the forwards of the filling remain (Qi et al. 2023,
    table 2: forward + input - weight); (pp - 1) / 6 for zbv from 2 pp - 1 micro-batches on: its ranks never wait
    between two pieces of work, but the last one starts pp - 1 half forwards after the first, and the step ends for all
    together.
    """
    gaps = {"gpipe": 1.0, "1f1b": 1.0, "interleaved": 1 / vpp, "zero_bubble": 1 / (3 * vpp), "zbv": 1 / 6}
    idle = (pp - 1) * gaps[schedule]
    return idle / (micro_batches + idle)


def forward_order(schedule: Name, pp: int, vpp: int, rank: int, micro_batches: int) -> list[tuple[int, int]]:
    """(stage, micro-batch) in the order a pipeline rank runs them when there is no backward; about pp are in flight.

    Stages in turn: pp micro-batches go through a rank's first stage, then the same through its second, and so on.
    A V: micro-batch i comes back to rank r when i + 2 (pp - 1 - r) has left it.
    """
    ids = stage_ids(schedule, pp, vpp, rank)
    if schedule == "zbv":
        back = 2 * (pp - 1 - rank)
        out, home = (
            [(2 * (i + late) + arm, ids[arm], i) for i in range(micro_batches)] for arm, late in enumerate((0, back))
        )
        return [(stage, i) for _, stage, i in sorted((*out, *home))]
    rounds = [range(at, min(at + pp, micro_batches)) for at in range(0, micro_batches, pp)]
    return [(stage, i) for each in rounds for stage in ids for i in each]
