"""TRL's GRPOTrainer, answers by ``transformers.generate``. Tokens are those it learns from, prompts included."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from datasets import load_dataset
from transformers import AutoTokenizer, LlamaForCausalLM
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from scripts.bench import rl_work, workload
from scripts.bench.peers.hf_trainer import trainer_arguments
from scripts.bench.peers.trl_sft import TellUsefulTokens
from scripts.bench.turns import Turns, parse_args


def main() -> None:
    """Train with GRPOTrainer: no reference (its default), one update a rollout."""
    args, schedule = parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = Path(args.data)
    tell = TellUsefulTokens(Turns(args.address, schedule))
    with tempfile.TemporaryDirectory() as folder:
        settings = trainer_arguments(folder, schedule.total) | {
            "learning_rate": rl_work.LEARNING_RATE,
            "per_device_train_batch_size": rl_work.ROWS,
            "gradient_accumulation_steps": rl_work.PROMPTS * rl_work.GROUP // rl_work.ROWS,
            "num_generations": rl_work.GROUP,
            "max_completion_length": rl_work.NEW_TOKENS,
            "loss_type": "grpo",
            "beta": 0.0,
        }
        model = LlamaForCausalLM(workload.llama_config(use_cache=True))
        tell.watch(model)
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=rl_work.even_words_of_each,
            args=GRPOConfig(**settings),
            train_dataset=load_dataset("json", data_files=str(rl_work.prompts_file(data)), cache_dir=folder)["train"],
            processing_class=AutoTokenizer.from_pretrained(data / "tokenizer"),
            callbacks=[tell],
        )
        trainer.train()


if __name__ == "__main__":
    main()
