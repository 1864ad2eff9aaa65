"""What the pools run to let Megatron-core itself load a checkpoint: its own GPTModel, built from the file's own args.

Megatron-core runs on a CPU and without Transformer Engine and Apex when a few calls are put right (`on_a_cpu`); none
of them touches a weight. Everything here is written from Megatron's side: folder names, how args become a model
(`core_transformer_config_from_args`, `gpt_builder`), which rank is which.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import importlib.metadata
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

VERSION = "0.16.1"


def what_is_missing() -> str | None:
    """Why no test can run Megatron-core here, and the way out; None where it is installed."""
    try:
        found = importlib.metadata.version("megatron-core")
    except importlib.metadata.PackageNotFoundError:
        found = "not installed"
    if found == VERSION:
        return None
    return (
        f"nothing here proves the Megatron layout: megatron-core is {found}, these tests are for {VERSION}. Run "
        f"`pip install --no-deps megatron-core=={VERSION}` (scripts/_env.sh does). There are wheels for Linux and "
        "Python 3.10 to 3.13; for anything else it is built from source, which needs a C++ compiler"
    )


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How many ranks along each of Megatron's axes."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    ep: int = 1


def loaded_logits(root: str, sizes: Sizes, tokens_BT: torch.Tensor) -> torch.Tensor | None:
    """Logits [B, T, padded vocabulary] of the checkpoint in `root`, on the ranks of the last stage.

    Every rank loads its own file strictly into models filled with NaN before.
    """
    with on_a_cpu(), model_parallel(sizes), torch.no_grad():
        chunks = load(Path(root), sizes)
        return forward(chunks, sizes, tokens_BT)


@contextlib.contextmanager
def on_a_cpu() -> Iterator[None]:
    """Megatron-core's calls of CUDA and of Transformer Engine, answered on a CPU; undone afterwards."""
    attention, latent, mappings, moe, rng = (
        importlib.import_module(f"megatron.core.{name}")
        for name in (
            "transformer.dot_product_attention",
            "transformer.multi_latent_attention",
            "tensor_parallel.mappings",
            "transformer.moe.moe_utils",
            "tensor_parallel.random",
        )
    )
    init = attention.DotProductAttention.__init__

    def any_value_size(self: Any, *args: Any, k_channels: int = 0, v_channels: int = 0, **kwargs: Any) -> None:
        # Only Transformer Engine's attention takes values of another size than queries; its sums do not care.
        init(self, *args, **kwargs)
        if v_channels:
            self.hidden_size_per_partition = v_channels * self.num_attention_heads_per_partition

    all_to_all = dist.all_to_all_single

    def with_int_sizes(*args: Any, **kwargs: Any) -> Any:
        # Sizes come as tensors or numpy numbers, which gloo refuses.
        for key in ("output_split_sizes", "input_split_sizes"):
            if kwargs.get(key) is not None:
                kwargs[key] = [int(size) for size in kwargs[key]]
        return all_to_all(*args, **kwargs)

    ones = torch.ones

    def ones_here(*args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        return ones(*args, device="cpu" if device == "cuda" else device, **kwargs)  # the sliding window's mask

    with contextlib.ExitStack() as stack:
        for target, name, value in (
            (torch.cuda, "current_device", lambda: torch.device("cpu")),
            (torch.Tensor, "cuda", lambda self: self),
            (torch, "ones", ones_here),
            (rng.CudaRNGStatesTracker, "fork", lambda *args, **kwargs: contextlib.nullcontext()),
            (attention.DotProductAttention, "__init__", any_value_size),
            (mappings.torch.distributed, "all_to_all_single", with_int_sizes),
            (moe, "te_general_gemm", None),
            (latent, "HAVE_TE", False),
        ):
            stack.enter_context(mock.patch.object(target, name, value, create=True))
        yield


@contextlib.contextmanager
def model_parallel(sizes: Sizes) -> Iterator[None]:
    """Megatron's groups over the processes of the pool; what is left over are data-parallel replicas."""
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=sizes.tp,
        pipeline_model_parallel_size=sizes.pp,
        virtual_pipeline_model_parallel_size=sizes.vpp if sizes.vpp > 1 else None,
        expert_model_parallel_size=sizes.ep,
        expert_tensor_parallel_size=sizes.tp,
        create_gloo_process_groups=False,
    )
    try:
        yield
    finally:
        groups = [group for group in parallel_state._global_process_group_list or [] if group is not None]
        parallel_state.destroy_model_parallel()
        for group in {id(group): group for group in groups}.values():
            if group in dist.distributed_c10d._world.pg_map and group is not dist.group.WORLD:
                dist.destroy_process_group(group)


