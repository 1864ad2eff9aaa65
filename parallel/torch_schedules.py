"""The schedules of `torch.distributed.pipelining` by our names. Not in `schedules.py`: they take a second to import."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.distributed.pipelining import (
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)
from torch.distributed.pipelining.schedules import (
    _Action,
    _add_send_recv,
    _ComputationType,
    _PipelineScheduleRuntime,
)

from parallel.schedules import Name, forward_order, stage_ids

SINGLE = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}
MULTI = {
    "interleaved": ScheduleInterleaved1F1B,
    "zero_bubble": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
}


def training_schedule(schedule: Name, stages: Sequence[Any], micro_batches: int, loss_fn: Callable[..., Any]) -> Any:
    """torch's schedule over this rank's stages. Gradients are not scaled: the loss already is."""
    if schedule in SINGLE:
        return SINGLE[schedule](stages[0], micro_batches, loss_fn, scale_grads=False)
    return MULTI[schedule](list(stages), micro_batches, loss_fn, scale_grads=False)


class ForwardOnly(_PipelineScheduleRuntime):
    """Forwards in `forward_order` and nothing else, on the same stages and ranks as the training schedule.

    torch's own way, the training schedule with its backwards left out, fails for a V and keeps what has gone through.
    """

    def __init__(self, schedule: Name, stages: Sequence[Any], micro_batches: int) -> None:
        super().__init__(list(stages), micro_batches)
        pp, vpp = self.pp_group_size, len(stages)
        ranks = {stage: rank for rank in range(pp) for stage in stage_ids(schedule, pp, vpp, rank)}
        self.stage_index_to_group_rank = ranks
        for stage in stages:
            stage.stage_index_to_group_rank = ranks
        orders = {rank: forward_order(schedule, pp, vpp, rank, micro_batches) for rank in range(pp)}
        actions = {rank: [_Action(s, _ComputationType.FORWARD, i) for s, i in order] for rank, order in orders.items()}
        self.pipeline_order_with_comms = _add_send_recv(actions, ranks.__getitem__, pp * vpp)
