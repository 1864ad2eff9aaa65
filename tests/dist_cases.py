"""What the pools run to let Megatron-core itself load and save `torch_dist` checkpoints."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from tests.megatron_cases import Sizes, build, forward, model_parallel, on_a_cpu

ENGINE_NAMES = {
    "self_attention.q_layernorm.weight": "self_attention.linear_q_up_proj.layer_norm_weight",
    "self_attention.kv_layernorm.weight": "self_attention.linear_kv_up_proj.layer_norm_weight",
}
"""With latent attention: what the norms are called without and with Transformer Engine."""

States = list[dict[str, torch.Tensor]]
"""Of each chunk on a rank its tensors."""


def loaded(root: str, sizes: Sizes, tokens_BT: torch.Tensor | None) -> tuple[States, torch.Tensor | None]:
    """This rank's weights of the checkpoint in `root`, loaded into models filled with NaN, and logits of `tokens_BT`.

    Keys that Megatron asks for and does not find, or that it finds and does not ask for, are errors; of a checkpoint
    for Transformer Engine, which does not run here, it leaves alone the empty states that only that asks for.
    """
    from megatron.core import dist_checkpointing

    folder = str(Path(root) / "release")
    with on_a_cpu(), model_parallel(sizes), torch.no_grad():
        common: Any = dist_checkpointing.load_common_state_dict(folder)
        args = common["args"]
        assert isinstance(args, argparse.Namespace)
        chunks = built(args, sizes)
        wanted = sharded(chunks, args)
        found, missing, unexpected = dist_checkpointing.load(wanted, folder, strict="return_all")
        assert not unexpected, f"not in the checkpoint: {unexpected}"
        beside = {key for key in missing if key.endswith("_extra_state")}
        assert missing == (beside if args.transformer_impl == "transformer_engine" else set()), missing
        for number, chunk in enumerate(chunks):
            chunk.load_state_dict(found[f"model{number}"], strict=True)
        states = [{k: v for k, v in chunk.state_dict().items() if isinstance(v, torch.Tensor)} for chunk in chunks]
        return states, None if tokens_BT is None else forward(chunks, sizes, tokens_BT)


def built(args: argparse.Namespace, sizes: Sizes) -> list[Any]:
    """This rank's chunks of Megatron's model, for these sizes whatever those of the args are."""
    from megatron.core import parallel_state

    args = argparse.Namespace(**vars(args))
    args.tensor_model_parallel_size, args.pipeline_model_parallel_size = sizes.tp, sizes.pp
    args.virtual_pipeline_model_parallel_size = sizes.vpp if sizes.vpp > 1 else None
    args.expert_model_parallel_size, args.expert_tensor_parallel_size = sizes.ep, sizes.tp
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
