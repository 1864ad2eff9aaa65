"""The benchmark's model and data, the same for every contender.

Rows are drawn from a Zipf law, so that losses fall and can be compared, and are written twice: as text that a tokenizer
of whole words turns back into exactly these ids (for Loom, which reads files), and as ids (for the peers).
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

HIDDEN, LAYERS, HEADS, KV_HEADS, FFN, VOCABULARY = 256, 8, 8, 4, 704, 4096
SEQ_LEN, MICRO_BATCH = 512, 2
SFT_MEDIAN, SFT_LONGEST, SFT_SIGMA = 120, 2048, 1.0
LEARNING_RATE, BETAS, WEIGHT_DECAY, CLIP = 1e-3, (0.9, 0.95), 0.1, 1.0
EOS, PAD, FIRST_WORD = 0, 1, 2
"""Ids: end of text, padding, and the first that is a word."""


@dataclass(frozen=True)
class Load:
    """What a step of pretraining works on, and how deep the model is."""

    layers: int = LAYERS
    seq_len: int = SEQ_LEN
    rows: int = MICRO_BATCH
    """Rows of a micro-batch."""
    micro_batches: int | None = None
    """Micro-batches of a step, over all processes; None = one for each process."""

    def of_step(self, processes: int) -> int:
        """Micro-batches of a step of a contender with so many processes."""
        return self.micro_batches or processes

    def words(self) -> tuple[str, ...]:
        """As options of a contender."""
        sizes = ("--layers", str(self.layers), "--seq-len", str(self.seq_len), "--rows", str(self.rows))
        return sizes if self.micro_batches is None else (*sizes, "--micro-batches", str(self.micro_batches))

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """The options that `words` writes."""
        parser.add_argument("--layers", type=int, default=LAYERS)
        parser.add_argument("--seq-len", type=int, default=SEQ_LEN)
        parser.add_argument("--rows", type=int, default=MICRO_BATCH, help="of a micro-batch")
        parser.add_argument("--micro-batches", type=int, help="of a step, over all processes; default: one each")

    @staticmethod
    def read(args: argparse.Namespace) -> Load:
        """What the options say."""
        return Load(args.layers, args.seq_len, args.rows, args.micro_batches)


def pretrain_rows(rows: int, seed: int = 0, seq_len: int = SEQ_LEN) -> np.ndarray:
    """Documents that each fill one row, the end-of-text token included. int64 [rows, seq_len]."""
    words = zipf_words(np.random.default_rng(seed), rows * (seq_len - 1)).reshape(rows, seq_len - 1)
    return np.concatenate([words, np.full((rows, 1), EOS)], axis=1)


def sft_samples(samples: int, seed: int = 0) -> list[tuple[list[int], list[int]]]:
    """(prompt, completion) ids with log-normal lengths; a third of each is the prompt, and EOS ends the completion."""
    rng = np.random.default_rng(seed)
    lengths = np.exp(rng.normal(np.log(SFT_MEDIAN), SFT_SIGMA, samples)).astype(int).clip(6, SFT_LONGEST)
    pairs = []
    for length in lengths:
        ids = zipf_words(rng, length - 1).tolist()
        cut = length // 3
        pairs.append((ids[:cut], [*ids[cut:], EOS]))
    return pairs


def write(folder: Path, rows: int, samples: int, seq_len: int = SEQ_LEN) -> None:
    """Write tokenizer, ids and text of both workloads into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_tokenizer(folder / "tokenizer")
    ids = pretrain_rows(rows, seq_len=seq_len)
    np.save(folder / "pretrain.npy", ids)
    write_lines(folder / "pretrain.jsonl", ({"text": as_text(row[:-1])} for row in ids.tolist()))
    pairs = sft_samples(samples)
    write_lines(folder / "sft_ids.jsonl", ({"prompt": p, "completion": c} for p, c in pairs))
    write_lines(folder / "sft.jsonl", ({"prompt": as_text(p), "completion": " " + as_text(c[:-1])} for p, c in pairs))


def read_sft_ids(folder: Path) -> list[dict[str, list[int]]]:
    """What ``write`` left in sft_ids.jsonl."""
    return [json.loads(line) for line in (folder / "sft_ids.jsonl").read_text().splitlines()]


def llama_config(**changes: Any) -> Any:
    """The model as a transformers LlamaConfig."""
    from transformers import LlamaConfig

    sizes = {
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "intermediate_size": FFN,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": SFT_LONGEST,
        "tie_word_embeddings": False,
        "attn_implementation": "sdpa",
        "use_cache": False,
        "bos_token_id": EOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
    }
    return LlamaConfig(**sizes | changes)


def zipf_words(rng: np.random.Generator, count: int) -> np.ndarray:
    """So many ids of words, the frequent ones first. int64 [count]."""
    num_words = VOCABULARY - FIRST_WORD
    weight = 1.0 / np.arange(1, num_words + 1)
    return rng.choice(num_words, size=count, p=weight / weight.sum()).astype(np.int64) + FIRST_WORD


def as_text(ids: list[int]) -> str:
    """What the tokenizer turns back into these ids."""
    return " ".join(f"w{i}" for i in ids)


def write_lines(path: Path, rows: Any) -> None:
    """One JSON line a row."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<eos>": EOS, "<pad>": PAD} | {f"w{i}": i for i in range(FIRST_WORD, VOCABULARY)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<pad>").save_pretrained(folder)
