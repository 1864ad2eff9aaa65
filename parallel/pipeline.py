"""Pipeline parallel: this rank's stages of the model, run by a schedule of `torch.distributed.pipelining`.

The schedule decides what runs when and who sends to whom. Ours is what a stage does with a micro-batch: every pipeline
rank has the same micro-batches, so the schedule is handed their numbers only, and a stage looks its micro-batch up.
torch would cut whole-batch tensors into equal parts and needs every micro-batch to have the same shape on the wire;
packed micro-batches have different lengths. Since all ranks know all lengths, a receive buffer is made to measure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from operator import or_
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
from parallel.sharding import Axis, is_idle
from parallel.step_clock import StepClock, StepTime
from parallel.switch import Lengthens
from parallel.torch_schedules import ForwardOnly, training_schedule

Forward = Callable[[Any, Any, float], tuple[torch.Tensor, Any]]
EVAL_WINDOW = 16
"""Micro-batches of one forward-only pass: bounds what is kept for sending."""


@dataclass(frozen=True)
class _Step:
    """What the stages of this rank work on."""

    micro_batches: Sequence[Any]
    rows: Sequence[int]
    """Rows of the hidden states of each micro-batch."""
    forward: Forward
    weight: float
    clock: StepClock
    metrics: dict[int, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Wire:
    """What runs between two stages: hidden states [R, width], and back their gradients if a part before is trained."""

    width: int
    dtype: torch.dtype
    has_grad: bool

    def slot(self, rows: int, source: int) -> _RecvInfo:
        """A place to receive into, without its buffer."""
        meta = _TensorMeta(torch.Size((rows, self.width)), (self.width, 1), self.dtype, self.has_grad)
        return _RecvInfo(f"hidden from stage {source}", source, None, meta)

    def example(self) -> torch.Tensor:
        """A row without memory, for torch's bookkeeping, which would otherwise run the model to see one."""
        return torch.empty(1, self.width, dtype=self.dtype, device="meta", requires_grad=self.has_grad)


