"""TRL's DPOTrainer and RewardTrainer on the pairs. Tokens are the useful ones of both answers, prompts included."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from transformers import AutoTokenizer, LlamaForCausalLM, LlamaForSequenceClassification
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.reward_config import RewardConfig
from trl.trainer.reward_trainer import RewardTrainer

from scripts.bench import preference_work, workload
from scripts.bench.peers.hf_trainer import trainer_arguments
from scripts.bench.peers.trl_sft import TellUsefulTokens
from scripts.bench.turns import Schedule, Turns, parse_args


def settings(args: argparse.Namespace, schedule: Schedule, folder: str) -> dict[str, Any]:
    """A step has the same pairs whether they come together or one by one."""
    pairs = preference_work.STEP_PAIRS[args.lengths]
    return trainer_arguments(folder, schedule.total) | {
        "learning_rate": preference_work.LEARNING_RATE,
        "per_device_train_batch_size": args.rows,
        "gradient_accumulation_steps": pairs // args.rows,
        "max_length": None,
        "seed": 0,
    }


def dpo(args: argparse.Namespace, schedule: Schedule, folder: str, shared: dict[str, Any]) -> Any:
    """The reference has the policy's weights; the loss is DPO's."""
    config = DPOConfig(
        **settings(args, schedule, folder),
        precompute_ref_log_probs=args.precompute,
        precompute_ref_batch_size=args.rows,
    )
    policy = LlamaForCausalLM(workload.llama_config())
    reference = LlamaForCausalLM(workload.llama_config())
    reference.load_state_dict(policy.state_dict())
    return policy, DPOTrainer(model=policy, ref_model=reference, args=config, **shared)


def reward(args: argparse.Namespace, schedule: Schedule, folder: str, shared: dict[str, Any]) -> Any:
    """A scalar head at the last token."""
    model = LlamaForSequenceClassification(workload.llama_config(num_labels=1))
    return model, RewardTrainer(model=model, args=RewardConfig(**settings(args, schedule, folder)), **shared)


def main() -> None:
    """Train with one of the two."""
    parser = argparse.ArgumentParser()
    preference_work.add_arguments(parser)
    parser.add_argument("--rows", type=int, default=1, help="pairs that are padded together")
    args, schedule = parse_args(parser)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = Path(args.data)
    tell = TellUsefulTokens(Turns(args.address, schedule))
    with tempfile.TemporaryDirectory() as folder:
        shared = {
            "train_dataset": load_dataset(
                "json", data_files=str(preference_work.pairs_file(data, args.lengths)), cache_dir=folder
            )["train"],
            "processing_class": AutoTokenizer.from_pretrained(data / "tokenizer"),
            "callbacks": [tell],
        }
        model, trainer = (dpo if args.stage == "dpo" else reward)(args, schedule, folder, shared)
        tell.watch(model)
        trainer.train()


if __name__ == "__main__":
    main()