def load(root: Path, sizes: Sizes) -> list[Any]:
    """This rank's chunks of the model, loaded strictly."""
    from megatron.core import parallel_state

    tp = parallel_state.get_tensor_model_parallel_rank()
    pp = parallel_state.get_pipeline_model_parallel_rank()
    ep = parallel_state.get_expert_model_parallel_rank()
    name = f"mp_rank_{tp:02d}" + (f"_{pp:03d}" if sizes.pp > 1 else "") + (f"_{ep:03d}" if sizes.ep > 1 else "")
    iteration = (root / "latest_checkpointed_iteration.txt").read_text().strip()
    folder = root / ("release" if iteration == "release" else f"iter_{int(iteration):07d}")
    with torch.serialization.safe_globals([argparse.Namespace]):
        file = torch.load(folder / name / "model_optim_rng.pt", map_location="cpu", weights_only=True)
    assert file["checkpoint_version"] == 3.0 and isinstance(file["iteration"], int)
    args = file["args"]
    found = (args.tensor_model_parallel_size, args.pipeline_model_parallel_size, args.expert_model_parallel_size)
    assert found == (sizes.tp, sizes.pp, sizes.ep), found
    states = [file["model"]] if sizes.vpp == 1 else [file[f"model{chunk}"] for chunk in range(sizes.vpp)]
    chunks = []
    for number, state in enumerate(states):
        if sizes.vpp > 1:
            parallel_state.set_virtual_pipeline_model_parallel_rank(number)
        chunk = build(args, number if sizes.vpp > 1 else None)
        with_local_names(state, args, tp)
        chunk.load_state_dict(state, strict=True)
        chunks.append(chunk)
    return chunks


def build(args: argparse.Namespace, vp_stage: int | None) -> Any:
    """Megatron's GPTModel of these args, every weight NaN."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec

    config = transformer_config(args)
    spec: Any
    if args.num_experts:
        spec = get_gpt_decoder_block_spec(config, False, normalization=args.normalization, vp_stage=vp_stage)
    else:
        spec = get_gpt_layer_local_spec(
            qk_layernorm=args.qk_layernorm,
            multi_latent_attention=args.multi_latent_attention,
            normalization=args.normalization,
        )
    ends = {"vp_stage": vp_stage, "ignore_virtual": False}
    model = GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(**ends),
        post_process=parallel_state.is_pipeline_last_stage(**ends),
        parallel_output=True,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        rope_scaling=args.use_rope_scaling,
        rope_scaling_factor=args.rope_scaling_factor,
        seq_len_interpolation_factor=args.rotary_seq_len_interpolation_factor,
        vp_stage=vp_stage,
    ).eval()
    for tensor in model.state_dict().values():
        if isinstance(tensor, torch.Tensor):
            tensor.fill_(float("nan"))
    return model


def transformer_config(args: argparse.Namespace) -> Any:
    """Megatron's config of the args: fields of the same name, then those that it renames; no fused kernels here."""
    from megatron.core.transformer import MLATransformerConfig, TransformerConfig

    kind = MLATransformerConfig if args.multi_latent_attention else TransformerConfig
    assert args.swiglu
    known = {field.name for field in dataclasses.fields(kind)}
    fields = {name: value for name, value in vars(args).items() if name in known}
    fields |= {
        "layernorm_zero_centered_gamma": args.apply_layernorm_1p,
        "layernorm_epsilon": args.norm_epsilon,
        "num_moe_experts": args.num_experts,
        "rotary_interleaved": args.rotary_interleaved,
        "num_layers_in_first_pipeline_stage": args.decoder_first_pipeline_num_layers,
        "num_layers_in_last_pipeline_stage": args.decoder_last_pipeline_num_layers,
        "activation_func": torch.nn.functional.silu,
        "gated_linear_unit": True,
        "num_query_groups": args.num_query_groups if args.group_query_attention else None,
        "params_dtype": torch.float32,
        "pipeline_dtype": torch.float32,
        "bf16": False,
        "fp16": False,
    }
    # How it is computed here, which no checkpoint decides.
    fields |= {
        "use_cpu_initialization": True,
        "perform_initialization": False,
        "transformer_impl": "local",
        "moe_grouped_gemm": False,
        "moe_token_dispatcher_type": "allgather",
        "gradient_accumulation_fusion": False,
    }
    config = kind(**fields)
    if args.position_embedding_type == "yarn":
        # Read from the config by these names, which it has no fields for; the first and the mscales come from others.
        taken = {
            "rotary_scaling_factor": "rotary_scaling_factor",
            "mscale": "mscale",
            "mscale_all_dim": "mscale_all_dim",
        }
        own = ("original_max_position_embeddings", "beta_fast", "beta_slow", "correction_range_round_to_int")
        for name, given in (taken | {key: f"yarn_{key}" for key in own}).items():
            setattr(config, f"yarn_{name}", getattr(args, given))
    return config


