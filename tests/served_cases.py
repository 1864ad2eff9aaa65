"""What the pools run where a vLLM server writes: whole steps of the fakes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from models.adapters.config import AdapterConfig
from parallel.config import EngineConfig, ParallelConfig
from tests.cases import TINY, whole
from tests.generation_cases import Letters
from tests.rl_cases import rl_config, trainer_of
from trainer.optim import OptimConfig
from trainer.rl.served import ServedAuthor, check, server_of
from trainer.stages.grpo import GrpoConfig


def served_steps(
    url: str,
    init_from: str | None,
    weights_dir: str,
    layout: ParallelConfig,
    zero: Any = 1,
    adapter: AdapterConfig | None = None,
    precision: Any = "fp32",
) -> dict[str, Any]:
    """Three steps with a learning rate that moves the weights far, and what lies in the folder at the end."""
    rollout = {"backend": "vllm", "url": url, "weights_dir": weights_dir, "temperature": 0.8, "max_new_tokens": 12}
    cfg = rl_config(GrpoConfig(), TINY, layout, zero, 3, adapter, **rollout)
    optim = OptimConfig(lr=0.03, schedule="constant", warmup_steps=0)
    cfg = dataclasses.replace(
        cfg, init_from=init_from, optim=optim, engine=EngineConfig(zero=zero, precision=precision)
    )
    check(cfg, server_of(cfg))
    trainer, progress = trainer_of(cfg, save_to=Path("run"))
    author = trainer.collector.author
    assert isinstance(author, ServedAuthor)
    author.writer.tokenizer = Letters()
    metrics, said = [], []
    object.__setattr__(trainer.log, "note", said.append)
    while progress.step < 3:
        metrics.append(trainer.step(progress))
    trainer.collector.weights.fill()
    left = sorted(str(path.relative_to(weights_dir)) for path in Path(weights_dir).rglob("*"))
    return {
        "metrics": metrics,
        "said": said,
        "left": left,
        "weights": whole(trainer.policy.engine, trainer.groups, "master"),
    }
