"""Requests that come while others are worked on."""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from models.generation.batch import Batch
from models.generation.config import Completion, Request, Step
from models.generation.generator import Generator
from models.generation.packing import packed_decoder
from models.generation.rows import Group
from models.generation.speculative import Speculation

Take = Callable[[int, bool], list[Request] | None]
"""(rows there is room for, whether nothing else is to be done) -> requests of about so many rows; an empty list if
there are none just now; None when no more will come. Asked between two steps; on tp ranks, on all alike."""


def serve(generator: Generator, take: Take) -> Iterator[Completion]:
    """Texts as they end. A request begins as soon as there is room for it: no place waits for the end of a list.

    Searches that are taken together run together, and by themselves.

    Yields:
        Completions, whose `prompt` is the number of the request in the order in which they were taken. A request that
        cannot be run, whatever the reason, has one with finish="error".
    """
    model, draft = generator.model, generator.draft
    speculation = None
    if draft is not None:
        speculation = Speculation(model, draft, generator.config, generator.draft_stats)
    steps = model.cfg.max_seq_len
    with packed_decoder(model, steps), packed_decoder(draft or model, steps):
        batch = Batch(model, generator.config, deque(), speculation)
        yield from _served(generator, batch, take)


def _served(generator: Generator, batch: Batch, take: Take) -> Iterator[Completion]:
    live: dict[int, _Live] = {}
    count, more = 0, True
    while more or live:
        room = generator.config.max_rows - sum(each.left for each in live.values())
        taken = take(room, not live) if more and room > 0 else []
        more = taken is not None
        searches: dict[int, _Live] = {}
        for request in taken or ():
            group = _group(generator, request, count)
            count += 1
            if isinstance(group, Completion):
                yield group
            elif group.search is not None:
                searches[group.index] = _Live(group, len(group.rows))
            else:
                live[group.index] = _Live(group, len(group.rows))
                batch.waiting.append(group)
        if searches:
            found = [each.group for each in searches.values()]
            yield from _ended(generator, searches, generator.steps(found))
        yield from _ended(generator, live, batch.admit())
        yield from _ended(generator, live, batch.step())


@dataclass
class _Live:
    """A request that is worked on, and how many of its rows have not ended."""

    group: Group
    left: int


def _group(generator: Generator, request: Request, number: int) -> Group | Completion:
    """The rows of a request, or the reason why there are none."""
    try:
        (group,) = generator.groups([request])
    except ValueError as error:
        prompt = () if isinstance(request.prompt, str) else tuple(request.prompt)
        return Completion(number, 0, prompt, (), None, "error", " ".join(f"{error}".split()))
    group.index = number
    for row in group.rows:
        row.index = number
    return group.rows[0].completion(generator.tokenizer) if group.error else group


def _ended(generator: Generator, live: dict[int, _Live], steps: Iterator[Step]) -> Iterator[Completion]:
    """The texts that end with these steps."""
    for step in steps:
        if step.finish is None:
            continue
        each = live[step.prompt]
        each.left -= 1
        if not each.left:
            del live[step.prompt]
        yield each.group.rows[step.sample].completion(generator.tokenizer)
