"""Pipeline parallel: this rank's stages of the model, run by a schedule of `torch.distributed.pipelining`.

The schedule decides what runs when and who sends to whom. Ours is what a stage does with a micro-batch: every pipeline
rank has the same micro-batches, so the schedule is handed their numbers only, and a stage looks its micro-batch up.
torch would cut whole-batch tensors into equal parts and needs every micro-batch to have the same shape on the wire;
packed micro-batches have different lengths. Since all ranks know all lengths, a receive buffer is made to measure.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining._utils import _TensorMeta
from torch.distributed.pipelining.stage import _RecvInfo

from parallel.config import ParallelConfig
from parallel.later import Later
from parallel.schedules import Name, stage_ids
from parallel.sharding import Axis
from parallel.torch_schedules import ForwardOnly, training_schedule

Forward = Callable[[Any, Any, float], tuple[torch.Tensor, Any]]
EVAL_WINDOW = 16
"""Micro-batches of one forward-only pass: bounds what is kept for sending."""


@dataclass
class _Step:
    """What the stages of this rank work on."""

    micro_batches: Sequence[Any] = ()
    rows: Sequence[int] = ()
    """Rows of the hidden states of each micro-batch."""
    forward: Forward | None = None
    weight: float = 1.0
    metrics: dict[int, Any] = field(default_factory=dict)
    busy_s: float = 0.0


@dataclass(frozen=True)
class StepTime:
    """Seconds a rank computed in a step, and seconds the step took on it."""

    busy_s: float
    wall_s: float


def idle_share(times: Sequence[StepTime]) -> float:
    """Share of the step the ranks of a pipeline waited, from the times of all of them; they began together."""
    return 1.0 - sum(t.busy_s for t in times) / (len(times) * max(t.wall_s for t in times))


class _Stage(PipelineStage):
    """One chunk of the model as torch's schedules see it."""

    def __init__(
        self, chunk: nn.Module, index: int, count: int, width: int, dtype: torch.dtype, device: torch.device, pp: Axis
    ) -> None:
        # Static shapes for torch's bookkeeping only (it would infer them by running the model); see `begin`.
        hidden = torch.empty(1, width, dtype=dtype, device="meta", requires_grad=True)
        loss = torch.empty((), device="meta")
        self.later = Later(chunk.parameters())
        super().__init__(
            chunk,
            index,
            count,
            device,
            input_args=() if index == 0 else hidden,
            output_args=loss if index == count - 1 else hidden,
            group=pp.group,
            dw_builder=self.later.take,
        )
        self.width, self.dtype = width, dtype
        self.step = _Step()

    def begin(self, step: _Step, has_backward: bool) -> None:
        """Get ready for these micro-batches; nothing is left of the step before."""
        assert not self.dw_runner, "the step before left weight gradients undone"
        self.clear_runtime_states()
        self.bwd_cache.clear()
        self.step, self.has_backward, self.chunks = step, has_backward, len(step.rows)
        inputs = [() if self.is_first else (self._slot(rows, self.stage_index - 1),) for rows in step.rows]
        grads = [() if self.is_last else (self._slot(rows, self.stage_index + 1),) for rows in step.rows]
        self.args_recv_info, self.grad_recv_info = dict(enumerate(inputs)), dict(enumerate(grads))

    def _slot(self, rows: int, source: int) -> _RecvInfo:
        meta = _TensorMeta(torch.Size((rows, self.width)), (self.width, 1), self.dtype, requires_grad=True)
        return _RecvInfo(f"hidden from stage {source}", source, None, meta)

    # Torch prepares equal buffers for all micro-batches at the first step; ours are made when they are received into.

    def _setup_forward_recv_info(self, num_microbatches: int, has_backward: bool) -> None: ...

    def _setup_backward_recv_info(self, num_microbatches: int) -> None: ...

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """What to receive before a forward."""
        self._make_buffers(self.args_recv_info[fwd_chunk_id])
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """What to receive before a backward."""
        if self.has_backward:
            self._make_buffers(self.grad_recv_info[bwd_chunk_id])
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def _make_buffers(self, slots: tuple[_RecvInfo, ...]) -> None:
        for slot in slots:
            assert slot.tensor_meta is not None
            slot.buffer = torch.empty(slot.tensor_meta.shape, dtype=self.dtype, device=self.device)

    def forward_maybe_with_nosync(self, *hidden: torch.Tensor, number: int) -> torch.Tensor:
        """The chunk's part of micro-batch `number`: hidden states [R, D], or the loss from the last stage."""
        step, batch = self.step, self.step.micro_batches[number]
        given = {"hidden_RD": hidden[0]} if hidden else {}
        if self.is_last:
            assert step.forward is not None
            out, step.metrics[number] = step.forward(partial(self.submod, **given), batch, step.weight)
            return out
        out = self.submod(**batch.inputs, **given)
        sent = (tuple(out.shape), out.dtype)
        assert sent == ((step.rows[number], self.width), self.dtype), f"{sent} is not what the next stage waits for"
        return out

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """Forward of one micro-batch."""
        with self._busy():
            out = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        if not self.has_backward:
            self.args_recv_info[fwd_chunk_id] = ()
            self.fwd_cache = {fwd_chunk_id: self.fwd_cache[fwd_chunk_id]}  # for the send; no backward will take it
        return out

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: torch.Tensor | None = None, full_backward: bool = True, **kwargs: Any
    ) -> None:
        """Backward of one micro-batch; unless it is full, weight gradients wait for `backward_weight_one_chunk`."""
        if not self.has_backward:
            return
        with self._busy(), self.later.deferring(not full_backward):
            super().backward_one_chunk(bwd_chunk_id, loss, full_backward, **kwargs)
        # The received buffers are no longer needed; torch would keep them all.
        for slot in (*self.args_recv_info[bwd_chunk_id], *self.grad_recv_info[bwd_chunk_id]):
            slot.buffer = None

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        """The weight gradients of one micro-batch that its backward put off."""
        with self._busy():
            super().backward_weight_one_chunk(bwd_chunk_id, last_backward)

    @contextmanager
    def _busy(self) -> Any:
        start = time.perf_counter()
        yield
        self.step.busy_s += time.perf_counter() - start


