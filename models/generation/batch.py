"""The rows that are decoded together: let in when there is room, one token each a step, their slots given on."""

from collections import deque
from collections.abc import Iterator, Sequence

import torch

from models.decoder import Decoder
from models.generation.cache import Cache
from models.generation.config import GeneratorConfig, SamplingConfig, Step
from models.generation.forward import decode, prefill
from models.generation.rows import Group, Row
from models.generation.sampling import choose
from models.generation.speculative import Speculation
from models.generation.team import Chosen, Team

GREEDY = SamplingConfig(max_new_tokens=1)
"""`Row.choosing` where nothing is asked but the most probable token."""

APART = 256
"""Tokens of the prompt in all rows but one from which on it is held once."""


class Batch:
    """The live rows and their cache. Row i has slot i; between two steps ended rows may still stand there."""

    def __init__(
        self, model: Decoder, config: GeneratorConfig, waiting: deque[Group], speculation: Speculation | None
    ) -> None:
        self.model, self.config, self.waiting, self.team = model, config, waiting, Team.of(model)
        self.speculation = speculation
        self.rows: list[Row] = []
        self.cache = Cache(model, config.max_cached_tokens)

    def admit(self) -> Iterator[Step]:
        """Let rows in until the batch is full; each begins with its first token."""
        while new := self._next_rows():
            free = [slot for slot, row in enumerate(self.rows) if row.finish is not None]
            self._place([row for _, row in new], free)
            yield from self._begin(new)
        self._place([], [slot for slot, row in enumerate(self.rows) if row.finish is not None])

    def step(self) -> Iterator[Step]:
        """One more token for every row, or with a draft at least one."""
        if not self.rows:
            return
        if self.speculation is not None:
            yield from self.speculation.turn(self.rows, self.cache)
            return
        self.cache.fit(len(self.rows), max(row.cached for row in self.rows) + 1)
        last = [row.tokens[-1] for row in self.rows]
        logits = decode(self.model, last, [row.cached for row in self.rows], self.cache, False)
        for row in self.rows:
            row.cached += 1
        yield from _chosen(logits, self.rows, self.team)

    def _next_rows(self) -> list[tuple[Group, Row]]:
        """Whose turn it is, as far as rows, cache and the prompts' tokens of one forward allow."""
        live = [row for row in self.rows if row.finish is None]
        longest, count = max((row.reserve for row in live), default=0), len(live)
        found: list[tuple[Group, Row]] = []
        tokens = 0
        while self.waiting and count < self.config.max_rows:
            group = self.waiting[0]
            fresh = group.prefix is None and not (found and found[-1][0] is group)
            longest = max(longest, group.reserve)
            if (count + 1) * longest > self.config.max_cached_tokens:
                break
            if fresh and found and tokens + len(group.prompt) > self.config.prefill_tokens:
                break
            tokens += len(group.prompt) if fresh else 0
            found.append((group, group.rows[group.begun]))
            group.begun, count = group.begun + 1, count + 1
            if group.begun == len(group.rows):
                self.waiting.popleft()
        return found

    def _place(self, new: list[Row], free: list[int]) -> None:
        """Give new rows the slots of ended ones and then the next ones; close the gaps that are left."""
        for row in new:
            if free:
                self.rows[free.pop(0)] = row
            else:
                self.rows.append(row)
        for slot in free:
            while self.rows and self.rows[-1].finish is not None:
                self.rows.pop()
            if slot >= len(self.rows):
                break
            last = self.rows.pop()
            self.cache.move(len(self.rows), slot, last.cached)
            self.rows[slot] = last
        if new:
            self.cache.fit(*self._room())

    def _room(self) -> tuple[int, int]:
        """Slots and places that are needed now; on a CPU, where room takes no memory, those that will be: then nothing
        is copied while rows grow and come."""
        live = [row for row in self.rows if row.finish is None]
        if self.cache.layers[0].keys.device.type != "cpu":
            return len(self.rows), max(max(row.cached, len(row.prompt)) for row in live)
        places = max(row.reserve for row in live)
        coming = len(self.rows) + sum(len(group.rows) - group.begun for group in self.waiting)
        most = min(coming, self.config.max_rows, self.config.max_cached_tokens // places)
        return max(len(self.rows), most), places

    def _begin(self, new: list[tuple[Group, Row]]) -> Iterator[Step]:
        """Run the prompts of new rows, once for the rows of one prompt, and choose their first tokens."""
        slots = {id(row): slot for slot, row in enumerate(self.rows)}
        firsts = {id(group): (group, row) for group, row in reversed(new) if group.prefix is None}
        fresh = list(reversed(firsts.values()))
        if fresh:
            where = [slots[id(row)] for _, row in fresh]
            sights = [group.sight for group, _ in fresh]
            logits = prefill(self.model, [group.prompt for group, _ in fresh], where, self.cache, False, sights)
            for (group, _), slot, logits_V in zip(fresh, where, logits, strict=True):
                group.logits_V = logits_V
                if len(group.rows) > 1:
                    group.prefix = self.cache.take(slot, len(group.prompt), self._apart(group))
        for group, row in new:
            row.cached = len(group.prompt)
            prefix = group.prefix
            has_it = id(group) in firsts and firsts[id(group)][1] is row and not (prefix and prefix.apart)
            if not has_it:
                assert prefix is not None
                self.cache.give(slots[id(row)], prefix)
        logits_NW = torch.stack([group.logits_V for group, _ in new if group.logits_V is not None])
        for group, _ in new:
            if group.begun == len(group.rows):
                group.prefix = group.logits_V = None
        yield from _chosen(logits_NW, [row for _, row in new], self.team)

    def _apart(self, group: Group) -> bool:
        """Whether the cache of the prompt is held once for its rows: what is not read again must be worth the calls."""
        return self.speculation is None and (len(group.rows) - 1) * len(group.prompt) >= APART


def _chosen(logits_NW: torch.Tensor, rows: Sequence[Row], team: Team) -> Iterator[Step]:
    """The next token of each row, from this rank's columns of the logits."""

    def decide(logits_NV: torch.Tensor, which: Sequence[int]) -> list[Chosen]:
        return drawn_rows(logits_NV, [rows[i] for i in which])

    greedy = [team.axis.size > 1 and row.choosing == GREEDY for row in rows]  # one rank alone never asks
    chosen = team.choose(logits_NW, greedy, decide)
    yield from [row.push(*each) for row, each in zip(rows, chosen, strict=True)]


@torch.inference_mode()
def drawn_rows(logits_NV: torch.Tensor, rows: Sequence[Row]) -> list[Chosen]:
    """What is chosen for each row; rows of one setting are drawn together."""
    by_setting: dict[SamplingConfig, list[int]] = {}
    for index, row in enumerate(rows):
        by_setting.setdefault(row.choosing, []).append(index)
    found: dict[int, Chosen] = {}
    for setting, indices in by_setting.items():
        own = logits_NV if len(indices) == len(rows) else logits_NV[indices]
        drawn = choose(own, setting, [rows[i].source for i in indices])
        for at, index in enumerate(indices):
            log_probs = None
            if drawn.log_probs is not None and drawn.model_log_probs is not None:
                log_probs = drawn.log_probs[at], drawn.model_log_probs[at]
            found[index] = drawn.tokens[at], log_probs
    return [found[index] for index in range(len(rows))]
