"""The training state a rank holds, as views: which ranges of which parameters, their optimizer states and gradients."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any

import torch
from torch import nn

from parallel.gradients import GradientPiece, local_shape
from parallel.groups import Groups
from parallel.sharding import Cut, Shard, is_idle, is_kept, shard_of

STATE_KEYS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Fragment:
    """A flat range of one parameter's local part, owned by this rank, as views into the live training state.

    ``start`` counts elements of the flattened local part, which is what `shard` gives of the whole at `cut`; ``master``
    and the optimizer states are 1-D fp32 views.
    """

    name: str
    start: int
    master: torch.Tensor
    states: dict[str, torch.Tensor]
    shard: Shard
    cut: Cut
    whole: tuple[int, ...]
    """Shape of the whole parameter."""


class TrainingState:
    """Reads and writes the state that DeepSpeed keeps, whatever the ZeRO stage.

    Args:
        zero: the stage.
        ds: DeepSpeed's engine.
        optimizer: torch's optimizer inside it.
        named: every parameter of this rank under its global name; copies of a tied parameter included. Of those that
            are not trained only the kept ones have a place in the state.
        buffers: persistent buffers under their global names, alike on all ranks of their stage.
    """

    def __init__(
        self,
        zero: int,
        ds: Any,
        optimizer: torch.optim.Optimizer,
        named: list[tuple[str, nn.Parameter]],
        buffers: list[tuple[str, torch.Tensor]],
        groups: Groups,
    ):
        self.zero, self.ds, self.optimizer, self.groups = zero, ds, optimizer, groups
        self.named = [(name, param) for name, param in named if param.requires_grad and not is_idle(param)]
        self.kept = [(name, param) for name, param in named if is_kept(param)]
        self.buffers = buffers
        self._create()

    def _create(self) -> None:
        """Make AdamW's states now, so that fragments can be read and written before the first step."""
        if self.zero == 3:  # its groups stay empty until a step puts one of these in
            flats = self.ds.optimizer.fp32_partitioned_groups_flat
        else:
            flats = [flat for group in self.optimizer.param_groups for flat in group["params"]]
        for flat in flats:
            state = self.optimizer.state[flat]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
                state.update({key: torch.zeros_like(flat, requires_grad=False) for key in STATE_KEYS})

    # ---- weights and optimizer states ----------------------------------------------------------------------------

    def fragments(self, once: bool) -> Iterator[Fragment]:
        """The weights and optimizer states this rank holds.

        Args:
            once: over all ranks every element comes once (to save); otherwise also what other ranks hold too (to
                restore). Key/value heads that lie on several tp ranks come from each of them.
        """
        parts = {0: self._whole, 1: self._zero12, 2: self._zero12, 3: self._zero3}[self.zero]
        for name, param, start, master, states in chain(parts(once), self._frozen(once)):
            shard = shard_of(param)
            repeated = is_tied_copy(param) or (shard.dim is None and self.groups.tp.rank > 0)
            if not (once and repeated):
                yield self._fragment(name, param, start, master, states)
        if not once or (self.groups.data.rank == 0 and self.groups.tp.rank == 0):
            for name, buffer in self.buffers:
                yield Fragment(name, 0, buffer.view(-1), {}, Shard(), Cut(), tuple(buffer.shape))

    def _fragment(
        self, name: str, param: nn.Parameter, start: int, master: torch.Tensor, states: dict[str, torch.Tensor]
    ) -> Fragment:
        shard, cut = shard_of(param), self.groups.place().cut
        whole = shard.whole_shape(local_shape(param), cut.ep)
        return Fragment(name, start, master, states, shard, shard.own(cut), whole)

    def _holders(self, param: nn.Parameter) -> tuple[int, int]:
        """How many data-parallel ranks hold the same parameter, and which of them this is."""
        experts = shard_of(param).experts and self.groups.ep.size > 1
        axis = self.groups.expert_data if experts else self.groups.data
        return axis.size, axis.rank

    def _whole(self, once: bool) -> Iterator[tuple[str, nn.Parameter, int, torch.Tensor, dict[str, torch.Tensor]]]:
        # Replicated state: to save, the parameters are dealt out over the ranks.
        for i, (name, param) in enumerate(self.named):
            size, rank = self._holders(param)
            if not once or i % size == rank:
                state = self.optimizer.state[param]
                yield name, param, 0, param.detach().view(-1), {k: state[k].view(-1) for k in STATE_KEYS}

    def _zero12(self, once: bool) -> Iterator[tuple[str, nn.Parameter, int, torch.Tensor, dict[str, torch.Tensor]]]:
        flats = self.ds.optimizer.single_partition_of_fp32_groups
        for name, param in self.named:
            mapping: Any = vars(param)["_hp_mapping"]
            if mapping is None:
                continue
            at, flat = mapping.hp_fragment_address, flats[mapping.param_group_index]
            state = self.optimizer.state[flat]
            states = {k: state[k].narrow(0, at.start, at.numel) for k in STATE_KEYS}
            yield name, param, mapping.lp_fragment_address.start, mapping.hp_fragment, states

    def _zero3(self, once: bool) -> Iterator[tuple[str, nn.Parameter, int, torch.Tensor, dict[str, torch.Tensor]]]:
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

        for name, param in self.named:
            start, numel = self._zero3_range(param)
            if numel > 0:
                cut: list[Any] = [safe_get_local_optimizer_state(param, k) for k in STATE_KEYS]
                master: Any = safe_get_local_fp32_param(param)
                states: dict[str, torch.Tensor] = {
                    k: part.view(-1)[:numel] for k, part in zip(STATE_KEYS, cut, strict=True)
                }
                yield name, param, start, master.view(-1)[:numel], states

    def _frozen(self, once: bool) -> Iterator[tuple[str, nn.Parameter, int, torch.Tensor, dict[str, torch.Tensor]]]:
        for i, (name, param) in enumerate(self.kept):
            if self.zero == 3:
                start, numel = self._zero3_range(param)
                if numel > 0:
                    partition: Any = vars(param)["ds_tensor"]
                    yield name, param, start, partition.detach().view(-1)[:numel], {}
            elif not once or i % self.groups.data.size == self.groups.data.rank:
                yield name, param, 0, param.detach().view(-1), {}

    def _zero3_range(self, param: Any) -> tuple[int, int]:
        start = self.groups.data.rank * param.ds_tensor.ds_numel
        return start, min(param.ds_tensor.ds_numel, param.ds_numel - start)  # the last rank's share ends in padding

    # ---- gradients ------------------------------------------------------------------------------------------------

    def gradients(self) -> list[GradientPiece]:
        """What this rank will update with, after the reduction and before the update."""
        if self.zero == 0:
            return [GradientPiece(p, 0, p.grad.view(-1)) for _, p in self.named if p.grad is not None]
        return list(self._zero3_gradients() if self.zero == 3 else self._zero12_gradients())

    def _zero12_gradients(self) -> Iterator[GradientPiece]:
        optimizer = self.ds.optimizer
        views: dict[int, dict[int, torch.Tensor]] = {}
        for group, tensors in optimizer.averaged_gradients.items():
            if tensors is not None and not optimizer.cpu_offload:
                starts = accumulate((t.numel() for t in tensors), initial=0)
                views[group] = {start: t.view(-1) for start, t in zip(starts, tensors, strict=False)}
        for _, param in self.named:
            mapping: Any = vars(param)["_hp_mapping"]
            if mapping is None:
                continue
            at, group = mapping.hp_fragment_address, mapping.param_group_index
            if optimizer.cpu_offload:
                grad = optimizer.single_partition_of_fp32_groups[group].grad.narrow(0, at.start, at.numel)
            else:
                grad = views[group][at.start]
            assert grad.numel() == at.numel, "DeepSpeed's gradient list no longer follows its partition"
            yield GradientPiece(param, mapping.lp_fragment_address.start, grad)

    def _zero3_gradients(self) -> Iterator[GradientPiece]:
        optimizer = self.ds.optimizer
        for i, params in enumerate(optimizer.fp16_groups):
            for j, param in enumerate(params):
                start, numel = self._zero3_range(param)
                if not param.requires_grad or numel <= 0:
                    continue
                if optimizer.offload_optimizer:
                    group, at, _ = optimizer.grad_position[optimizer.get_param_id(param)]
                    flat = optimizer.fp32_partitioned_groups_flat[group].grad
                    yield GradientPiece(param, start, flat.narrow(0, at, numel))
                else:
                    yield GradientPiece(param, start, optimizer.averaged_gradients[i][j].view(-1)[:numel])

    def gradient_holders(self, param: nn.Parameter) -> int:
        """On how many data-parallel ranks the same piece of a gradient lies; 0 for the second copy of a tied one."""
        if is_tied_copy(param):
            return 0
        return self._holders(param)[0] if self.zero == 0 else 1


def is_tied_copy(param: nn.Parameter) -> bool:
    """Whether this is the head's copy of an embedding that another stage holds."""
    return vars(param).get("twin") == "last"
