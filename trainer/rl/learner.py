"""A model that learns from samples: the policy, and with PPO a critic."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from models.routing import RouterBook, RouterReport
from parallel.engine import Engine
from parallel.groups import Groups
from trainer import channels
from trainer.optim import OptimConfig
from trainer.rl.packing import Packer
from trainer.rl.samples import Samples
from trainer.stages.base import Stage


@dataclass
class Learnt:
    """What the updates of one step report."""

    terms: list[torch.Tensor] = field(default_factory=list)
    """Of every micro-batch, on ranks that report."""
    norms: list[float] = field(default_factory=list)
    """Gradient norm of every update."""
    skipped: int = 0
    tokens: int = 0
    """Run forward and backward, over all ranks."""
    loads: RouterReport = field(default_factory=lambda: RouterReport({}))
    """How routers chose in the last update."""


@dataclass(frozen=True)
class Learner:
    """An engine with its loss and its routers.

    Args:
        name: prefix of its metrics; ``train`` for the policy.
        optim: its learning rate by steps.
    """

    name: str
    engine: Engine
    stage: Stage
    routers: RouterBook
    optim: OptimConfig
    packer: Packer
    groups: Groups

    def learn(
        self, samples: Samples, which: Sequence[int], facts_L: Mapping[str, np.ndarray], lr: float, into: Learnt
    ) -> None:
        """One update on some of the samples; nothing where they have nothing to learn. Every rank calls alike."""
        if not len(which):
            return
        batches = self.packer.micro_batches(samples.documents(which, facts_L), samples.shown)
        mine = float(sum(batch.tokens_T.numel() for batch in batches))
        count, tokens = self.groups.sum([self.stage.count(batches), mine])
        if count <= 0:
            return
        self.routers.begin(self.groups.data.size * self.engine.loss_scale.value / tokens)
        result = self.engine.train_step(batches, self.stage.forward, count, lr)
        into.loads = self.routers.finish(self.groups.sum_tensor)
        into.terms += result.metrics
        into.norms.append(result.grad_norm)
        into.skipped += result.skipped
        into.tokens += int(tokens)

    def metrics(self, learnt: Learnt, names: Sequence[str]) -> dict[str, float]:
        """Numbers of a step's updates together."""
        if not learnt.norms:
            return {}
        found = channels.metrics(learnt.terms, names, self.groups.all_gather, self.name, self.stage.columns)
        found |= {f"{self.name}/grad_norm": float(np.mean(learnt.norms)), f"{self.name}/updates": len(learnt.norms)}
        if self.engine.cfg.precision == "fp16":
            found |= {f"{self.name}/loss_scale": self.engine.loss_scale.value}
            found |= {f"{self.name}/skipped": float(learnt.skipped)}
        if self.routers.routers:
            everywhere = RouterReport.joined(self.groups.gather_stages(learnt.loads)).metrics(names)
            found |= everywhere if self.name == "train" else {f"{self.name}/{key}": v for key, v in everywhere.items()}
        return found


def parts(which: np.ndarray, mini_batches: int, seed: int, step: int, epoch: int) -> Iterator[np.ndarray]:
    """The samples of each update of one pass: in an order of their own, cut evenly; empty ones are left out.

    Args:
        which: numbers of the samples that are learnt from.
    """
    order = np.random.default_rng([seed, step, epoch]).permutation(which) if mini_batches > 1 else which
    yield from (part for part in np.array_split(order, mini_batches) if len(part))
