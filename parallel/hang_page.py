"""The page a job ends with when its ranks do not come together: who waits in which collective, where the others are.

Pure: what every rank said goes in, text comes out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from parallel.doing import Call, Doing, group_words, rank_words

RULE = "-" * 100
SHOWN = 12
"""Groups and places that are listed one by one; a job of 1,000 ranks still gives a page."""


def page(why: str, answers: Mapping[int, Doing], absent: Mapping[int, str]) -> str:
    """The whole page.

    Args:
        why: one sentence, why the job is stopped.
        answers: what each rank that could be asked is doing.
        absent: why the other ranks could not be asked.
    """
    idle = {rank: doing for rank, doing in answers.items() if not doing.calls}
    parts = [RULE, why, "", *_verdict(answers, idle, absent)]
    waits = _by_collective(answers)
    if waits:
        parts += ["", "Waiting"]
        shown = sorted(waits, key=lambda calls: (_complete(calls), calls[0][1].ranks))
        for calls in shown[:SHOWN]:
            parts += _collective(calls, answers, absent)
        if len(shown) > SHOWN:
            parts.append(f"  and {len(shown) - SHOWN} collectives more")
    return "\n".join([*parts, RULE])


def _verdict(answers: Mapping[int, Doing], idle: Mapping[int, Doing], absent: Mapping[int, str]) -> list[str]:
    """The ranks to look at first: those that are gone, then those that were in no collective."""
    lines = _grouped([(rank, [text]) for rank, text in absent.items()])
    lines += _grouped([(rank, _elsewhere(doing)) for rank, doing in idle.items()])
    if lines:
        return ["Look here first", *lines]
    if answers:
        return ["Every rank waits. They called different collectives, or the same ones in another order; see below."]
    return []


def _elsewhere(doing: Doing) -> list[str]:
    at = doing.stack[0] if doing.stack else "an unknown place"
    words = [f"in no collective, but at {at}", *(f"called from {line}" for line in doing.stack[1:])]
    if doing.last:
        words.append(f"before that: {doing.last}")
    if doing.error:
        words.append(f"its connection said: {doing.error}")
    return words


def _grouped(said: Sequence[tuple[int, list[str]]]) -> list[str]:
    """Ranks that say the same, together."""
    ranks: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for rank, words in said:
        ranks[tuple(words)].append(rank)
    lines = []
    for words, same in list(ranks.items())[:SHOWN]:
        lines.append(f"  {_ranks(same)}: {words[0]}")
        lines += [f"      {word}" for word in words[1:]]
    if len(ranks) > SHOWN:
        rest = [rank for same in list(ranks.values())[SHOWN:] for rank in same]
        lines.append(f"  and {_ranks(rest)}")
    return lines


Waits = list[tuple[int, Call]]


def _by_collective(answers: Mapping[int, Doing]) -> list[Waits]:
    """Calls that ought to be one and the same: the same group, the same number of collectives before."""
    together: dict[tuple[str, tuple[int, ...], int | None], Waits] = defaultdict(list)
    for rank, doing in sorted(answers.items()):
        for call in doing.calls:
            together[call.group, tuple(call.ranks), call.number].append((rank, call))
    return list(together.values())


def _complete(calls: Waits) -> bool:
    """Whether every rank of the group is in the same collective."""
    return not _differ(calls) and {rank for rank, _ in calls} >= set(calls[0][1].ranks)


def _differ(calls: Waits) -> bool:
    return len({call.kind for _, call in calls}) > 1 and calls[0][1].number is not None


def _collective(calls: Waits, answers: Mapping[int, Doing], absent: Mapping[int, str]) -> list[str]:
    first = calls[0][1]
    number = f", its collective no. {first.number}" if first.number is not None else ""
    title = f"  {group_words(first.group, first.ranks) or 'two ranks'}{number}"
    lines = [f"{title}: NOT THE SAME ON ALL RANKS" if _differ(calls) else f"{title}: {first.kind}"]
    same: dict[tuple[str, ...], Waits] = defaultdict(list)
    for rank, call in calls:
        stands = answers[rank].stack
        elsewhere = [f"while it is at {stands[0]}"] if stands and stands[0] not in call.where else []
        same[(f"{call.kind} {call.what}".strip(), *_from(call.where), *elsewhere, answers[rank].error)].append(
            (rank, call)
        )
    for (what, *places, error), those in list(same.items())[:SHOWN]:
        times = [call.seconds for _, call in those if call.seconds is not None]
        since = f" for {max(times):.1f} s" if times else ""
        lines.append(f"    {_ranks([rank for rank, _ in those])} waited{since} in {what}")
        lines += [f"        {place}" for place in places]
        if error:
            lines.append(f"        until its connection said: {error}")
    missing = sorted(set(first.ranks) - {rank for rank, _ in calls})
    if missing and first.number is not None:
        reasons: dict[str, list[int]] = defaultdict(list)
        for rank in missing:
            reasons[_why_not(first, answers.get(rank), absent.get(rank))].append(rank)
        lines += [f"    {_ranks(ranks)} did not come: {reason}" for reason, ranks in reasons.items()]
    return lines


def _from(where: list[str]) -> list[str]:
    return [f"called from {line}" for line in where]


def _why_not(first: Call, doing: Doing | None, absent: str | None) -> str:
    if doing is None:
        return absent or "it gave no answer"
    called = doing.called.get(group_words(first.group, first.ranks), 0)
    past = f"has called {called} of this group"
    if not doing.calls:
        return f"{past}, and is in no collective"
    return f"{past}, and waits in {doing.calls[0].title()}"


def _ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {rank_words(ranks)}"
