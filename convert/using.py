"""How to use what was written: the flags of Megatron, the line of Loom."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from convert.megatron.args import to_args
from convert.megatron.layout import Layout
from models.config import ModelConfig

NOT_RESTORED = {
    "norm_epsilon": 1e-5,
    "qk_layernorm": False,
    "use_rope_scaling": False,
    "rope_scaling_factor": 8.0,
    "rotary_seq_len_interpolation_factor": None,
    "window_size": None,
    "window_attn_skip_freq": None,
    "multi_latent_attention": False,
    "q_lora_rank": None,
    "kv_lora_rank": None,
    "qk_head_dim": None,
    "qk_pos_emb_head_dim": None,
    "v_head_dim": None,
    "rope_type": None,
    "rotary_scaling_factor": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.0,
    "moe_router_num_groups": None,
    "moe_router_group_topk": None,
    "moe_shared_expert_gate": False,
    "moe_router_dtype": None,
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "num_layers_per_virtual_pipeline_stage": None,
    "expert_model_parallel_size": 1,
    "decoder_first_pipeline_num_layers": None,
    "decoder_last_pipeline_num_layers": None,
    "pipeline_model_parallel_layout": None,
    "transformer_impl": "transformer_engine",
    "bf16": False,
    "fp16": False,
}
"""Arguments that Megatron's --use-checkpoint-args does not restore, with the value it has without being told.

Source: Megatron-LM's `checkpointing.py` (`load_args_from_checkpoint`), read at 0.20.
"""


def directions(out: Path, form: str, cfg: ModelConfig, layout: Layout | None, dtype: torch.dtype) -> str:
    """What to do with a checkpoint."""
    if layout is None:
        return f"Load it:   AutoModelForCausalLM.from_pretrained({str(out)!r}), or train.py init_from={out} model=hf"
    training = f"Train from it with Loom, at any layout:\n  python train.py init_from={out} model=hf"
    if form == "safetensors":
        return training
    more = flags(to_args(cfg, layout, dtype))
    lines = [
        f"--load {out} --ckpt-format {form} --no-load-optim --no-load-rng   (or --finetune for these two)",
        f"--use-checkpoint-args --tokenizer-type HuggingFaceTokenizer --tokenizer-model {out / 'huggingface'}",
        *(["and what --use-checkpoint-args does not restore:", " ".join(more)] if more else []),
    ]
    return "Load it with Megatron-LM:\n" + "\n".join(f"  {line}" for line in lines) + f"\n{training}"


def flags(args: Mapping[str, Any]) -> list[str]:
    """The flags of arguments that a checkpoint does not restore, where they are not Megatron's defaults."""
    found = []
    for key, default in NOT_RESTORED.items():
        value = args.get(key, default)
        if value == default:
            continue
        flag = "--" + key.replace("_", "-")
        if value is True:
            found.append(flag)
        elif isinstance(value, list | tuple):
            found.append(f"{flag} {','.join(map(str, value))}")
        else:
            found.append(f"{flag} {value}")
    return found
