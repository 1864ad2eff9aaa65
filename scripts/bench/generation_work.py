"""What the contenders of ``generation.py`` are given and give back: prompts of mixed lengths, and new tokens."""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data.tokenizer import load_tokenizer

SHORTEST, LONGEST = 16, 512
CHANNELS = ("reference", "dialogue", "code", "maths")


@dataclass(frozen=True)
class Work:
    """The prompts and what is asked for each. `folder` is where the new tokens are left."""

    prompts: list[list[int]]
    samples: int
    new_tokens: int
    stop_tokens: tuple[int, ...]
    """Empty: every text has `new_tokens` tokens."""
    folder: str = ""

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """What a contender is told beside its turns."""
        parser.add_argument("--name", required=True, help="of the contender")
        parser.add_argument("--model", required=True)
        parser.add_argument("--rows", type=int, required=True, help="texts that are decoded together")
        parser.add_argument("--threads", type=int, default=2)

    @staticmethod
    def read(args: argparse.Namespace) -> Work:
        """What `write` left in the folder `--data`."""
        given = json.loads((Path(args.data) / "work.json").read_text())
        given |= {"stop_tokens": tuple(given["stop_tokens"]), "folder": args.data}
        return Work(**given)

    def write(self, folder: Path) -> None:
        """For `read`."""
        (folder / "work.json").write_text(json.dumps(asdict(self)))

    def keep(self, name: str, texts: Sequence[Sequence[int]]) -> None:
        """Leave a contender's new tokens, for `alike`."""
        (Path(self.folder) / f"{name.replace(' ', '_')}.json").write_text(json.dumps([list(text) for text in texts]))


def kept(folder: Path, name: str) -> list[list[int]]:
    """The new tokens that a contender left."""
    return json.loads((folder / f"{name.replace(' ', '_')}.json").read_text())


def lengths(count: int, seed: int) -> list[int]:
    """Of prompts: spread evenly over the logarithm between 16 and 512 tokens; mean about 143."""
    draw = random.Random(seed)
    low, high = math.log(SHORTEST), math.log(LONGEST)
    return [round(math.exp(draw.uniform(low, high))) for _ in range(count)]


def prompts_of(texts: Sequence[str], tokenizer: Any, count: int, seed: int) -> list[list[int]]:
    """Token ids of running text, each from another place and of another length."""
    draw = random.Random(seed + 1)
    found = []
    for length in lengths(count, seed):
        at, tokens = draw.randrange(len(texts)), []
        while len(tokens) < length:
            tokens += tokenizer.encode(texts[at % len(texts)] + "\n")
            at += 1
        found.append(tokens[:length])
    return found


def texts_of(folder: Path) -> list[str]:
    """Questions and answers of the quickstart's data, channels mixed by sample.

    Raises:
        RuntimeError: they are not there.
    """
    channels = []
    for name in CHANNELS:
        path = folder / f"{name}.jsonl"
        if not path.exists():
            raise RuntimeError(f"{path} is missing; run scripts/prepare_quickstart.py")
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        channels.append(["\n".join(message["content"] for message in line["messages"]) for line in lines])
    return [text for together in zip(*channels, strict=False) for text in together]


def make_work(model: Path, data: Path, prompts: int, samples: int, new_tokens: int, ends: bool, seed: int = 0) -> Work:
    """The benchmark's prompts for this model's tokenizer."""
    tokenizer = load_tokenizer(str(model))
    made = prompts_of(texts_of(data), tokenizer, prompts, seed)
    return Work(made, samples, new_tokens, (tokenizer.eos_token_id,) if ends else ())
