"""The Hugging Face Trainer on the benchmark's model: one process, or DeepSpeed ZeRO with DeepSpeed's own defaults."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from scripts.bench import workload
from scripts.bench.turns import Turns, parse_args


class Rows(torch.utils.data.Dataset):
    """The pretraining rows as the Trainer wants them."""

    def __init__(self, ids_RT: np.ndarray):
        self.ids_RT = torch.from_numpy(ids_RT)

    def __len__(self) -> int:
        return len(self.ids_RT)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids_RT[index], "labels": self.ids_RT[index]}


class TellTurns(TrainerCallback):
    """Reports each finished step; the Trainer logs the step's loss just before."""

    def __init__(self, turns: Turns, tokens: int):
        self.turns, self.tokens, self.loss = turns, tokens, float("nan")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Remember the loss and count the step: with logging_steps=1 this comes once after every step."""
        if "loss" in (logs or {}):
            self.turns.step(self.tokens, logs["loss"])


def trainer_arguments(folder: str, steps: int, **changes: Any) -> dict[str, Any]:
    """TrainingArguments shared by the Trainer and TRL: fused AdamW, clipping at 1, nothing saved or sent anywhere."""
    return {
        "output_dir": folder,
        "max_steps": steps,
        "learning_rate": workload.LEARNING_RATE,
        "adam_beta1": workload.BETAS[0],
        "adam_beta2": workload.BETAS[1],
        "weight_decay": workload.WEIGHT_DECAY,
        "max_grad_norm": workload.CLIP,
        "optim": "adamw_torch_fused",
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
    } | changes


def deepspeed_json(stage: int) -> dict[str, Any]:
    """What a Trainer user writes for ZeRO; DeepSpeed's defaults otherwise."""
    return {
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": workload.CLIP,
        "train_micro_batch_size_per_gpu": workload.MICRO_BATCH,
        "gradient_accumulation_steps": 1,
    }


def main() -> None:
    """Train with the Trainer."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--zero", type=int, default=0, help="ZeRO stage under DeepSpeed; 0 = no DeepSpeed")
    args, schedule = parse_args(parser)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        changes = {"deepspeed": deepspeed_json(args.zero), "ddp_backend": "gloo"} if args.zero else {}
        settings = TrainingArguments(
            **trainer_arguments(folder, schedule.total, per_device_train_batch_size=workload.MICRO_BATCH, **changes)
        )
        torch.manual_seed(0)
        model = LlamaForCausalLM(workload.llama_config())
        turns = Turns(args.address, schedule, settings.process_index)
        tell = TellTurns(turns, workload.MICRO_BATCH * workload.SEQ_LEN)
        rows = Rows(np.load(Path(args.data) / "pretrain.npy"))
        Trainer(model=model, args=settings, train_dataset=rows, callbacks=[tell]).train()


if __name__ == "__main__":
    main()
