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

PADDED_BATCH = 8
"""Samples of one step without packing: with a mean near 190 tokens about as many useful ones as a packed row."""


class TellUsefulTokens(TellTurns):
    """Counts the tokens that are not padding, as the collator lets them pass."""

    def __init__(self, turns: Turns):
        super().__init__(turns, tokens=0)

    def watch(self, collate: Any) -> Any:
        """The collator, adding up the useful tokens of the batch it makes for the coming step."""

        def watched(samples: list[dict[str, Any]]) -> Any:
            self.tokens = sum(len(sample["input_ids"]) for sample in samples)
            return collate(samples)

        return watched


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
            per_device_train_batch_size=1 if args.packing else PADDED_BATCH,
            packing=args.packing,
            max_length=workload.SFT_LONGEST,
            completion_only_loss=True,
        )
        torch.manual_seed(0)
        tokenizer = AutoTokenizer.from_pretrained(Path(args.data) / "tokenizer")
        tell = TellUsefulTokens(Turns(args.address, schedule))
        trainer = SFTTrainer(
            model=LlamaForCausalLM(workload.llama_config()),
            args=settings,
            train_dataset=samples(Path(args.data)),
            processing_class=tokenizer,
            callbacks=[tell],
        )
        trainer.data_collator = tell.watch(trainer.data_collator)
        trainer.train()


if __name__ == "__main__":
    main()