def with_local_names(state: dict[str, Any], args: argparse.Namespace, tp_rank: int) -> None:
    """Give the weights of a Transformer Engine checkpoint the names that the model without it has.

    Megatron's own hook, made for that; it leaves alone experts, and projections that each tensor-parallel rank holds
    whole with Transformer Engine and a part of without.
    """
    if args.transformer_impl == "local":
        return
    from megatron.core.post_training.modelopt.gpt.state_dict_hooks import mcore_gpt_load_te_state_dict_pre_hook

    assert args.transformer_impl == "transformer_engine"
    mcore_gpt_load_te_state_dict_pre_hook(state, "", {}, True, [], [], [])
    for name in list(state):
        if ".experts.linear_fc" in name:
            assert args.moe_grouped_gemm
            module, expert = name.split(".weight")
            layer, linear = module.split("experts.")
            state[f"{layer}experts.local_experts.{int(expert)}.{linear}.weight"] = state.pop(name)
        elif "linear_q_down_proj" in name or "linear_kv_down_proj" in name:
            state[name] = state[name].chunk(args.tensor_model_parallel_size)[tp_rank]


def forward(chunks: list[Any], sizes: Sizes, tokens_BT: torch.Tensor) -> torch.Tensor | None:
    """One batch through all chunks in the model's order; every rank of a stage hands on its own hidden states."""
    from megatron.core import parallel_state

    rank = parallel_state.get_pipeline_model_parallel_rank()
    group: Any = parallel_state.get_pipeline_model_parallel_group()
    batch, length = tokens_BT.shape
    positions_BT = torch.arange(length).expand(batch, length)
    mask = torch.ones(1, 1, length, length).triu(1).bool()
    hidden: Any = None
    for number in range(sizes.pp * sizes.vpp):
        if number % sizes.pp == rank:
            chunk = chunks[number // sizes.pp]
            chunk.set_input_tensor(hidden if number else None)
            hidden = chunk(tokens_BT, positions_BT, mask)
        if number + 1 < sizes.pp * sizes.vpp:
            if hidden is None:
                hidden = torch.empty(length, batch, chunks[0].config.hidden_size)
            hidden = hidden.contiguous()
            dist.broadcast(hidden, group=group, group_src=number % sizes.pp)
    if rank != sizes.pp - 1:
        return None
    parts = [torch.empty_like(hidden) for _ in range(sizes.tp)]
    dist.all_gather(parts, hidden.contiguous(), group=parallel_state.get_tensor_model_parallel_group())
    return torch.cat(parts, -1)
