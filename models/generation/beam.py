"""Beam search over the texts of one prompt, plain or in groups that keep away from each other.

Sources: Vijayakumar et al. 2016 (diverse beam search). Which candidates may end, what is kept and when the search is
over is as in transformers, so that its texts are the same.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from heapq import nlargest
from operator import itemgetter

import torch

from models.generation.config import Step
from models.generation.rows import Row
from models.generation.search_config import BeamConfig
from models.generation.text import TextStream, Tokenizer


@dataclass(frozen=True)
class _Beam:
    """A text that goes on, or has ended."""

    tokens: tuple[int, ...] = ()
    log_probs: tuple[float, ...] = ()
    total: float = 0.0
    """Sum of the log-probabilities less the penalties: what the group goes by."""
    row: int = 0
    """Of the search, among those that were run last."""
    stream: TextStream | None = None
    """Its text, where stop strings are looked for."""

    def score(self, total: float, length_penalty: float) -> float:
        """The score with this sum."""
        return total / len(self.tokens) ** length_penalty


class _Group:
    """Beams that compete with each other."""

    def __init__(self, size: int, cfg: BeamConfig, limit: int, root: _Beam) -> None:
        self.size, self.cfg, self.limit = size, cfg, limit
        self.running = [root]
        self.ended: list[_Beam] = []
        """The best that have ended, the best first."""

    def choose(self, candidates: Iterator[tuple[_Beam, bool]]) -> None:
        """Take the next beams from the candidates (with whether they end), the best first.

        Only the first `size` candidates may end: those after them are there so that as many beams go on.
        """
        self.running, new = [], []
        for rank, (beam, ends) in enumerate(candidates):
            if not ends:
                self.running.append(beam)
            elif rank < self.size:
                new.append(beam)
            if len(self.running) == self.size:
                break
        self.ended = sorted([*self.ended, *new], key=self._score, reverse=True)[: self.size]
        if self._over():
            self.running = []

    def _score(self, beam: _Beam) -> float:
        return beam.score(beam.total, self.cfg.length_penalty)

    def _over(self) -> bool:
        """Whether nothing better is looked for. With all beams at their limit there are none that go on."""
        if len(self.ended) < self.size or not self.running:
            return False
        if self.cfg.early_stopping == "full":
            return True
        penalty, length = self.cfg.length_penalty, len(self.running[0].tokens)
        if self.cfg.early_stopping == "exact" and penalty > 0:
            length = self.limit  # the sum can only fall, and is divided by most there
        return self.running[0].total / length**penalty <= self._score(self.ended[-1])


class BeamSearch:
    """The search for one prompt's texts; `rows` take the best ones when it is over."""

    def __init__(self, cfg: BeamConfig, rows: Sequence[Row], tokenizer: Tokenizer | None) -> None:
        self.cfg, self.rows, self.stop_tokens = cfg, rows, rows[0].stop_tokens
        stream = None
        if cfg.stop:
            assert tokenizer is not None
            stream = TextStream(tokenizer, cfg.stop)
        size = cfg.num_beams // cfg.beam_groups
        self.groups = [_Group(size, cfg, rows[0].limit, _Beam(stream=stream)) for _ in range(cfg.beam_groups)]
        # As many candidates as are needed for `size` that go on when all stop tokens come first.
        self.candidates = max(2, 1 + len(self.stop_tokens)) * size

    def advance(self, logits_BV: torch.Tensor, states_ND: torch.Tensor) -> tuple[list[tuple[int, int]], list[Step]]:
        """See `search.Search`."""
        # What earlier groups took can fall behind in a later one: as many more are looked at.
        top = logits_BV.topk(min(self.candidates + self.cfg.num_beams, logits_BV.shape[1]))
        log_probs = top.values - logits_BV.logsumexp(-1, keepdim=True)
        found = [list(zip(*row, strict=True)) for row in zip(top.indices.tolist(), log_probs.tolist(), strict=True)]
        taken: Counter[int] = Counter()
        for group in self.groups:
            if group.running:
                group.choose(self._candidates(group.running, found, taken))
                taken.update(beam.tokens[-1] for beam in group.running)
        children: list[tuple[int, int]] = []
        for group in self.groups:
            start = len(children)
            children += [(beam.row, beam.tokens[-1]) for beam in group.running]
            group.running = [replace(beam, row=start + i) for i, beam in enumerate(group.running)]
        return children, [] if children else self._result()

    def _candidates(
        self, beams: Sequence[_Beam], found: Sequence[Sequence[tuple[int, float]]], taken: Counter[int]
    ) -> Iterator[tuple[_Beam, bool]]:
        """Beams that are one token longer, the best first, with whether they end."""
        penalty = self.cfg.diversity_penalty
        options = (
            (beam.total + log_prob - penalty * taken[token], beam, token, log_prob)
            for beam in beams
            for token, log_prob in found[beam.row]
        )
        for total, beam, token, log_prob in nlargest(self.candidates, options, key=itemgetter(0)):
            tokens, stream = (*beam.tokens, token), beam.stream
            ends = token in self.stop_tokens or len(tokens) == self.rows[0].limit
            if stream is not None and token not in self.stop_tokens:
                stream = stream.fork()
                stream.push(token)
                ends |= stream.stopped
            yield _Beam(tokens, (*beam.log_probs, log_prob), total, beam.row, stream), ends

    def _result(self) -> list[Step]:
        """Give the best texts of all groups to the rows."""
        penalty = self.cfg.length_penalty
        scored = [(beam.score(sum(beam.log_probs), penalty), beam) for group in self.groups for beam in group.ended]
        steps: list[Step] = []
        assert len(scored) >= len(self.rows)
        for row, (score, beam) in zip(self.rows, sorted(scored, key=itemgetter(0), reverse=True), strict=False):
            row.score = score
            for token, log_prob in zip(beam.tokens, beam.log_probs, strict=True):
                steps.append(row.push(token, (0.0, log_prob) if self.cfg.log_probs else None))
            assert row.finish is not None
        return steps
