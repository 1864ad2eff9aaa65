"""One text after another, each prompt beginning like the one before with its text: only what is new is run."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import takewhile

import torch

from models.generation.batch import drawn_rows
from models.generation.cache import Cache
from models.generation.config import Request, Step
from models.generation.extend import commit, extend
from models.generation.forward import decode, prefill
from models.generation.generator import Generator
from models.generation.packing import FEWEST_STEPS, packed_decoder
from models.generation.rows import Row
from models.generation.sight import Sight

BLOCK = 128
"""New tokens of a forward: their scores against all others are in memory at one time, and their logits."""
TIMES = 3
"""What a token behind a long cache costs beside one of a prompt that is run whole (measured: 2.3 to 4 times)."""


class Dialogue:
    """The turns of one conversation. What was run stays in the cache; any prompt may follow, also a shorter one.

    Args:
        generator: whole in one process; its draft is not used. On a CPU a packed copy of its weights is made when
            it is likely to pay, after the first tokens, and lives until `close`.
    """

    def __init__(self, generator: Generator) -> None:
        assert generator.model.place.tp.size == 1, "a dialogue has one process"
        self.generator, self.model = generator, generator.model
        self.cache = Cache(self.model, self.model.cfg.max_seq_len)
        self._tokens: list[int] = []
        """What the cache holds."""
        self._sight: Sight | None = None
        """What those tokens show."""
        self._packed: ExitStack | None = None
        self._steps_made = 0

    def stream(self, request: Request) -> Iterator[Step]:
        """The steps of one text, as `Generator.stream_generate` gives them. May be left before its end.

        Raises:
            ValueError: impossible settings, or those of a search, or of several samples.
        """
        (group,) = self.generator.groups([request])
        if group.search is not None or len(group.rows) > 1:
            raise ValueError("a dialogue has one text a turn, token by token: no search, samples=1")
        if group.error:
            return iter((Step(0, 0, None, "", "error", group.error),))
        (row,) = group.rows
        if self.generator.tokenizer is not None:
            row.follow(self.generator.tokenizer)
        return self._steps(row, group.sight)

    def close(self) -> None:
        """Give the packed weights back."""
        if self._packed is not None:
            self._packed.close()
            self._packed = None

    def _steps(self, row: Row, sight: Sight | None) -> Iterator[Step]:
        logits_1V = self._begun(row.prompt, sight)
        yield row.push(*drawn_rows(logits_1V, [row])[0])
        while row.finish is None:
            self.cache.fit(1, len(self._tokens) + 1)
            logits_1V = decode(self.model, row.tokens[-1:], [len(self._tokens)], self.cache)
            self._tokens.append(row.tokens[-1])
            self._steps_made += 1
            if self._steps_made == FEWEST_STEPS:
                self._pack()
            yield row.push(*drawn_rows(logits_1V, [row])[0])

    def _begun(self, prompt: Sequence[int], sight: Sight | None) -> torch.Tensor:
        """Run what the cache has not of a prompt: the logits after it [1, V]."""
        known = self._reusable(prompt)
        known = known if self._same_sight(sight, known) else 0
        held, self._tokens = self._tokens[:known], []  # nothing, should this be interrupted
        self.cache.fit(1, len(prompt))
        if not known:
            logits_NV = prefill(self.model, [prompt], [0], self.cache, True, [sight])
        else:
            logits_NV = torch.empty(0)
            for start in range(known, len(prompt), BLOCK):
                block = prompt[start : start + BLOCK]
                logits_NV, tail = extend(self.model, [block], [start], self.cache)
                commit(self.cache, tail, [len(block)])
        self._tokens, self._sight = [*held, *prompt[known:]], sight
        return logits_NV[-1:]

    def _same_sight(self, sight: Sight | None, known: int) -> bool:
        """Whether all pictures of a prompt stand in its first tokens and the cache has seen them there."""
        if sight is None or self._sight is None:
            return sight is self._sight
        return sight.shows(self._sight) and bool((sight.pictures.slots_F < known).all())

    def _reusable(self, prompt: Sequence[int]) -> int:
        """How many of the first tokens need not be run again; never all, for there must be logits."""
        pairs = zip(self._tokens, prompt[:-1], strict=False)
        known = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        windows = [layer.window for layer in self.cache.layers if layer.window is not None]
        ahead = self.cache.ahead
        if known < len(self._tokens) and windows and ahead + len(self._tokens) > min(windows):
            return 0  # what a window forgot for the tokens that are dropped now is gone
        if (len(prompt) - known) * TIMES > len(prompt):
            return 0
        rope, moe = self.model.rope, self.model.cfg.moe
        if rope.rope.scaling == "dynamic" and ahead + max(len(prompt), len(self._tokens)) > rope.trained_len:
            return 0  # the tokens of a prompt are all turned by its whole length
        if moe is not None and moe.capacity is not None:
            return 0  # which tokens an expert has no room for depends on the whole prompt
        return known

    def _pack(self) -> None:
        """Costs as much as it saves in `FEWEST_STEPS` steps: after as many, at worst twice the time is lost."""
        self._packed = ExitStack()
        self._packed.enter_context(packed_decoder(self.model, self.model.cfg.max_seq_len))
