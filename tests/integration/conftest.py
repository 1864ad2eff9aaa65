"""A small real world: a byte tokenizer and three channels of conversations that a tiny model can learn."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.unit.data.conftest import make_tokenizer

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class World:
    """Overrides that make train.py run on toy data below ``folder``."""

    folder: Path

    def overrides(self, **more: object) -> list[str]:
        """Command-line words of a short SFT run; ``more`` are further keys with ``__`` for the dot."""
        sources = ", ".join(f"{{path: {self.folder}/{name}.jsonl, channel: {name}}}" for name in ("sum", "echo", "say"))
        settings: dict[str, object] = {
            "model": "tiny_llama",
            "data.sources": f"[{sources}]",
            "data.tokenizer": self.folder / "tokenizer",
            "data.seq_len": 64,
            "data.global_batch_rows": 8,
            "data.micro_batch_rows": 2,
            "data.cache_dir": self.folder / "cache",
            "run.dir": self.folder / "runs",
            "run.steps": 6,
            "run.threads": 1,
            "optim.lr": 3e-3,
            "log.wandb": "disabled",
            "log.tensorboard": "false",
        }
        settings |= {key.replace("__", "."): value for key, value in more.items()}
        return [f"{key}={value}" for key, value in settings.items()]

    def metrics(self, run: str) -> dict[int, dict]:
        """Last training row of each step of a run."""
        rows = [json.loads(line) for line in (self.folder / "runs" / run / "metrics.jsonl").read_text().splitlines()]
        return {row["step"]: row for row in rows if row["kind"] == "train"}


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    make_tokenizer().save_pretrained(folder / "tokenizer")

    def chat(question: str, answer: str) -> dict:
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}

    channels = {
        "sum": [chat(f"{a}+{b}", str(a + b)) for a in range(8) for b in range(8)],
        "echo": [chat(f"say {word} " * n, word * n) for word in ("ha", "lo", "mi") for n in range(1, 9)],
        "say": [chat("hello", "good day to you"), chat("who", "a very small model")] * 12,
    }
    for name, rows in channels.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return World(folder)


@pytest.fixture(scope="session")
def launch() -> Callable[..., subprocess.CompletedProcess]:
    """Run train.py under torchrun (``processes`` > 0) or by hand (0) as a user would."""

    def run(words: list[str], processes: int = 2, timeout: float = 240, **popen: Any) -> subprocess.CompletedProcess:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        launcher = torchrun if processes else [sys.executable]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [*launcher, str(ROOT / "train.py"), *words]
        return subprocess.run(
            command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout, check=False, **popen
        )

    return run
