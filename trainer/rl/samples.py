"""The rollouts of a step as flat arrays, the same on every rank, and what models say of them.

Legend: S samples, M all their tokens one sample after another, L those among them that the policy wrote (learnt).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from data.batch import Document, MicroBatch
from parallel.engine import Forward
from parallel.groups import Groups
from trainer.rl.packing import GROUP, SAMPLE, Packer
from trainer.rl.sights import Sights
from trainer.rollout.types import Rollout


class Model(Protocol):
    """What can be asked about micro-batches: an engine, a frozen model."""

    def score(self, micro_batches: Sequence[Any], forward: Forward) -> list[Any]:
        """See `Engine.score`."""
        ...


@dataclass(frozen=True)
class Samples:
    """Rollouts with the channels they count for; a sample has at least one learnt token."""

    rollouts: Sequence[Rollout]
    channel_S: np.ndarray
    """int64 [S]: index into the run's channels."""
    sights: Sights | None = None
    """Gives what prompts show; None = the model sees nothing."""

    @cached_property
    def borders_S1(self) -> np.ndarray:
        """int64 [S+1]: the tokens of sample s are [borders[s], borders[s+1])."""
        return np.cumsum([0, *(len(each.tokens) for each in self.rollouts)])

    @cached_property
    def learn_M(self) -> np.ndarray:
        """bool [M]: written by the policy."""
        return np.concatenate([np.array(each.learn, dtype=bool) for each in self.rollouts])

    @cached_property
    def lengths_S(self) -> np.ndarray:
        """int64 [S]: learnt tokens of each sample."""
        return np.add.reduceat(self.learn_M, self.borders_S1[:-1], dtype=np.int64)

    @cached_property
    def group_S(self) -> np.ndarray:
        """int64 [S]: the number of the prompt."""
        return np.array([each.prompt.number for each in self.rollouts], dtype=np.int64)

    @cached_property
    def reward_S(self) -> np.ndarray:
        """float64 [S]."""
        return np.array([each.reward for each in self.rollouts], dtype=np.float64)

    @cached_property
    def truncated_S(self) -> np.ndarray:
        """bool [S]: cut off at the longest length."""
        return np.array([each.finish == "length" for each in self.rollouts])

    @cached_property
    def generated_L(self) -> np.ndarray:
        """float64 [L]: the generator's own log-probabilities, nats."""
        return np.concatenate([np.array(each.log_probs) for each in self.rollouts])[self.learn_M]

    @cached_property
    def tokens(self) -> list[np.ndarray]:
        """int64 tokens of each sample."""
        return [np.array(each.tokens, dtype=np.int64) for each in self.rollouts]

    def __len__(self) -> int:
        return len(self.rollouts)

    def documents(self, which: Sequence[int], facts_L: Mapping[str, np.ndarray] | None = None) -> list[Document]:
        """Some samples for training or scoring, each with the numbers of its learnt tokens (0 at the others)."""
        facts_M = {name: self._at_all(facts) for name, facts in (facts_L or {}).items()}
        found = []
        for s in which:
            own = slice(self.borders_S1[s], self.borders_S1[s + 1])
            facts = {name: facts[own] for name, facts in facts_M.items()}
            channel = int(self.channel_S[s])
            of_sample = {SAMPLE: float(s), GROUP: float(self.group_S[s])}
            found.append(Document(self.tokens[s], self.learn_M[own], channel, of_sample, facts))
        return found

    def shown(self, documents: Sequence[Document]) -> list[Document]:
        """Some of its documents with the pictures of their prompts."""
        if self.sights is None:
            return list(documents)
        prompts = [self.rollouts[int(each.facts[SAMPLE])].prompt for each in documents]
        return self.sights.shown(documents, prompts)

    def _at_all(self, facts_L: np.ndarray) -> np.ndarray:
        facts_M = np.zeros(len(self.learn_M))
        facts_M[self.learn_M] = facts_L
        return facts_M


@dataclass(frozen=True)
class Scorer:
    """Asks models about all samples of a step, in the layout of the run; every rank gets all answers.

    ``tokens`` counts those that models were run on.
    """

    packer: Packer
    groups: Groups

    def log_probs(self, model: Model, samples: Samples, temperature: float) -> np.ndarray:
        """Log-probability of each learnt token, float64 [L], nats."""

        def forward(module: nn.Module, batch: MicroBatch) -> torch.Tensor:
            asked = {"targets_T": batch.targets_T, "output": "log_probs", "temperature": temperature}
            return module(**batch.inputs, **asked)[0]

        return self._ask(model, samples, forward, shift=1)[samples.learn_M]

    def values(self, model: Model, samples: Samples) -> np.ndarray:
        """What a scalar head says at each token, having read it, float64 [M]."""

        def forward(module: nn.Module, batch: MicroBatch) -> torch.Tensor:
            return module(**batch.inputs, output="head")[: len(batch.tokens_T)]

        return self._ask(model, samples, forward, shift=0)

    def last_values(self, model: Model, samples: Samples) -> np.ndarray:
        """The same at the last token of each sample, float64 [S]: what a reward model says of it."""
        return self.values(model, samples)[samples.borders_S1[1:] - 1]

    def _ask(
        self, model: Model, samples: Samples, forward: Callable[[Any, MicroBatch], torch.Tensor], shift: int
    ) -> np.ndarray:
        """What ``forward`` says of each token, float64 [M].

        ``shift``: 1 if what stands at a token is of the next one, and only of learnt ones.
        """
        device, borders = self.groups.device, torch.from_numpy(samples.borders_S1).to(self.groups.device)
        answer_M = torch.zeros(int(samples.borders_S1[-1]), device=device)

        def of_batch(module: nn.Module, batch: MicroBatch, _: float) -> tuple[torch.Tensor, Any]:
            sample_T = batch.doc_facts[SAMPLE].long()[batch.doc_T]
            said_T = forward(module, batch).detach().float()
            counts_T = batch.targets_T >= 0 if shift else sample_T >= 0
            place = (borders[sample_T.clamp(min=0)] + batch.positions_T + shift)[counts_T]
            return torch.zeros((), device=device), (place, said_T[counts_T])

        batches = self.packer.micro_batches(samples.documents(range(len(samples))), samples.shown)
        for place, said in model.score(batches, of_batch):
            if self.groups.tp.rank == 0:  # the others say the same
                answer_M[place] = said
        if self.groups.world > 1:
            dist.all_reduce(answer_M)
        return answer_M.cpu().double().numpy()


def value_before(value_M: np.ndarray, samples: Samples) -> np.ndarray:
    """The value before each learnt token is written, [L]."""
    return np.concatenate([[0.0], value_M[:-1]])[samples.learn_M]  # the first token of a sample is never learnt
