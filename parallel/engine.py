"""One face over DeepSpeed: train a step, run forward only, and show this rank's share of the training state.

The engine knows the layout, not the loss. It owns the one scaling of the loss: DeepSpeed averages gradients over the
data-parallel ranks, so a loss that is a sum over tokens is weighted by (ranks / valid tokens of the global batch).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from parallel.config import EngineConfig
from parallel.ds_config import ds_config
from parallel.groups import Groups
from parallel.loss_scale import LossScale
from parallel.materialise import TensorSource, materialise

STATE_KEYS = ("exp_avg", "exp_avg_sq")
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step says: the metrics each micro-batch returned, the gradient norm before clipping."""

    metrics: list[Any]
    grad_norm: float
    skipped: bool
    loss_scale: float


@dataclass(frozen=True)
class Fragment:
    """A flat range of one parameter owned by this rank, as views into the live training state.

    ``start`` counts elements of the flattened parameter; ``master`` and the optimizer states are 1-D fp32 views.
    """

    name: str
    start: int
    master: torch.Tensor
    states: dict[str, torch.Tensor]


class Autocast(nn.Module):
    """Runs the model under autocast. Weights, gradients and their accumulation stay fp32."""

    def __init__(self, model: nn.Module, dtype: torch.dtype, device_type: str):
        super().__init__()
        self.model, self.dtype, self.device_type = model, dtype, device_type

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward with matrix products in ``dtype``."""
        with torch.autocast(self.device_type, self.dtype):
            return self.model(*args, **kwargs)


class Engine:
    """A DeepSpeed engine around one model.

    Args:
        model: built on the meta device; every parameter carries ``shard``.
        source: where the weights come from.
        optimizer: makes the optimizer from the filled model.
        cfg: the engine section.
        clip: largest global gradient norm, 0 for none.
        groups: the run's process groups.
        layer_types: modules whose parameters ZeRO-3 gathers and releases together.
    """

    def __init__(
        self,
        model: nn.Module,
        source: TensorSource,
        optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        cfg: EngineConfig,
        clip: float,
        groups: Groups,
        layer_types: Sequence[type[nn.Module]] = (),
    ):
        deepspeed = _import_deepspeed()
        self.model, self.cfg, self.clip, self.groups = model, cfg, clip, groups
        config = ds_config(cfg, clip, groups.device.type)
        materialise(model, source, groups.place().cut, groups.device, config if cfg.zero == 3 else None)
        root = model
        if cfg.precision != "fp32":
            root = Autocast(model, AUTOCAST[cfg.precision], groups.device.type)
        if cfg.zero == 3 and layer_types:
            deepspeed.utils.set_z3_leaf_modules(root, list(layer_types))
        self.optimizer = optimizer(model)
        self.loss_scale = LossScale(dynamic=cfg.precision == "fp16")
        self.ds, *_ = deepspeed.initialize(
            model=root, optimizer=self.optimizer, config=config, dist_init_required=False
        )
        self._create_states()

    def train_step(
        self, micro_batches: Sequence[Any], forward: Callable[[nn.Module, Any, float], Any], count: float, lr: float
    ) -> StepResult:
        """Accumulate over the micro-batches of this rank, then update once.

        Args:
            micro_batches: this rank's part of the global batch; every rank brings equally many.
            forward: ``(model, micro_batch, weight) -> (loss, metrics)`` where ``loss`` is already ``weight`` times a
                sum; the metrics come back untouched.
            count: what the loss is divided by: the valid tokens (or pairs) of the whole global batch.
            lr: learning rate of this step.

        Raises:
            ValueError: the global batch has nothing to learn from.
        """
        if count <= 0:
            raise ValueError(
                "this global batch has no valid token on any rank: its loss is 0 / 0. Check the data gate's table."
            )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        scale = self.loss_scale.value
        if self.cfg.zero and self.loss_scale.dynamic:
            self.ds.optimizer.override_loss_scale(scale)
        weight = self.groups.data.size * scale / count
        metrics = []
        for i, micro_batch in enumerate(micro_batches):
            self.ds.set_gradient_accumulation_boundary(i + 1 == len(micro_batches))
            loss, terms = forward(self.ds, micro_batch, weight)
            # Under ZeRO 1-3 the overridden scale would be applied by DeepSpeed a second time; the weight holds it.
            self.ds.backward(loss / scale if self.cfg.zero and self.loss_scale.dynamic else loss, scale_wrt_gas=False)
            metrics.append(terms)
        norm = self._clip_whole(scale) if self.cfg.zero == 0 else None
        skipped = norm is not None and not _finite(norm)
        if skipped:
            self.ds.zero_grad()
        else:
            self.ds.step()
        if norm is None:
            norm = float(self.ds.get_global_grad_norm())
            skipped = bool(self.ds.optimizer.overflow)
        self.loss_scale.update(overflow=skipped)
        return StepResult(metrics, norm, skipped, scale)

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[Any], forward: Callable[[nn.Module, Any, float], Any]) -> list[Any]:
        """Forward only; the metrics of every micro-batch. Every rank brings equally many (ZeRO-3 gathers in step)."""
        self.ds.eval()
        metrics = [forward(self.ds, micro_batch, 1.0)[1] for micro_batch in micro_batches]
        self.ds.train()
        return metrics

    def _clip_whole(self, scale: float) -> float:
        """Unscale, measure and clip whole gradients (ZeRO 0, where every rank holds all of them after the reduce)."""
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        if scale != 1.0:
            for grad in grads:
                grad.mul_(1.0 / scale)
        norm = torch.nn.utils.get_total_norm(grads)
        if self.clip:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), self.clip, norm)
        return float(norm)

    # ---- the training state, rank by rank ------------------------------------------------------------------------

    def _create_states(self) -> None:
        """Make AdamW's states now, so that fragments can be read and written before the first step."""
        if self.cfg.zero == 3:  # its groups stay empty until a step puts one of these in
            flats = self.ds.optimizer.fp32_partitioned_groups_flat
        else:
            flats = [flat for group in self.optimizer.param_groups for flat in group["params"]]
        for flat in flats:
            state = self.optimizer.state[flat]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
                state.update({key: torch.zeros_like(flat, requires_grad=False) for key in STATE_KEYS})

    def fragments(self, once: bool = True) -> Iterator[Fragment]:
        """The weights and optimizer states this rank holds.

        Args:
            once: over all ranks every element comes exactly once (to save); otherwise also what other ranks hold too
                (to restore).
        """
        if self.cfg.zero == 0:
            return self._whole_fragments(once)
        return self._zero3_fragments() if self.cfg.zero == 3 else self._zero12_fragments()

    def _named(self) -> Iterator[tuple[str, Any]]:
        """Parameters with the attributes DeepSpeed puts on them."""
        return self.model.named_parameters()

    def _whole_fragments(self, once: bool) -> Iterator[Fragment]:
        # Replicated state: to save, the parameters are dealt out over the ranks.
        for i, (name, param) in enumerate(self.model.named_parameters()):
            if not once or i % self.groups.data.size == self.groups.data.rank:
                state = self.optimizer.state[param]
                yield Fragment(name, 0, param.detach().view(-1), {k: state[k].view(-1) for k in STATE_KEYS})

    def _zero12_fragments(self) -> Iterator[Fragment]:
        flats = self.ds.optimizer.single_partition_of_fp32_groups
        for name, param in self._named():
            mapping = param._hp_mapping
            if mapping is None:
                continue
            at, flat = mapping.hp_fragment_address, flats[mapping.param_group_index]
            state = self.optimizer.state[flat]
            states = {k: state[k].narrow(0, at.start, at.numel) for k in STATE_KEYS}
            yield Fragment(name, mapping.lp_fragment_address.start, mapping.hp_fragment, states)

    def _zero3_fragments(self) -> Iterator[Fragment]:
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

        for name, param in self._named():
            start = self.groups.data.rank * param.ds_tensor.ds_numel
            numel = min(param.ds_tensor.ds_numel, param.ds_numel - start)  # the last rank's share ends in padding
            if numel > 0:
                cut = [safe_get_local_optimizer_state(param, k).view(-1)[:numel] for k in STATE_KEYS]
                master = safe_get_local_fp32_param(param).view(-1)[:numel]
                yield Fragment(name, start, master, dict(zip(STATE_KEYS, cut, strict=True)))

    @property
    def optimizer_steps(self) -> int:
        """AdamW's own step count (skipped steps do not count)."""
        return int(next(iter(self.optimizer.state.values()))["step"])

    @optimizer_steps.setter
    def optimizer_steps(self, steps: int) -> None:
        for state in self.optimizer.state.values():
            state["step"].fill_(steps)


def _finite(value: float) -> bool:
    return value == value and abs(value) != float("inf")


def _import_deepspeed() -> Any:
    """DeepSpeed, quiet, without the shared-memory op it would compile on a CPU at first use.

    That op serves all-reduce only, ZeRO does not need it, and a process killed during its build leaves a lock file on
    which every later start waits for ever.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # DeepSpeed 0.19.8 calls collectives by the names that torch 2.13 renames; nothing a user could do about it.
    warnings.filterwarnings("ignore", message=".*torch.distributed.*is deprecated", category=FutureWarning)
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_init_required=False, verbose=False)
    return deepspeed