class Pipeline:
    """This rank's stages of a model cut over `pp`.

    Args:
        chunks: this rank's chunks of the model, in the order of `stage_ids`. All but the last of the model are called
            `chunk(**micro_batch.inputs, hidden_RD=h)`, the first without `hidden_RD`, and return hidden states [R, D].
        layout: the parallel section.
        pp: the pipeline axis.
        device: where the chunks are.
        width: D, the size of a hidden state.
        dtype: of the hidden states on the wire.

    Gradients are summed over the micro-batches into `.grad`, which nothing else touches.
    """

    def __init__(
        self,
        chunks: Sequence[nn.Module],
        layout: ParallelConfig,
        pp: Axis,
        device: torch.device,
        width: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        assert pp.size > 1 and pp.group is not None, "one rank is no pipeline"
        ids = stage_ids(layout.schedule, pp.size, layout.stages_per_rank, pp.rank)
        count = pp.size * layout.stages_per_rank
        self.schedule: Name = layout.schedule
        self.row_ranks = layout.tp if layout.sequence_parallel else 1
        self.stages = [
            _Stage(chunk, index, count, width, dtype, device, pp) for chunk, index in zip(chunks, ids, strict=True)
        ]
        self.has_last = count - 1 in ids
        """Whether the loss and its metrics are made here."""
        self.last_step = StepTime(0.0, 0.0)
        """Times of the last `train`."""
        self._built: dict[tuple[int, bool], Any] = {}

    def train(self, micro_batches: Sequence[Any], forward: Forward, weight: float) -> list[Any]:
        """Forward and backward of all micro-batches; gradients are added to `.grad`.

        Args:
            micro_batches: the same on every rank of the pipeline, each with `inputs`; as many as the schedule takes.
            forward: `(model, micro_batch, weight) -> (loss, metrics)`, called for the last stage.

        Returns:
            The metrics of each micro-batch, on the rank with the last stage; nothing on others.
        """
        return self._run(micro_batches, forward, weight, True)

    def evaluate(self, micro_batches: Sequence[Any], forward: Forward) -> list[Any]:
        """Forward only, for any number of micro-batches: what `forward(...)[1]` is of each, on the rank with the last
        stage."""
        found: list[Any] = []
        for start in range(0, len(micro_batches), EVAL_WINDOW):
            with torch.no_grad():
                found += self._run(micro_batches[start : start + EVAL_WINDOW], forward, 1.0, False)
        return found

    def _run(self, micro_batches: Sequence[Any], forward: Forward, weight: float, train: bool) -> list[Any]:
        start, count = time.perf_counter(), len(micro_batches)
        step = _Step(micro_batches, [self._rows(batch) for batch in micro_batches], forward, weight)
        for stage in self.stages:
            stage.begin(step, train)
        schedule = self._schedule(count, train)
        numbers = [{"number": i} for i in range(count)]
        schedule._step_microbatches(kwarg_mbs=numbers, target_mbs=[None] * count, return_outputs=False)
        for stage in self.stages:
            stage.step = _Step()
        if train:
            self.last_step = StepTime(step.busy_s, time.perf_counter() - start)
        return [step.metrics[i] for i in range(count)] if self.has_last else []

    def _rows(self, micro_batch: Any) -> int:
        """Rows of the hidden states of a micro-batch on this rank: its tokens, shared by tp under sequence parallel."""
        return -(-micro_batch.inputs["tokens_T"].shape[0] // self.row_ranks)

    def _schedule(self, count: int, train: bool) -> Any:
        """torch's schedule for so many micro-batches; made once."""
        if (count, train) not in self._built:
            made = (
                training_schedule(self.schedule, self.stages, count, _identity)
                if train
                else ForwardOnly(self.schedule, self.stages, count)
            )
            self._built[count, train] = made
        return self._built[count, train]


def _identity(loss: torch.Tensor, _: None) -> torch.Tensor:
    """The last stage gives the loss itself."""
    return loss
