"""How tensor-parallel ranks write the same text: each has some columns of the logits, rank 0 of the axis decides.

A draw depends on the row's seed alone, yet ranks could differ in the last bit of what it is held against: a GPU adds up
cumulated probabilities in no fixed order, and machines may differ. One other token would leave their caches apart for
good. So a greedy row is chosen by each rank's best logit, which every rank sends and all compare alike; the logits of
other rows go to rank 0, and the tokens it draws to all.

Legend: `N` rows; `V` vocabulary; `W` = ceil(V / tp) columns of one rank, those of the last ones padding.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from models.decoder import Decoder
from models.generation.config import Request, Step
from parallel.collectives import all_reduce, start_gather_rows
from parallel.sharding import Axis

Chosen = tuple[int, tuple[float, float] | None]
"""A token, and its log-probabilities (as drawn, the model's own) where they were asked for."""


class FirstRankFailed(RuntimeError):
    """Rank 0 could not choose the next tokens; what it says itself is the reason."""


@dataclass(frozen=True)
class Team:
    """The tp ranks of one generator; with one rank nothing is sent."""

    axis: Axis
    vocab: int
    device: torch.device

    @staticmethod
    def of(model: Decoder) -> "Team":
        """Those a model lies on."""
        return Team(model.place.tp, model.cfg.vocab_size, next(model.parameters()).device)

    def check_alike(self, requests: Sequence[Request], *settings: object) -> None:
        """Ranks that are asked for different things would wait for each other for ever.

        Raises:
            ValueError: they are; on every rank.
        """
        if self.axis.size == 1:
            return
        asked = [
            (
                each.prompt if isinstance(each.prompt, str) else list(each.prompt),
                each.sampling,
                each.seed,
                each.sight and each.sight.identity(),
            )
            for each in requests
        ]
        text = repr((asked, settings)).encode(errors="backslashreplace")
        number = int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "little")
        ends = all_reduce(torch.tensor([number, -number], device=self.device), self.axis, dist.ReduceOp.MAX).tolist()
        if ends[0] != -ends[1]:
            raise ValueError(
                f"the {self.axis.size} tensor-parallel ranks of a generator were asked for different things; "
                "give each of them the same prompts, settings and GeneratorConfig"
            )

    def streamed(self, rounds: Iterable[Iterable[Step]]) -> Iterator[Step]:
        """The steps of all rounds. After every round the ranks hear from rank 0 whether somebody still reads there."""
        for steps in rounds:
            if self.axis.size == 1:
                yield from steps
            elif made := list(steps):
                more = torch.zeros(1, dtype=torch.uint8, device=self.device)
                try:
                    yield from made
                    more += 1
                finally:
                    dist.broadcast(more, group=self.axis.group, group_src=0)
                if not more.item():
                    return

    def choose(
        self,
        logits_NW: torch.Tensor,
        greedy: Sequence[bool],
        decide: Callable[[torch.Tensor, Sequence[int]], list[Chosen]],
    ) -> list[Chosen]:
        """The next token of every row, the same on all ranks.

        Args:
            logits_NW: fp32, this rank's columns.
            greedy: rows of which nothing is asked but the most probable token.
            decide: chooses for some rows, from their whole logits; called on rank 0 only.

        Raises:
            FirstRankFailed: on the other ranks, where `decide` raised on rank 0.
        """
        every = range(len(greedy))
        if self.axis.size == 1:
            return decide(logits_NW, every)
        found: dict[int, Chosen] = {}
        for wanted, chosen in ((True, self._best), (False, lambda own, which: self._decided(own, which, decide))):
            which = [i for i in every if greedy[i] is wanted]
            if which:
                own = logits_NW if len(which) == len(every) else logits_NW[which]
                found |= zip(which, chosen(own, which), strict=True)
        return [found[i] for i in every]

    def _best(self, logits_NW: torch.Tensor, _: Sequence[int]) -> list[Chosen]:
        """The most probable tokens; of equal ones the first, as without cutting."""
        width = logits_NW.shape[1]
        first = self.axis.rank * width
        own = logits_NW[:, : max(self.vocab - first, 0)]
        best = torch.full((len(logits_NW), 2), -math.inf, dtype=torch.float64, device=self.device)
        if own.shape[1]:
            values_N, ids_N = own.max(1)
            best = torch.stack([values_N.double(), (ids_N + first).double()], 1)
        every = start_gather_rows(best, self.axis).wait().unflatten(0, (self.axis.size, -1))
        rank_N = every[..., 0].argmax(0)
        return [(int(token), None) for token in every[..., 1].gather(0, rank_N[None])[0].tolist()]

    def _decided(
        self,
        logits_NW: torch.Tensor,
        which: Sequence[int],
        decide: Callable[[torch.Tensor, Sequence[int]], list[Chosen]],
    ) -> list[Chosen]:
        whole = self._on_first(logits_NW)
        # token, whether there are log-probabilities, both of them; a token that is no number: there is none
        told = torch.full((len(which), 4), math.nan, dtype=torch.float64)
        try:
            if whole is not None:
                chosen = decide(whole, which)
                told = torch.tensor([(t, p is not None, *(p or (0.0, 0.0))) for t, p in chosen], dtype=torch.float64)
        finally:
            told = told.to(self.device)
            dist.broadcast(told, group=self.axis.group, group_src=0)
        rows = told.tolist()
        if math.isnan(rows[0][0]):
            raise FirstRankFailed("rank 0 of the tensor-parallel ranks could not choose the next tokens; see its error")
        return [(int(token), (drawn, model) if has else None) for token, has, drawn, model in rows]

    def _on_first(self, logits_NW: torch.Tensor) -> torch.Tensor | None:
        """The whole logits [N, V] on rank 0, nothing on the others."""
        own, group = logits_NW.contiguous(), self.axis.group
        if self.axis.rank:
            dist.gather(own, group=group, group_dst=0)
            return None
        parts = [torch.empty_like(own) for _ in range(self.axis.size)]
        dist.gather(own, parts, group=group, group_dst=0)
        return torch.cat(parts, 1)[:, : self.vocab]
