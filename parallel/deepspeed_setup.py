"""What DeepSpeed must know of the layout, and how it is started; with `engine.py` the only users of the package."""

from __future__ import annotations

import logging
import warnings
from typing import Any

from torch import nn

from parallel.groups import Groups
from parallel.sharding import shard_of

EXPERTS = "experts"
"""DeepSpeed's name of the group that shares expert gradients."""


class Grid:
    """The layout in the words DeepSpeed asks for it (its ``mpu``).

    Its data-parallel group is dp x cp: ranks with the same weights and different tokens. Its model-parallel group is
    tp x pp: ranks that must agree on the norm and on skipping a step.
    """

    def __init__(self, groups: Groups):
        self._groups = groups

    def get_data_parallel_group(self) -> Any:
        """Ranks over which gradients are averaged and optimizer states cut."""
        return self._groups.data.group

    def get_data_parallel_rank(self) -> int:
        """Place in that group."""
        return self._groups.data.rank

    def get_data_parallel_world_size(self) -> int:
        """Size of that group."""
        return self._groups.data.size

    def get_model_parallel_group(self) -> Any:
        """Ranks that hold different parts of the weights."""
        return self._groups.model.group

    def get_model_parallel_rank(self) -> int:
        """Place in that group."""
        return self._groups.model.rank

    def get_model_parallel_world_size(self) -> int:
        """Size of that group."""
        return self._groups.model.size

    def get_tensor_model_parallel_rank(self) -> int:
        """Place on the tp axis."""
        return self._groups.tp.rank

    def get_tensor_model_parallel_world_size(self) -> int:
        """Size of the tp axis."""
        return self._groups.tp.size

    def get_pipeline_model_parallel_world_size(self) -> int:
        """Size of the pp axis."""
        return self._groups.pp.size


def import_deepspeed() -> Any:
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


def mark_experts(model: nn.Module, groups: Groups) -> bool:
    """Tell DeepSpeed which parameters are experts dealt out over ranks; returns whether any are trained.

    Frozen ones get DeepSpeed's mark of weights that differ between ranks: at its start it sends all others from the
    first data-parallel rank to the rest.
    """
    if groups.ep.size == 1:
        return False
    found = False
    for param in model.parameters():
        if shard_of(param).experts and param.requires_grad:
            found = True
            vars(param).update(allreduce=False, group_name=EXPERTS)
        elif shard_of(param).experts:
            vars(param)["ds_optim_param"] = True
    return found


def start(model: nn.Module, optimizer: Any, config: dict[str, Any], groups: Groups, has_experts: bool) -> Any:
    """DeepSpeed's engine around ``model``, reducing gradients over the run's own groups."""
    deepspeed = import_deepspeed()
    from deepspeed.utils import groups as theirs

    theirs.mpu = None  # an earlier engine of this process may have left another
    grid = None if groups.data.size == groups.world else Grid(groups)
    if not has_experts:
        return deepspeed.initialize(
            model=model, optimizer=optimizer, config=config, mpu=grid, dist_init_required=False
        )[0]
    theirs._EXPERT_PARALLEL_GROUP[EXPERTS] = groups.ep.group
    theirs._EXPERT_DATA_PARALLEL_GROUP[EXPERTS] = groups.expert_data.group
    deepspeed.zero.partition_parameters.shutdown_init_context()
    engine = _expert_engine(
        args=None,
        model=model,
        optimizer=optimizer,
        mpu=grid,
        dist_init_required=False,
        config=config,
        config_class=deepspeed.DeepSpeedConfig(config, grid),
    )
    deepspeed.zero.partition_parameters.restore_init_context()
    return engine


def _expert_engine(**arguments: Any) -> Any:
    from deepspeed.runtime.engine import DeepSpeedEngine

    class ExpertEngine(DeepSpeedEngine):
        """Trusts the parameters' marks; DeepSpeed itself only looks for its own MoE layer."""

        @property
        def has_moe_layers(self) -> bool:
            return True

        @has_moe_layers.setter
        def has_moe_layers(self, found: bool) -> None:
            assert not found, "DeepSpeed's own MoE layer is not used"

    return ExpertEngine(**arguments)
