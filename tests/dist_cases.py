"""What the pools run to let Megatron-core itself load and save `torch_dist` checkpoints."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import torch
import torch.distributed as dist

from tests.megatron_cases import Sizes, build, forward, model_parallel, on_a_cpu

ENGINE_NAMES = {
    "self_attention.q_layernorm.weight": "self_attention.linear_q_up_proj.layer_norm_weight",
    "self_attention.kv_layernorm.weight": "self_attention.linear_kv_up_proj.layer_norm_weight",
}
"""With latent attention: what the norms are called without and with Transformer Engine."""

States = list[dict[str, torch.Tensor]]
"""Of each chunk on a rank its tensors."""


def loaded(root: str, sizes: Sizes, tokens_BT: torch.Tensor | None) -> tuple[States, torch.Tensor | None]:
    """This rank's weights, loaded from `root` into models filled with NaN, and logits of `tokens_BT`."""
    with on_a_cpu(), model_parallel(sizes), torch.no_grad():
        chunks, _ = load(Path(root), sizes)
        states = [{k: v for k, v in chunk.state_dict().items() if isinstance(v, torch.Tensor)} for chunk in chunks]
        return states, None if tokens_BT is None else forward(chunks, sizes, tokens_BT)


def saved(root: str, into: str, sizes: Sizes) -> None:
    """Load the checkpoint in `root` and save it as Megatron does, as iteration 7 in `into`, cut for `sizes`."""
    from megatron.core import dist_checkpointing

    with on_a_cpu(), model_parallel(sizes), torch.no_grad():
        chunks, args = load(Path(root), sizes)
        folder = Path(into) / "iter_0000007"
        if dist.get_rank() == 0:
            folder.mkdir(parents=True)
            (Path(into) / "latest_checkpointed_iteration.txt").write_text("7")
        dist.barrier()
        beside = {"args": args, "checkpoint_version": 3.0, "iteration": 7, "num_floating_point_operations_so_far": 0}
        model = {f"model{number}": chunk.sharded_state_dict() for number, chunk in enumerate(chunks)}
        weights = [(key, name, tensor) for key, state in model.items() for name, tensor in state.items()]
        moments = {f"{key}.{name}": as_moment(tensor) for key, name, tensor in weights if name.endswith("norm.weight")}
        with threads_for_processes():
            dist_checkpointing.save(beside | model | {"optimizer": moments}, str(folder))


@contextlib.contextmanager
def threads_for_processes() -> Iterator[None]:
    """Megatron writes with processes of its own, which the daemons of a pool may not have; no bytes differ."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    manager = SimpleNamespace(Queue=queue.Queue)
    context = SimpleNamespace(
        Process=threading.Thread, Queue=queue.Queue, JoinableQueue=queue.Queue, Manager=lambda: manager
    )
    with (
        mock.patch.object(filesystem_async, "mp", SimpleNamespace(get_context=lambda method: context)),
        mock.patch.object(filesystem_async, "_results_queue", None),
        mock.patch.object(torch.cuda, "synchronize", lambda: None),
    ):
        yield


def as_moment(tensor: Any) -> Any:
    """What an optimizer keeps for a weight, as Megatron names it."""
    return dataclasses.replace(tensor, key=f"optimizer.state.exp_avg.{tensor.key}")


def load(root: Path, sizes: Sizes) -> tuple[list[Any], argparse.Namespace]:
    """This rank's chunks, loaded, and the args, with `sizes` in them.

    Keys that Megatron asks for and does not find, or that it finds and does not ask for, are errors; of a checkpoint
    for Transformer Engine, which does not run here, it leaves alone the empty states that only that asks for.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.safe_globals import register_safe_globals

    # Importing Megatron did this, but torch forgets it where that was inside of a `safe_globals` block.
    register_safe_globals()
    folder = str(root / "release")
    common = cast(dict[str, Any], dist_checkpointing.load_common_state_dict(folder))
    args = with_sizes(common["args"], sizes)
    chunks = built(args, sizes)
    answer = dist_checkpointing.load(sharded(chunks, args), folder, strict="return_all")
    found, missing, unexpected = cast(tuple[dict[str, Any], set[str], set[str]], answer)
    assert not unexpected, f"not in the checkpoint: {unexpected}"
    beside = {key for key in missing if key.endswith("_extra_state")}
    assert missing == (beside if args.transformer_impl == "transformer_engine" else set()), f"not asked for: {missing}"
    for number, chunk in enumerate(chunks):
        chunk.load_state_dict(found[f"model{number}"], strict=True)
    return chunks, args


def with_sizes(args: argparse.Namespace, sizes: Sizes) -> argparse.Namespace:
    """The args of a run at other sizes than those the checkpoint was made for."""
    changed = argparse.Namespace(**vars(args))
    changed.tensor_model_parallel_size = changed.expert_tensor_parallel_size = sizes.tp
    changed.pipeline_model_parallel_size, changed.expert_model_parallel_size = sizes.pp, sizes.ep
    changed.virtual_pipeline_model_parallel_size = sizes.vpp if sizes.vpp > 1 else None
    return changed


def built(args: argparse.Namespace, sizes: Sizes) -> list[Any]:
    """This rank's chunks of Megatron's model."""
    from megatron.core import parallel_state

    chunks = []
    for number in range(sizes.vpp):
        if sizes.vpp > 1:
            parallel_state.set_virtual_pipeline_model_parallel_rank(number)
        chunks.append(build(args, number if sizes.vpp > 1 else None))
    return chunks


def sharded(chunks: list[Any], args: argparse.Namespace) -> dict[str, Any]:
    """What Megatron asks of a checkpoint, under Transformer Engine's names if it was written for that."""
    wanted = {f"model{number}": chunk.sharded_state_dict() for number, chunk in enumerate(chunks)}
    if args.transformer_impl == "transformer_engine":
        for state in wanted.values():
            for name, tensor in state.items():
                tensor.key = engine_name(name, tensor.key, state, args.multi_latent_attention)
    return wanted


def engine_name(name: str, key: str, state: dict[str, Any], latent: bool) -> str:
    """Transformer Engine fuses a norm into the linear layer behind it, and none into a layer of experts."""
    below = ".".join(name.split(".")[3:])
    prefix = key[: -len(below)] if key.endswith(below) else key.removesuffix("mlp.linear_fc1.layer_norm_weight")
    if below == "pre_mlp_layernorm.weight":
        experts = f"{name.removesuffix(below)}mlp.router.weight" in state
        return prefix + (below if experts else "mlp.linear_fc1.layer_norm_weight")
    return prefix + ENGINE_NAMES[below] if latent and below in ENGINE_NAMES else key
