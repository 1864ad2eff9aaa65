"""Fill a meta-device model with this rank's parts of the weights (for ZeRO-3, partitioned at once)."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from parallel.sharding import REPLICATED, WHOLE, Cut, Shard, is_idle, name_of, shard_of


class TensorSource(Protocol):
    """Weights by Loom's parameter names: files of any layout, a checkpoint, or the initialiser."""

    def tensor(self, name: str) -> torch.Tensor:
        """The whole (uncut) tensor of parameter or buffer ``name``, any float type, on the CPU."""
        ...

    def part(self, name: str, shard: Shard, cut: Cut) -> torch.Tensor:
        """What ``cut`` gives of it. Unless a source knows better, all of it is made, then cut; files read a part only.

        Where ranks hold rows that are none of the whole (``shard.pad``), those are zeros.
        """
        whole = self.tensor(name)
        local = shard.slice(whole, cut)
        return local.clone() if local.numel() < whole.numel() else local  # a view would keep the whole in memory


@runtime_checkable
class Packs(Protocol):
    """A module that keeps its weights in another form."""

    def pack(self) -> None:
        """Called as soon as they are filled."""
        ...


def fill_(param: nn.Parameter, local: torch.Tensor, device: torch.device) -> None:
    """Turn a meta parameter into real fp32 values in place, keeping its identity (ties) and its attributes.

    Args:
        param: a parameter on the meta device.
        local: this rank's part of it.
        device: where the values will live.
    """
    attributes = dict(param.__dict__)
    assert local.shape == param.shape, f"source gave {tuple(local.shape)} for a parameter of shape {tuple(param.shape)}"
    values = local.to(device=device, dtype=torch.float32).contiguous()
    fresh = nn.Parameter(values, requires_grad=param.requires_grad)
    torch.utils.swap_tensors(param, fresh)
    vars(param).update(attributes)


def materialise(
    model: nn.Module,
    source: TensorSource,
    cut: Cut,
    device: torch.device,
    zero_config: Any = None,
    zero_group: Any = None,
) -> None:
    """Fill every parameter and persistent buffer of ``model`` from ``source``; buffers are not cut.

    With ``zero_config`` (a DeepSpeed dictionary with ZeRO-3) each leaf module is partitioned over the ranks of
    ``zero_group`` as soon as it is filled, so that no rank ever holds more than one whole leaf above its share.
    """
    names = {id(param): name_of(param, name) for name, param in model.named_parameters()}
    done: set[int] = set()
    for module in model.modules():
        fresh = [p for p in module.parameters(recurse=False) if id(p) not in done]
        for param in fresh:
            local = torch.zeros(param.shape) if is_idle(param) else source.part(names[id(param)], shard_of(param), cut)
            fill_(param, local, device)
            done.add(id(param))
        if isinstance(module, Packs):
            module.pack()
        if fresh and zero_config is not None:
            partition_leaf(module, zero_config, zero_group)
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(prefix, recurse=False):
            whole = source.part(name, REPLICATED, WHOLE).to(device=device, dtype=torch.float32, copy=True)
            assert whole.shape == buffer.shape, f"source gave {tuple(whole.shape)} for buffer {name}"
            setattr(module, name.rpartition(".")[2], whole)


def partition_leaf(module: nn.Module, zero_config: Any, group: Any = None) -> None:
    """Hand one module's own parameters to ZeRO-3."""
    import deepspeed

    holder = nn.Module()
    for name, param in module.named_parameters(recurse=False):
        if not hasattr(param, "ds_id"):
            holder.register_parameter(name, param)
    deepspeed.zero.Init(module=holder, data_parallel_group=group, config_dict_or_path=zero_config)
