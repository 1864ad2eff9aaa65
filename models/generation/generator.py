"""Many prompts through one model at once: rows end on their own, and the next prompt takes the place (continuous
batching, Yu et al. 2022, Orca)."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain

from models.decoder import Decoder
from models.generation.batch import Batch
from models.generation.config import Completion, GeneratorConfig, Request, SamplingConfig, Settings, Step, told
from models.generation.constraint import Constraints
from models.generation.packing import packed_decoder
from models.generation.rows import Group, made_groups
from models.generation.search import search_rounds
from models.generation.speculative import DraftStats, Speculation, check_draft
from models.generation.team import Team
from models.generation.text import Tokenizer

Prompts = Sequence[str | Sequence[int] | Request]


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
        groups = self.groups(prompts, sampling)
        # Rows of like lengths side by side waste least; the longest first, so that none is left alone at the end.
        for _ in self.steps(sorted(groups, key=lambda group: -group.reserve)):
            pass
        return [row.completion(self.tokenizer) for group in groups for row in group.rows]

    def stream_generate(self, prompts: Prompts, sampling: Settings | None = None) -> Iterator[Step]:
        """The same, token by token as they come: one step a token, rows of all prompts mixed, each in its order.

        The texts of a row's steps joined are its completion's text. Beam search has its texts at the end: then their
        tokens come. Arguments and errors as in `generate`.

        On tp ranks rank 0 may leave the stream before its end, which ends it on all.
        """
        groups = self.groups(prompts, sampling)
        if self.tokenizer is not None:
            for row in (row for group in groups for row in group.rows):
                row.follow(self.tokenizer)
        return self.team.streamed(self._rounds(groups))

    def groups(self, prompts: Prompts, sampling: Settings | None = None) -> list[Group]:
        """The rows of every prompt, for whoever runs them. Arguments and errors as of `generate`."""
        requests = [
            each if isinstance(each, Request) else _request(each, sampling or SamplingConfig(), index)
            for index, each in enumerate(prompts)
        ]
        self.team.check_alike(requests, self.config, self.stop_tokens, self.draft and self.draft.cfg)
        ahead = 0 if self.model.virtual is None else self.model.virtual.ahead
        cfg = replace(self.model.cfg, max_seq_len=self.model.cfg.max_seq_len - ahead) if ahead else self.model.cfg
        parts = (cfg, self.tokenizer, self.stop_tokens, self.config, self._constraints)
        return made_groups(requests, *parts)

    def steps(self, waiting: Sequence[Group]) -> Iterator[Step]:
        """Run such rows to their ends."""
        return chain.from_iterable(self._rounds(waiting))

    def _rounds(self, waiting: Sequence[Group]) -> Iterator[Iterator[Step]]:
        """The steps of one forward after another, each of them begun when the one before has ended."""
        yield (Step(group.index, 0, None, "", "error", group.error) for group in waiting if group.error)
        drawn = deque(group for group in waiting if not group.error and group.search is None)
        searched = [group for group in waiting if not group.error and group.search is not None]
        steps = max((group.rows[0].limit for group in (*drawn, *searched)), default=0)
        speculation = None
        if self.draft is not None:
            speculation = Speculation(self.model, self.draft, self.config, self.draft_stats)
        with packed_decoder(self.model, steps), packed_decoder(self.draft or self.model, steps):
            batch = Batch(self.model, self.config, drawn, speculation)
            while batch.waiting or batch.rows:
                yield batch.admit()
                yield batch.step()
            yield from search_rounds(self.model, self.config, self.tokenizer, searched)


def _request(prompt: str | Sequence[int], sampling: Settings, index: int) -> Request:
    return Request(prompt, sampling, sampling.seed + index if isinstance(sampling, SamplingConfig) else None)
