"""Small real things to test the data room with: a tokenizer folder with a chat template, and JSONL files."""

from __future__ import annotations

import json
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from data.peers import Peers

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, 264 ids: every byte is a token, so that token counts can be told by hand."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=256, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([], trainer)
    backend.add_special_tokens([AddedToken(token, special=True) for token in ("<|im_start|>", "<|im_end|>")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|im_end|>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def tokenizer_folder(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[[str, list[Any]], str]:
    """Write rows (dicts, or bytes as they are) to a file of tmp_path; returns its path."""

    def write(name: str, rows: list[Any]) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        path.write_bytes(b"".join(line + b"\n" for line in lines))
        return str(path)

    return write


@pytest.fixture
def on_ranks() -> Callable[[int, Callable[[Peers], Any]], list[Any]]:
    """Run a function on several ranks at once (threads); returns each rank's result or exception, in rank order."""

    def run(world: int, work: Callable[[Peers], Any]) -> list[Any]:
        barrier = threading.Barrier(world, timeout=60)
        board: list[Any] = [None] * world
        results: list[Any] = [None] * world

        def gather(rank: int, obj: Any) -> list[Any]:
            board[rank] = pickle.dumps(obj)  # what crosses ranks must survive the wire
            barrier.wait()
            everything = [pickle.loads(part) for part in board]
            barrier.wait()
            return everything

        def rank_main(rank: int) -> None:
            try:
                results[rank] = work(Peers(rank, world, lambda obj: gather(rank, obj)))
            except Exception as err:  # handed to the test
                results[rank] = err

        threads = [threading.Thread(target=rank_main, args=(rank,)) for rank in range(world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
            assert not thread.is_alive(), "a rank hangs"
        return results

    return run
