"""Searches of many prompts through one model at once. A search has some rows of the cache and says at every token how
they go on; its rows share most of what they hold, and only what differs is copied between them."""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from models.decoder import Decoder
from models.generation.beam import BeamSearch
from models.generation.cache import Cache
from models.generation.config import GeneratorConfig, Step
from models.generation.contrastive import ContrastiveSearch
from models.generation.forward import logits_of, normed_states, prompt_states, step_states
from models.generation.rows import Group
from models.generation.search_config import BeamConfig
from models.generation.text import Tokenizer


class Search(Protocol):
    """The search for the texts of one prompt."""

    def advance(self, logits_BV: torch.Tensor, states_ND: torch.Tensor) -> tuple[list[tuple[int, int]], list[Step]]:
        """Choose the next tokens.

        Args:
            logits_BV: fp32, after each of its rows; at first one row, after the prompt.
            states_ND: normed hidden states of the tokens that were run: at first the prompt's, then one of each row.

        Returns:
            Its next rows, each as the place of a row among those now and the token it goes on with (none: the search
            has ended); and the tokens of its texts as far as they are decided.
        """
        ...


def search_rounds(
    model: Decoder, config: GeneratorConfig, tokenizer: Tokenizer | None, groups: Sequence[Group]
) -> Iterator[Iterator[Step]]:
    """Search texts for prompts that can be run and give their tokens, those of each text in order, round by round."""
    batch = _Batch(model, config, tokenizer, deque(groups))
    while batch.waiting or batch.live:
        yield batch.admit()
        yield batch.step()


class _Live:
    """A search and its places in the cache, as many all the time as it may ever have rows."""

    def __init__(self, group: Group, search: Search, slots: list[int]) -> None:
        self.group, self.search, self.slots = group, search, slots
        self.rows = [0]
        """For each row of the search the number of its slot in `slots`."""
        self.tokens = [0] * len(slots)
        """The last token of each slot, not in the cache yet. What idle slots get is never looked at."""
        self.cached = 0
        self.alike = [[0] * len(slots) for _ in slots]
        """How many tokens two slots have in common from the first on; perhaps they have more."""

    def advance(self, logits_BV: torch.Tensor, states_ND: torch.Tensor, cache: Cache) -> list[Step]:
        """Let the search choose, and make the rows that it wants.

        A row's first child stays in its slot, others take slots of which no child comes: nothing is overwritten that
        is still to be copied.
        """
        children, steps = self.search.advance(logits_BV, states_ND)
        staying = {self.rows[parent] for parent, _ in children}
        spare = [slot for slot in range(len(self.slots)) if slot not in staying]
        rows: list[int] = []
        for parent, token in children:
            slot = source = self.rows[parent]
            if source in staying:
                staying.remove(source)
            else:
                slot = spare.pop(0)
                self._copy(source, slot, cache)
            self.tokens[slot] = token
            rows.append(slot)
        self.rows = rows
        return steps

    def _copy(self, source: int, target: int, cache: Cache) -> None:
        cache.move(self.slots[source], self.slots[target], self.cached, self.alike[source][target])
        for slot in range(len(self.slots)):
            same = self.cached if slot == source else self.alike[source][slot]
            self.alike[target][slot] = self.alike[slot][target] = same


class _Batch:
    """The live searches and their cache, of which they fill the first slots."""

    def __init__(
        self, model: Decoder, config: GeneratorConfig, tokenizer: Tokenizer | None, waiting: deque[Group]
    ) -> None:
        self.model, self.config, self.tokenizer, self.waiting = model, config, tokenizer, waiting
        self.live: list[_Live] = []
        self.cache = Cache(model, config.max_cached_tokens)

    def admit(self) -> Iterator[Step]:
        """Begin the next searches, in the slots of ended ones and then the next ones."""
        new = self._next()
        if not new:
            return
        count = self._close_gaps()
        prompts = [each.group.prompt for each in new]
        self.cache.fit(count, max(max(each.cached, len(each.group.prompt)) for each in self.live))
        slots, sights = [each.slots[0] for each in new], [each.group.sight for each in new]
        hidden, ends_N = prompt_states(self.model, prompts, slots, self.cache, sights)
        logits_NV = logits_of(self.model, normed_states(self.model, hidden[ends_N]))
        parts = hidden.split([len(prompt) for prompt in prompts])
        for index, (each, own) in enumerate(zip(new, parts, strict=True)):
            each.cached = len(own)
            states = normed_states(self.model, own)
            yield from each.advance(logits_NV[index : index + 1], states, self.cache)
        self._drop_ended()

    def step(self) -> Iterator[Step]:
        """One more token for every row of every search."""
        if not self.live:
            return
        self.cache.fit(self._close_gaps(), max(each.cached for each in self.live) + 1)
        rows = {slot: (each, i) for each in self.live for i, slot in enumerate(each.slots)}
        ordered = [rows[slot] for slot in range(len(rows))]
        tokens, lengths = [each.tokens[i] for each, i in ordered], [each.cached for each, _ in ordered]
        states_BD = normed_states(self.model, step_states(self.model, tokens, lengths, self.cache))
        logits_BV = logits_of(self.model, states_BD)
        for each in self.live:
            each.cached += 1
            own = [each.slots[row] for row in each.rows]
            yield from each.advance(logits_BV[own], states_BD[own], self.cache)
        self._drop_ended()

    def _next(self) -> list[_Live]:
        """Searches whose turn it is, as far as rows, cache and the prompts' tokens of one forward allow."""
        used = {slot for each in self.live for slot in each.slots}
        longest = max((each.group.reserve for each in self.live), default=0)
        new: list[_Live] = []
        tokens = 0
        while self.waiting:
            group = self.waiting[0]
            assert group.search is not None
            count, longest = len(used) + group.search.width, max(longest, group.reserve)
            tokens += len(group.prompt)
            if count > self.config.max_rows or count * longest > self.config.max_cached_tokens:
                break
            if new and tokens > self.config.prefill_tokens:
                break
            slots = [slot for slot in range(count) if slot not in used][: group.search.width]
            used.update(slots)
            new.append(_Live(self.waiting.popleft(), self._search(group), slots))
        self.live += new
        return new

    def _search(self, group: Group) -> Search:
        if isinstance(group.search, BeamConfig):
            return BeamSearch(group.search, group.rows, self.tokenizer)
        assert group.search is not None
        return ContrastiveSearch(group.search, group.rows[0])

    def _close_gaps(self) -> int:
        """Move what lies behind gaps that ended searches left, and give the number of slots in use."""
        count = sum(len(each.slots) for each in self.live)
        used = {slot for each in self.live for slot in each.slots}
        free = [slot for slot in range(count) if slot not in used]
        for each in self.live:
            for i, slot in enumerate(each.slots):
                if slot >= count:
                    each.slots[i] = free.pop(0)
                    self.cache.move(slot, each.slots[i], each.cached)
        return count

    def _drop_ended(self) -> None:
        self.live = [each for each in self.live if each.rows]
