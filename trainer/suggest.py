"""Which key was probably meant by one that does not exist."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from trainer.problems import nearest

CLOSE = 0.65
"""Likeness, as difflib counts it, from which a suggestion helps more than it puzzles."""
ALIASES = {
    "learning_rate": "optim.lr",
    "max_grad_norm": "optim.clip",
    "clip_grad": "optim.clip",
    "lr_scheduler_type": "optim.schedule",
    "warmup": "optim.warmup_steps",
    "adam_beta1": "optim.betas",
    "wd": "optim.weight_decay",
    "batch_size": "data.global_batch_rows",
    "global_batch_size": "data.global_batch_rows",
    "train_batch_size": "data.global_batch_rows",
    "gradient_accumulation_steps": "data.global_batch_rows",
    "micro_batch_size": "data.micro_batch_rows",
    "per_device_train_batch_size": "data.micro_batch_rows",
    "max_seq_length": "data.seq_len",
    "max_length": "data.seq_len",
    "seq_length": "data.seq_len",
    "path": "data.sources",
    "dataset": "data.sources",
    "max_steps": "run.steps",
    "train_iters": "run.steps",
    "num_train_epochs": "run.epochs",
    "output_dir": "run.dir",
    "save_steps": "run.save_every",
    "save_total_limit": "run.keep_last",
    "eval_steps": "run.eval_every",
    "resume_from_checkpoint": "run.resume",
    "bf16": "engine.precision",
    "fp16": "engine.precision",
    "dtype": "engine.precision",
    "zero_stage": "engine.zero",
    "gradient_checkpointing": "engine.recompute",
    "activation_checkpointing": "engine.recompute",
    "attn_implementation": "engine.attention",
    "tensor_parallel": "parallel.tp",
    "tp_size": "parallel.tp",
    "tensor_parallel_size": "parallel.tp",
    "tensor_parallel_degree": "parallel.tp",
    "tensor_model_parallel_size": "parallel.tp",
    "sp": "parallel.sequence_parallel",
    "pipeline_parallel": "parallel.pp",
    "pp_size": "parallel.pp",
    "pipeline_parallel_size": "parallel.pp",
    "pipeline_parallel_degree": "parallel.pp",
    "pipeline_model_parallel_size": "parallel.pp",
    "pipeline_schedule": "parallel.schedule",
    "virtual_pipeline": "parallel.vpp",
    "virtual_pipeline_parallel_size": "parallel.vpp",
    "num_layers_per_virtual_pipeline_stage": "parallel.vpp",
    "pipeline_layout": "parallel.stage_layers",
    "context_parallel": "parallel.cp",
    "cp_size": "parallel.cp",
    "context_parallel_size": "parallel.cp",
    "context_parallel_degree": "parallel.cp",
    "ulysses_sequence_parallel_size": "parallel.cp",
    "expert_parallel": "parallel.ep",
    "ep_size": "parallel.ep",
    "expert_parallel_size": "parallel.ep",
    "expert_parallel_degree": "parallel.ep",
    "expert_model_parallel_size": "parallel.ep",
    "num_experts_per_tok": "model.moe.top_k",
    "num_local_experts": "model.moe.num_experts",
    "aux_loss_coef": "model.moe.balance_loss",
    "router_aux_loss_coef": "model.moe.balance_loss",
    "capacity_factor": "model.moe.capacity",
    "logging_steps": "log.every",
    "report_to": "log.wandb",
    "model_name_or_path": "init_from",
    "pretrained": "init_from",
    "checkpoint": "init_from",
}
"""What other trainers call our keys; read only to answer a key that does not exist."""


def close_keys(key: str, known: Sequence[str]) -> list[str]:
    """Keys that were probably meant: the same last word, a near spelling of it, or the name another trainer uses."""
    section, _, last = key.rpartition(".")
    leaves = [k for k in known if not any(other.startswith(f"{k}.") for other in known)]
    same = [k for k in leaves if k.split(".")[-1] == last]
    if same:
        return nearest(key, same) or same[:3]

    def likeness(word: str) -> float:
        return difflib.SequenceMatcher(None, last.lower(), word).ratio()

    scored = [(likeness(k.split(".")[-1]) + 0.1 * k.startswith(f"{section}."), k) for k in leaves]
    scored += [(likeness(word) + 0.1 * k.startswith(f"{section}."), k) for word, k in ALIASES.items()]
    score, best = max(scored)
    return [best] if score >= CLOSE else []