class _Stage(PipelineStage):
    """One chunk of the model as torch's schedules see it. There is no wire before the first nor behind the last."""

    def __init__(
        self,
        chunk: nn.Module,
        index: int,
        count: int,
        before: _Wire | None,
        behind: _Wire | None,
        device: torch.device,
        pp: Axis,
    ) -> None:
        self.later = Later(chunk.parameters())
        super().__init__(
            chunk,
            index,
            count,
            device,
            input_args=before.example() if before else (),
            output_args=behind.example() if behind else torch.empty((), device="meta"),
            group=pp.group,
            dw_builder=self.later.take,
        )
        self.before, self.behind = before, behind
        self.step: _Step | None = None

    def begin(self, step: _Step, has_backward: bool) -> None:
        """Get ready for these micro-batches."""
        self.step, self.has_backward, self.chunks = step, has_backward, len(step.rows)
        for number, rows in enumerate(step.rows):
            self.args_recv_info[number] = (self.before.slot(rows, self.stage_index - 1),) if self.before else ()
            self.grad_recv_info[number] = (self.behind.slot(rows, self.stage_index + 1),) if self.behind else ()

    def end(self) -> None:
        """Keep nothing of the step."""
        assert not self.dw_runner, "weight gradients were left undone"
        self.clear_runtime_states()
        self.bwd_cache.clear()
        self.args_recv_info.clear()
        self.grad_recv_info.clear()
        self.step = None

    # Torch prepares equal buffers for all micro-batches at the first step; ours are made when they are received into.

    def _setup_forward_recv_info(self, num_microbatches: int, has_backward: bool) -> None: ...

    def _setup_backward_recv_info(self, num_microbatches: int) -> None: ...

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """What to receive before a forward."""
        self._make_buffers(self.args_recv_info[fwd_chunk_id])
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """What to receive before a backward."""
        if not self.has_backward or not self._gets_gradient:
            return []
        self._make_buffers(self.grad_recv_info[bwd_chunk_id])
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def _make_buffers(self, slots: tuple[_RecvInfo, ...]) -> None:
        for slot in slots:
            assert slot.tensor_meta is not None
            slot.buffer = torch.empty(slot.tensor_meta.shape, dtype=slot.tensor_meta.dtype, device=self.device)

    def forward_maybe_with_nosync(self, *hidden: torch.Tensor, number: int) -> torch.Tensor:
        """The chunk's part of micro-batch `number`: hidden states [R, D], or the loss from the last stage."""
        step = self._working_on
        batch = step.micro_batches[number]
        given = {"hidden_RD": hidden[0]} if hidden else {}
        if self.behind is None:
            out, step.metrics[number] = step.forward(partial(self.submod, **given), batch, step.weight)
            return out
        out = self.submod(**batch.inputs, **given)
        sent = (tuple(out.shape), out.dtype)
        expected = ((step.rows[number], self.behind.width), self.behind.dtype)
        assert sent == expected, f"stage {self.stage_index} sends {sent} where the next one waits for {expected}"
        return out

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """Forward of one micro-batch."""
        try:
            with self._working_on.clock.busy():
                out = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        except RuntimeError as error:  # torch wraps whatever goes wrong; a ValueError is the user's and stays one
            if isinstance(error.__cause__, ValueError):
                raise error.__cause__ from None
            raise
        if not self.has_backward:
            self.args_recv_info[fwd_chunk_id] = ()
            self.fwd_cache = {fwd_chunk_id: self.fwd_cache[fwd_chunk_id]}  # for the send; no backward will take it
        return out

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: torch.Tensor | None = None, full_backward: bool = True, **kwargs: Any
    ) -> None:
        """Backward of one micro-batch; unless it is full, weight gradients wait for `backward_weight_one_chunk`."""
        if not self._gets_gradient:  # nothing is trained up to here
            self.fwd_cache.pop(bwd_chunk_id)
            self.bwd_cache[bwd_chunk_id] = (None,) if self.before else ()
            if not full_backward:
                self.dw_runner[bwd_chunk_id] = self.later.take()
        else:
            with self._working_on.clock.busy(), self.later.deferring(not full_backward):
                super().backward_one_chunk(bwd_chunk_id, loss, full_backward, **kwargs)
        # The received buffers are no longer needed; torch would keep them all.
        for slot in (*self.args_recv_info[bwd_chunk_id], *self.grad_recv_info[bwd_chunk_id]):
            slot.buffer = None

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        """The weight gradients of one micro-batch that its backward put off."""
        with self._working_on.clock.busy():
            super().backward_weight_one_chunk(bwd_chunk_id, last_backward)

    @property
    def _gets_gradient(self) -> bool:
        return self.behind is None or self.behind.has_grad

    @property
    def _working_on(self) -> _Step:
        assert self.step is not None, "a stage works within `train` or `evaluate`"
        return self.step


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
        passes = _passes_gradient(dict(zip(ids, chunks, strict=True)), pp)
        # wires[s] comes before stage s
        wires = [None, *(_Wire(width, dtype, has_grad) for has_grad in passes[:-1]), None]
        self.stages = [
            _Stage(chunk, index, count, wires[index], wires[index + 1], device, pp)
            for chunk, index in zip(chunks, ids, strict=True)
        ]
        self.has_last = count - 1 in ids
        """Whether the loss and its metrics are made here."""
        self._lengthens = [module for module in chunks[0].modules() if isinstance(module, Lengthens)]
        self._clock: StepClock | None = None
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

    def last_step(self) -> StepTime:
        """How long this rank computed in the last `train`, and how long that took; on a GPU, waits for it to end."""
        assert self._clock is not None, "nothing was trained yet"
        return self._clock.read()

    def _run(self, micro_batches: Sequence[Any], forward: Forward, weight: float, train: bool) -> list[Any]:
        count, clock = len(micro_batches), StepClock(self.stages[0].device)
        step = _Step(micro_batches, [self._rows(batch) for batch in micro_batches], forward, weight, clock)
        for stage in self.stages:
            stage.begin(step, train)
        schedule = self._schedule(count, train)
        numbers = [{"number": i} for i in range(count)]
        schedule._step_microbatches(kwarg_mbs=numbers, target_mbs=[None] * count, return_outputs=False)
        for stage in self.stages:
            stage.end()
        clock.stop()
        if train:
            self._clock = clock
        return [step.metrics[i] for i in range(count)] if self.has_last else []

    def _rows(self, micro_batch: Any) -> int:
        """Rows of the hidden states of a micro-batch on this rank: its tokens and what the model puts between them,
        shared by tp under sequence parallel."""
        inputs = micro_batch.inputs
        rows = inputs["tokens_T"].shape[0] + sum(module.extra_rows(inputs) for module in self._lengthens)
        return -(-rows // self.row_ranks)

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


def _passes_gradient(chunks: Mapping[int, nn.Module], pp: Axis) -> list[bool]:
    """For each stage of the pipeline, whether it or any before it trains something."""
    mine = {
        stage: any(p.requires_grad and not is_idle(p) for p in chunk.parameters()) for stage, chunk in chunks.items()
    }
    everyone: list[Any] = [None] * pp.size
    dist.all_gather_object(everyone, mine, group=pp.group)
    trains = {stage: trained for rank in everyone for stage, trained in rank.items()}
    return list(accumulate((trains[stage] for stage in sorted(trains)), or_))


def _identity(loss: torch.Tensor, _: None) -> torch.Tensor:
    """The last stage gives the loss itself."""
    return loss
