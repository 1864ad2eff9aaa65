"""A small model that runs ahead: what it thinks comes next in each row."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from models.decoder import Decoder
from models.generation.cache import Cache
from models.generation.config import GeneratorConfig
from models.generation.extend import Tail, commit, extend
from models.generation.forward import prefill
from models.generation.rows import Row
from models.generation.sampling import drawn, shaped
from models.generation.team import FirstRankFailed, Team

Decided = TypeVar("Decided")


@dataclass
class Proposal:
    """Tokens for one row. A row that is not greedy has the distributions [V] they were drawn from, on tensor-parallel
    ranks rank 0 alone."""

    tokens: list[int]
    probs: list[torch.Tensor]
    own: list[float]
    """Each token's probability among its `probs`."""

    def cut(self, most: int, stop_tokens: Sequence[int]) -> None:
        """Leave out what comes after so many tokens, or after one that would end the row."""
        ends = (place for place, token in enumerate(self.tokens, 1) if token in stop_tokens)
        count = min(most, next(ends, most))
        for part in (self.tokens, self.probs, self.own):
            del part[count:]


class Drafter:
    """The draft model and its own cache. Its slots are its own: it gives them to the rows it is asked about.

    A row for which nothing is proposed any more (its end is near, or past the draft's context) leaves its slot.
    """

    def __init__(self, model: Decoder, config: GeneratorConfig, team: Team) -> None:
        self.model, self.config, self.team = model, config, team
        self.cache = Cache(model, config.max_cached_tokens)
        self.rows: list[Row] = []
        self.cached: dict[Row, int] = {}
        """Tokens of each row in the cache."""
        self._tail: Tail | None = None

    def propose(self, rows: Sequence[Row]) -> list[Proposal]:
        """For each row as many tokens as are wanted: no more than may follow beside the model's own next one."""
        found = [Proposal([], [], []) for _ in rows]
        wanted = {row: self._wanted(row) for row in rows}
        asked = {row: proposal for row, proposal in zip(rows, found, strict=True) if wanted[row] > 0}
        self._follow(list(asked))
        self._tail = None
        if not asked:
            return found
        logits = self._caught_up()
        ahead = [asked[row] for row in self.rows]
        most = max(wanted[row] for row in self.rows)
        for step in range(most):
            add(self.team, logits, self.rows, ahead)
            if step + 1 < most:
                last = [proposal.tokens[-1:] for proposal in ahead]
                cached = [self.cached[row] for row in self.rows]
                logits, self._tail = extend(self.model, last, cached, self.cache, self._tail)
        for row, proposal in asked.items():
            proposal.cut(wanted[row], row.stop_tokens)
        return found

    def keep(self) -> None:
        """Take into the cache those of the last proposals that are text by now; the very last one was never run."""
        if self._tail is None:
            return
        accepted = [len(row.prompt) + len(row.tokens) - 1 - self.cached[row] for row in self.rows]
        counts = [min(each) for each in zip(accepted, self._tail.counts, strict=True)]
        self.cache.fit(len(self.rows), max(self.cached[row] + n for row, n in zip(self.rows, counts, strict=True)))
        commit(self.cache, self._tail, counts)
        for row, count in zip(self.rows, counts, strict=True):
            self.cached[row] += count

    def _wanted(self, row: Row) -> int:
        """The row's own affair, so that its text does not depend on the batch."""
        if row.source.guide is not None:  # it knows what may come next, not what may follow a proposal
            return 0
        room = self.model.cfg.max_seq_len - len(row.prompt) - len(row.tokens) + 1
        return max(0, min(self.config.draft_tokens, row.limit - len(row.tokens) - 1, room))

    def _caught_up(self) -> torch.Tensor:
        """Take what was added to the rows since into the cache: the logits after it, fp32 [rows, V]."""
        missing = [_known(row, self.cached[row]) for row in self.rows]
        cached = [self.cached[row] for row in self.rows]
        logits, tail = extend(self.model, missing, cached, self.cache)
        self.cache.fit(len(self.rows), max(n + m for n, m in zip(cached, tail.counts, strict=True)))
        commit(self.cache, tail, tail.counts)
        for row, count in zip(self.rows, tail.counts, strict=True):
            self.cached[row] += count
        return logits[[end - 1 for end in accumulate(tail.counts)]]

    def _follow(self, rows: Sequence[Row]) -> None:
        """Slots for exactly these rows: new ones take those of rows that are gone, then gaps are closed."""
        wanted = {*rows}
        free = [slot for slot, row in enumerate(self.rows) if row not in wanted]
        new = [row for row in rows if row not in self.cached]
        self.cached = {row: self.cached.get(row, 0) for row in rows}
        for row in new:
            if free:
                self.rows[free.pop(0)] = row
            else:
                self.rows.append(row)
        for slot in reversed(free):  # the last first, so that what moves is a row that stays
            last = self.rows.pop()
            if slot < len(self.rows):
                self.cache.move(len(self.rows), slot, self.cached[last])
                self.rows[slot] = last
        if new:
            self._begin(new)

    def _begin(self, new: Sequence[Row]) -> None:
        """Run all tokens but the last of new rows, once for rows that are alike."""
        slots = {row: slot for slot, row in enumerate(self.rows)}
        alike: dict[tuple[int, ...], list[Row]] = {}
        for row in new:
            alike.setdefault(tuple(_known(row, 0)[:-1]), []).append(row)
        self.cache.fit(len(self.rows), max(map(len, alike)))
        for texts in _portions(list(alike), self.config.prefill_tokens):
            prefill(self.model, texts, [slots[alike[text][0]] for text in texts], self.cache)
        for text, (first, *others) in alike.items():
            prefix = self.cache.take(slots[first], len(text)) if others else None
            for row in others:
                assert prefix is not None
                self.cache.give(slots[row], prefix)
            self.cached.update(dict.fromkeys((first, *others), len(text)))


