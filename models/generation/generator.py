"""Many prompts through one model at once: rows end on their own, and the next prompt takes the place (continuous
batching, Yu et al. 2022, Orca)."""

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import chain

import torch

from models.decoder import Decoder
from models.generation.cache import Cache
from models.generation.config import Completion, GeneratorConfig, Request, SamplingConfig, Settings, Step, told
from models.generation.constraint import Constraints
from models.generation.forward import decode, prefill
from models.generation.packing import packed_decoder
from models.generation.rows import Group, Row, made_groups
from models.generation.sampling import choose
from models.generation.search import search_rounds
from models.generation.speculative import DraftStats, Speculation, check_draft
from models.generation.team import Chosen, Team
from models.generation.text import Tokenizer

Prompts = Sequence[str | Sequence[int] | Request]
GREEDY = SamplingConfig(max_new_tokens=1)
"""`Row.choosing` where nothing is asked but the most probable token."""


class Generator:
    """Texts from a model in the dtype of its weights (or autocast's around the call).

    On tensor-parallel ranks every rank of the axis calls alike, with the same arguments, and gets the same texts.

    Args:
        model: a language model, whole or cut over tp alone; its weights are read at every call. On a CPU a packed copy
            of them lives as long as the call.
        tokenizer: for prompts and texts as strings; without it there are tokens only.
        config: how much is worked on at once.
        stop_tokens: what ends a row whose settings name none; None = the tokenizer's end of text.
        draft: a small model of the same vocabulary that runs ahead, so that `model` gives several tokens a forward
            (speculative decoding). Changes nothing of what a text is drawn from; `draft_stats` says what it was worth.
            Searches and rows for which nothing can be proposed go on without it.

    Raises:
        ValueError: impossible values in `config`, a draft that does not fit.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer | None = None,
        config: GeneratorConfig | None = None,
        stop_tokens: Sequence[int] | None = None,
        draft: Decoder | None = None,
    ) -> None:
        self.model, self.tokenizer, self.config = model, tokenizer, config or GeneratorConfig()
        if problems := told(self.config.problems()):
            raise ValueError("generator settings:\n" + "\n".join(f"  {line}" for line in problems))
        place, chunk = model.place, model.chunk
        assert place.cp.size == place.ep.size == 1 and not place.splits_rows, "tp alone may cut a model that generates"
        assert chunk.embeds and chunk.heads, "a whole model is needed"
        self.team = Team.of(model)
        if stop_tokens is None:
            end = None if tokenizer is None else tokenizer.eos_token_id
            stop_tokens = () if end is None else (end,)
        self.stop_tokens = tuple(stop_tokens)
        self._constraints = Constraints(tokenizer, model.cfg.vocab_size)
        self.draft, self.draft_stats = draft, DraftStats()
        if draft is not None:
            check_draft(model, draft)

    def generate(self, prompts: Prompts, sampling: Settings | None = None) -> list[Completion]:
        """All texts, in the order of the prompts, samples of one prompt after another.

        Args:
            prompts: texts, lists of tokens, or requests with their own settings and seeds.
            sampling: settings of the prompts that are no requests, for sampling or one of the searches; None = greedy.

        Returns:
            A completion for each sample, the best first in beam search. A prompt that cannot be run (empty, too long)
            has one with finish="error".

        Raises:
            ValueError: impossible settings, texts without a tokenizer, or tp ranks asked for different things.
        """
        groups = self._groups(prompts, sampling)
        # Rows of like lengths side by side waste least; the longest first, so that none is left alone at the end.
        self._run(deque(sorted(groups, key=lambda group: -group.reserve)))
        return [row.completion(self.tokenizer) for group in groups for row in group.rows]

    def stream_generate(self, prompts: Prompts, sampling: Settings | None = None) -> Iterator[Step]:
        """The same, token by token as they come: one step a token, rows of all prompts mixed, each in its order.

        The texts of a row's steps joined are its completion's text. Beam search has its texts at the end: then their
        tokens come. Arguments and errors as in `generate`.

        On tp ranks rank 0 may leave the stream before its end, which ends it on all.
        """
        groups = self._groups(prompts, sampling)
        if self.tokenizer is not None:
            for row in (row for group in groups for row in group.rows):
                row.follow(self.tokenizer)
        return self.team.streamed(self._rounds(deque(groups)))

    def _groups(self, prompts: Prompts, sampling: Settings | None) -> list[Group]:
        requests = [
            each if isinstance(each, Request) else _request(each, sampling or SamplingConfig(), index)
            for index, each in enumerate(prompts)
        ]
        self.team.check_alike(requests, self.config, self.stop_tokens, self.draft and self.draft.cfg)
        parts = (self.model.cfg, self.tokenizer, self.stop_tokens, self.config, self._constraints)
        return made_groups(requests, *parts)

    def _run(self, waiting: deque[Group]) -> None:
        for _ in self._steps(waiting):
            pass

    def _steps(self, waiting: deque[Group]) -> Iterator[Step]:
        return chain.from_iterable(self._rounds(waiting))

    def _rounds(self, waiting: deque[Group]) -> Iterator[Iterator[Step]]:
        """The steps of one forward after another, each of them begun when the one before has ended."""
        yield (Step(group.index, 0, None, "", "error", group.error) for group in waiting if group.error)
        drawn = deque(group for group in waiting if not group.error and group.search is None)
        searched = [group for group in waiting if not group.error and group.search is not None]
        steps = max((group.rows[0].limit for group in (*drawn, *searched)), default=0)
        speculation = None
        if self.draft is not None:
            speculation = Speculation(self.model, self.draft, self.config, self.draft_stats)
        with packed_decoder(self.model, steps), packed_decoder(self.draft or self.model, steps):
            batch = _Batch(self.model, self.config, drawn, speculation)
            while batch.waiting or batch.rows:
                yield batch.admit()
                yield batch.step()
            yield from search_rounds(self.model, self.config, self.tokenizer, searched)


def _request(prompt: str | Sequence[int], sampling: Settings, index: int) -> Request:
    return Request(prompt, sampling, sampling.seed + index if isinstance(sampling, SamplingConfig) else None)


class _Batch:
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
            logits = prefill(self.model, [group.prompt for group, _ in fresh], where, self.cache, False)
            for (group, _), slot, logits_V in zip(fresh, where, logits, strict=True):
                group.logits_V = logits_V
                if len(group.rows) > 1:
                    group.prefix = self.cache.take(slot, len(group.prompt))
        for group, row in new:
            row.cached = len(group.prompt)
            begun_alone = id(group) in firsts and firsts[id(group)][1] is row
            if not begun_alone:
                assert group.prefix is not None
                self.cache.give(slots[id(row)], group.prefix)
        logits_NW = torch.stack([group.logits_V for group, _ in new if group.logits_V is not None])
        for group, _ in new:
            if group.begun == len(group.rows):
                group.prefix = group.logits_V = None
        yield from _chosen(logits_NW, [row for _, row in new], self.team)


def _chosen(logits_NW: torch.Tensor, rows: Sequence[Row], team: Team) -> Iterator[Step]:
    """The next token of each row, from this rank's columns of the logits."""

    def decide(logits_NV: torch.Tensor, which: Sequence[int]) -> list[Chosen]:
        return _drawn(logits_NV, [rows[i] for i in which])

    chosen = team.choose(logits_NW, [row.choosing == GREEDY for row in rows], decide)
    yield from [row.push(*each) for row, each in zip(rows, chosen, strict=True)]


def _drawn(logits_NV: torch.Tensor, rows: Sequence[Row]) -> list[Chosen]:
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
