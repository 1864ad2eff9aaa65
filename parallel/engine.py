"""One face over DeepSpeed and the pipeline: train a step, run forward only, show this rank's share of the state.

The engine knows the layout, not the loss. It owns the one scaling of the loss: DeepSpeed averages gradients over the
ranks with different tokens, so a loss that is a sum over tokens is weighted by (ranks / valid tokens of the global
batch).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from parallel.config import EngineConfig, ParallelConfig
from parallel.deepspeed_setup import import_deepspeed, mark_experts, start
from parallel.dropout import Dropout
from parallel.ds_config import ds_config
from parallel.gradients import global_norm, sum_over_tp
from parallel.groups import ALL_DATA, Groups
from parallel.loss_scale import LossScale
from parallel.materialise import TensorSource, materialise
from parallel.sharding import is_idle, name_of
from parallel.state import Fragment, TrainingState
from parallel.switch import switched_off

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
Forward = Callable[[Any, Any, float], Any]


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step says: the metrics each micro-batch returned (on the ranks that report), the gradient
    norm before clipping."""

    metrics: list[Any]
    grad_norm: float
    skipped: bool
    loss_scale: float


class Autocast(nn.Module):
    """Runs the model under autocast. Weights, gradients and their accumulation stay fp32."""

    def __init__(self, model: nn.Module, dtype: torch.dtype, device_type: str):
        super().__init__()
        self.model, self.dtype, self.device_type = model, dtype, device_type

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward with matrix products in ``dtype``."""
        with torch.autocast(self.device_type, self.dtype):
            return self.model(*args, **kwargs)


def in_precision(model: nn.Module, cfg: EngineConfig, device: torch.device) -> nn.Module:
    """The model in the compute type that the config asks for."""
    return model if cfg.precision == "fp32" else Autocast(model, AUTOCAST[cfg.precision], device.type)


class Engine:
    """A DeepSpeed engine around this rank's part of the model.

    Args:
        chunks: the pipeline stages of this rank, built on the meta device; without a pipeline the whole model. Every
            parameter carries its records (``parallel.sharding``).
        source: where the weights come from.
        optimizer: makes the optimizer from the filled model.
        cfg: the engine section.
        clip: largest global gradient norm, 0 for none.
        groups: the run's process groups.
        layout: the parallel section.
        hidden_size: width of the hidden states between pipeline stages.
        layer_types: modules whose parameters ZeRO-3 gathers and releases together.
    """

    def __init__(
        self,
        chunks: Sequence[nn.Module],
        source: TensorSource,
        optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        cfg: EngineConfig,
        clip: float,
        groups: Groups,
        layout: ParallelConfig = ALL_DATA,
        hidden_size: int = 0,
        layer_types: Sequence[type[nn.Module]] = (),
    ):
        deepspeed = import_deepspeed()
        self.cfg, self.clip, self.groups = cfg, clip, groups
        self.chunks: list[Any] = list(chunks)
        config = ds_config(cfg, clip, groups.device.type)
        for chunk in self.chunks:
            self._fill(chunk, source, config)
        runnable = [in_precision(chunk, cfg, groups.device) for chunk in self.chunks]
        root = runnable[0] if len(runnable) == 1 else nn.ModuleList(runnable)
        if cfg.zero == 3 and layer_types:
            deepspeed.utils.set_z3_leaf_modules(root, list(layer_types))
        has_experts = mark_experts(root, groups)
        self.optimizer = optimizer(root)
        self._idle = [param for _, param in self.named_parameters() if is_idle(param)]
        self._dropouts = [module for module in root.modules() if isinstance(module, Dropout)]
        self.loss_scale = LossScale(dynamic=cfg.precision == "fp16")
        self.ds = start(root, self.optimizer, config, groups, has_experts)
        if not self._reduces:
            self.ds.enable_backward_allreduce = False
        self.state = TrainingState(
            cfg.zero, self.ds, self.optimizer, list(self.named_parameters()), list(self._named_buffers()), groups
        )
        if cfg.zero:
            self._put_norm_in_place_of_theirs()
        self.pipeline: Any = None
        if groups.pp.size > 1:
            from parallel.pipeline import Pipeline  # brings torch's pipelines in, more than a second to import

            self.pipeline = Pipeline(runnable, layout, groups.pp, groups.device, hidden_size)

    def _fill(self, chunk: nn.Module, source: TensorSource, config: dict[str, Any]) -> None:
        zero3 = (config, self.groups.data.group) if self.cfg.zero == 3 else ()
        materialise(chunk, source, self.groups.place().cut, self.groups.device, *zero3)

    @property
    def _reduces(self) -> bool:
        """Whether gradients go through DeepSpeed's reduction. Without ZeRO and with nobody else to average with it
        would only copy all of them into one buffer and back."""
        return bool(self.cfg.zero) or self.groups.data.size > 1

    @property
    def model(self) -> nn.Module:
        """This rank's whole model; only without a pipeline."""
        assert self.pipeline is None, "a pipeline rank holds stages, not the model"
        return self.chunks[0]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """This rank's parameters under their names in the whole model."""
        for chunk in self.chunks:
            for name, param in chunk.named_parameters():
                yield name_of(param, name), param

    def _named_buffers(self) -> Iterator[tuple[str, torch.Tensor]]:
        for chunk in self.chunks:
            saved = set(chunk.state_dict(keep_vars=True))
            yield from ((name, buffer) for name, buffer in chunk.named_buffers() if name in saved)

    # ---- a step ---------------------------------------------------------------------------------------------------

    def train_step(self, micro_batches: Sequence[Any], forward: Forward, count: float, lr: float) -> StepResult:
        """Accumulate over the micro-batches of this rank, then update once.

        Args:
            micro_batches: this rank's part of the global batch; every rank brings equally many.
            forward: ``(model, micro_batch, weight) -> (loss, metrics)`` where ``loss`` is already ``weight`` times a
                sum; the metrics come back untouched.
            count: what the loss is divided by: the valid tokens (or pairs) of the whole global batch.
            lr: learning rate of this step; a group of the optimizer with an ``lr_scale`` has that times as much.

        Raises:
            ValueError: the global batch has nothing to learn from.
        """
        if count <= 0:
            raise ValueError(
                "this global batch has no valid token on any rank: its loss is 0 / 0. Check the data gate's table."
            )
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        for dropout in self._dropouts:
            dropout.step = self.optimizer_steps
        scale = self.loss_scale.value
        if self.cfg.zero and self.loss_scale.dynamic:
            self.ds.optimizer.override_loss_scale(scale)
        weight = self.groups.data.size * scale / count
        if self.pipeline is not None:
            metrics = self._pipelined(micro_batches, forward, weight)
        else:
            metrics = self._accumulate(micro_batches, forward, weight, scale)
        norm, skipped = self._update(scale)
        self.loss_scale.update(overflow=skipped)
        return StepResult(self._reported(metrics), norm, skipped, scale)

    def _reported(self, metrics: list[Any]) -> list[Any]:
        """Metrics once: tp ranks compute the same ones, and of a pipeline only the last stage has any."""
        return metrics if self.groups.tp.rank == 0 else []

    def _accumulate(self, micro_batches: Sequence[Any], forward: Forward, weight: float, scale: float) -> list[Any]:
        metrics = []
        for i, micro_batch in enumerate(micro_batches):
            self.ds.set_gradient_accumulation_boundary(i + 1 == len(micro_batches))
            loss, terms = forward(self.ds, micro_batch, weight)
            # Under ZeRO 1-3 the overridden scale would be applied by DeepSpeed a second time; the weight holds it.
            self.ds.backward(loss / scale if self.cfg.zero and self.loss_scale.dynamic else loss, scale_wrt_gas=False)
            metrics.append(terms)
        return metrics

    def _pipelined(self, micro_batches: Sequence[Any], forward: Forward, weight: float) -> list[Any]:
        """The schedule leaves whole fp32 gradients in ``param.grad``; they are reduced here, once."""
        assert self.pipeline is not None
        metrics = self.pipeline.train(micro_batches, forward, weight)
        for param in self._idle:  # no graph reaches it, and it counts steps
            param.grad = torch.zeros_like(param)
        self._sum_tied_ends()
        self.ds.set_gradient_accumulation_boundary(True)
        if self.cfg.zero:
            # DeepSpeed makes its bucket in the backward; this one ran without it, as under its own pipeline.
            self.ds.optimizer.reduce_gradients(pipeline_parallel=True)
        elif self._reduces:
            self.ds.allreduce_gradients()
        return metrics

    def _sum_tied_ends(self) -> None:
        """The gradient of a tied embedding is the sum of what the first and the last stage have of it."""
        ends = [p for _, p in self.named_parameters() if "twin" in vars(p) and p.requires_grad]
        if len(ends) == 2:  # a V-shaped schedule has both on one rank
            first, last = (p.grad for p in ends)
            assert first is not None and last is not None
            last.copy_(first.add_(last))
        elif ends:
            dist.all_reduce(ends[0].grad, group=self.groups.ends.group)

    def _update(self, scale: float) -> tuple[float, bool]:
        """Clip and step. Returns the norm before clipping, and whether the step was skipped."""
        if self.cfg.zero:
            self.ds.step()
            return float(self.ds.get_global_grad_norm()), bool(self.ds.optimizer.overflow)
        norm = float(self._global_norm()) / scale
        if not _finite(norm):
            self.ds.zero_grad()
            return norm, True
        factor = min(1.0, self.clip / (norm + 1e-6)) if self.clip else 1.0
        if factor / scale != 1.0:
            torch._foreach_mul_([piece.grad for piece in self.state.gradients()], factor / scale)
        self.ds.step()
        return norm, False

    def _global_norm(self) -> torch.Tensor:
        """Finish the gradients over tp and take the norm over the whole model (still times the loss scale)."""
        pieces = self.state.gradients()
        sum_over_tp(pieces, self.groups.tp)
        return global_norm(pieces, self.groups, self.state.gradient_holders)

    def _put_norm_in_place_of_theirs(self) -> None:
        """DeepSpeed asks for the norm between reduction and update, clips by it, and skips where it is not finite.

        Its own counts heads shared by tp ranks and tied copies more than once and averages those of experts.
        """
        if self.cfg.zero == 3:
            self.ds.optimizer._get_norm_groups = lambda: [self._global_norm()]
        else:
            self.ds.optimizer.scaled_global_norm = lambda norm_type=2: self._global_norm()

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[Any], forward: Forward) -> list[Any]:
        """Forward only; the metrics of every micro-batch. Every rank brings equally many (ZeRO-3 gathers in step)."""
        return self._reported(self.score(micro_batches, forward))

    @torch.no_grad()
    def score(self, micro_batches: Sequence[Any], forward: Forward) -> list[Any]:
        """Forward only; what ``forward(model, micro_batch, 1.0)[1]`` is of each, on every rank that has the head (all
        tp and cp ranks of the last pipeline stage); nothing on the others. Every rank brings equally many."""
        self.ds.eval()
        found = forward_only(self.ds, self.pipeline, micro_batches, forward)
        self.ds.train()
        return found

    def adapters_off(self) -> AbstractContextManager[None]:
        """While it lasts, a model with adapters is the one they were put on: its own reference."""
        return switched_off(self.chunks)

    # ---- the training state, rank by rank ------------------------------------------------------------------------

    def fragments(self, once: bool = True) -> Iterator[Fragment]:
        """The weights and optimizer states this rank holds, see ``TrainingState.fragments``."""
        return self.state.fragments(once)

    @property
    def optimizer_steps(self) -> int:
        """AdamW's own step count (skipped steps do not count)."""
        return int(next(iter(self.optimizer.state.values()))["step"])

    @optimizer_steps.setter
    def optimizer_steps(self, steps: int) -> None:
        for state in self.optimizer.state.values():
            state["step"].fill_(steps)


def forward_only(model: Any, pipeline: Any, micro_batches: Sequence[Any], forward: Forward) -> list[Any]:
    """The second of what ``forward`` gives for each micro-batch, where the head is."""
    if pipeline is not None:
        return pipeline.evaluate(micro_batches, forward)
    return [forward(model, micro_batch, 1.0)[1] for micro_batch in micro_batches]


def _finite(value: float) -> bool:
    return value == value and abs(value) != float("inf")