def _known(row: Row, start: int) -> list[int]:
    """The row's tokens from this one on."""
    prompt = len(row.prompt)
    return [*row.prompt[start:], *row.tokens[max(0, start - prompt) :]]


def _portions(texts: Sequence[tuple[int, ...]], most: int) -> list[list[tuple[int, ...]]]:
    """Neighbours together up to so many tokens."""
    found: list[list[tuple[int, ...]]] = []
    for text in texts:
        if not found or sum(map(len, found[-1])) + len(text) > most:
            found.append([])
        found[-1].append(text)
    return found


def add(team: Team, logits_BV: torch.Tensor, rows: Sequence[Row], proposals: Sequence[Proposal]) -> None:
    """One more token for each row, drawn as the row itself would be, on rank 0: the others only hear of the token."""
    tokens = agreed(team, lambda: _drawn(logits_BV, rows, proposals))
    for token, proposal in zip(tokens, proposals, strict=True):
        proposal.tokens.append(token)


def _drawn(logits_BV: torch.Tensor, rows: Sequence[Row], proposals: Sequence[Proposal]) -> list[int]:
    by_setting: dict[object, list[int]] = {}
    for index, row in enumerate(rows):
        by_setting.setdefault(row.choosing, []).append(index)
    found: dict[int, int] = {}
    for indices in by_setting.values():
        cfg = rows[indices[0]].choosing
        sources = [replace(rows[i].source, tokens=[*rows[i].tokens, *proposals[i].tokens]) for i in indices]
        logits = shaped(logits_BV[indices], cfg, sources)
        if cfg.temperature == 0:
            found |= zip(indices, logits.argmax(-1).tolist(), strict=True)
            continue
        probs = logits.softmax(-1)
        tokens = drawn(probs, sources)
        found |= zip(indices, tokens.tolist(), strict=True)
        own = probs.gather(1, tokens[:, None])[:, 0].tolist()
        for i, probs_V, prob in zip(indices, probs, own, strict=True):
            proposals[i].probs.append(probs_V)
            proposals[i].own.append(prob)
    return [found[index] for index in range(len(rows))]


def agreed(team: Team, decide: Callable[[], Decided]) -> Decided:
    """What rank 0 of the tensor-parallel ranks decides, on all of them: they could differ in the last bit of a chance.

    Raises:
        FirstRankFailed: on the other ranks, where `decide` raised on rank 0.
    """
    if team.axis.size == 1:
        return decide()
    told: list[Any] = [None]
    try:
        if team.axis.rank == 0:
            told = [decide()]
    finally:
        dist.broadcast_object_list(told, group=team.axis.group, device=team.device, group_src=0)
    if told[0] is None:
        raise FirstRankFailed("rank 0 of the tensor-parallel ranks could not choose the next tokens; see its error")
    return told[0]
