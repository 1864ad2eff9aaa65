"""TRL's SFTTrainer on the fine-tuning workload, with padding or with its packing; only completions are learnt."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, LlamaForCausalLM
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from scripts.bench import workload
from scripts.bench.peers.hf_trainer import TellTurns, trainer_arguments
from scripts.bench.turns import Turns, parse_args

MICRO_BATCHES = 4
"""Without packing: four micro-batches of two samples a step, which pad far less than one of eight would.

With a mean near 190 tokens a step then learns from about as many as a packed row holds.
"""


class TellUsefulTokens(TellTurns):
    """Counts the tokens that are not padding as they enter the model; the dataloader's own count would run ahead."""

    def __init__(self, turns: Turns):
        super().__init__(turns, tokens=0)

    def watch(self, model: torch.nn.Module) -> None:
        """Add up the useful tokens of every forward pass of ``model`` that is learnt from."""

        def count(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            if not torch.is_grad_enabled():  # it writes texts, or scores them
                return
            mask = kwargs.get("attention_mask")
            self.tokens += int(mask.sum()) if mask is not None else kwargs["input_ids"].numel()

        model.register_forward_pre_hook(count, with_kwargs=True)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Count the step, then start anew."""
        super().on_log(args, state, control, logs, **kwargs)
        self.tokens = 0


def samples(folder: Path) -> Dataset:
    """The workload as TRL takes tokenised prompt and completion pairs."""
    rows = workload.read_sft_ids(folder)
    return Dataset.from_list(
        [
            {
                "input_ids": row["prompt"] + row["completion"],
                "completion_mask": [0] * len(row["prompt"]) + [1] * len(row["completion"]),
            }
            for row in rows
        ]
    )


def main() -> None:
    """Train with SFTTrainer."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--packing", action="store_true")
    args, schedule = parse_args(parser)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            **trainer_arguments(folder, schedule.total),
            per_device_train_batch_size=1 if args.packing else workload.MICRO_BATCH,
            gradient_accumulation_steps=1 if args.packing else MICRO_BATCHES,
            packing=args.packing,
            max_length=workload.SFT_LONGEST,
            completion_only_loss=True,
        )
        torch.manual_seed(0)
        tokenizer = AutoTokenizer.from_pretrained(Path(args.data) / "tokenizer")
        tell = TellUsefulTokens(Turns(args.address, schedule))
        model = LlamaForCausalLM(workload.llama_config())
        tell.watch(model)
        trainer = SFTTrainer(
            model=model,
            args=settings,
            train_dataset=samples(Path(args.data)),
            processing_class=tokenizer,
            callbacks=[tell],
        )
        trainer.train()


if __name__ == "__main__":
    main()
