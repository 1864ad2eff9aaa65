"""Speculative decoding: a small draft proposes tokens, the model judges them all in one forward.

Sources: Leviathan et al. 2023; Chen et al. 2023. With p the distribution a row's token is drawn from (penalties,
temperature and filters done) and q the draft's under the same settings, a proposal x is accepted with probability
min(1, p(x) / q(x)); the first that is not is replaced by a draw from max(p - q, 0), normalised. A text then has exactly
the distribution it has without a draft. A greedy row accepts what is its own choice too, so its text is the same.

All chances come from a row's seed, its sample's number, the token's place and what is decided there: whatever the batch
is, a row's text is the same.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, takewhile

import torch

from models.decoder import Decoder
from models.generation.cache import Cache
from models.generation.config import GeneratorConfig, SamplingConfig, Step
from models.generation.drafting import Drafter, Proposal, agreed
from models.generation.extend import commit, extend
from models.generation.rows import Row
from models.generation.sampling import Source, drawn, log_prob_of, shaped, uniform_of
from models.generation.team import Team


@dataclass
class DraftStats:
    """What a draft was worth, summed over all rows."""

    forwards: int = 0
    """Forwards of the model, counted once for each row in them; those over prompts are left out."""
    proposed: int = 0
    accepted: int = 0
    tokens: int = 0
    """What these forwards gave: accepted proposals and one token more each, up to a row's end."""

    @property
    def acceptance_rate(self) -> float:
        """The share of proposals that became text."""
        return self.accepted / max(self.proposed, 1)

    @property
    def tokens_per_forward(self) -> float:
        """New tokens a row and forward of the model; 1 without a draft, at most `draft_tokens` + 1."""
        return self.tokens / max(self.forwards, 1)


def check_draft(model: Decoder, draft: Decoder) -> None:
    """Whether the two fit.

    Raises:
        ValueError: the draft has another vocabulary or none, or lies on another device.
    """
    if draft.cfg.head != "lm":
        raise ValueError(f"the draft has head={draft.cfg.head!r}, which gives no tokens; give a language model")
    ours, theirs = model.cfg.vocab_size, draft.cfg.vocab_size
    if ours != theirs:
        raise ValueError(
            f"the draft's vocabulary has {theirs} tokens and the model's {ours}; a draft must have the model's "
            "tokenizer: take a smaller model of the same family"
        )
    where, there = (next(m.parameters()).device for m in (model, draft))
    if where != there:
        raise ValueError(f"the draft lies on {there} and the model on {where}; move the draft: draft.to('{where}')")


class Speculation:
    """Turns of a batch with a draft: each row gets one token or more."""

    def __init__(self, model: Decoder, draft: Decoder, config: GeneratorConfig, stats: DraftStats) -> None:
        self.model, self.stats, self.team = model, stats, Team.of(model)
        self.drafter = Drafter(draft, config, self.team)

    def turn(self, rows: Sequence[Row], cache: Cache) -> list[Step]:
        """One forward of the model over the last token and the proposals of each row; all rows are alive."""
        proposals = self.drafter.propose(rows)
        chunks = [[row.tokens[-1], *own.tokens] for row, own in zip(rows, proposals, strict=True)]
        logits, tail = extend(self.model, chunks, [row.cached for row in rows], cache)
        steps: list[Step] = []
        taken: list[int] = []
        for row, chosen in zip(rows, agreed(self.team, lambda: judged(logits, rows, proposals)), strict=True):
            new = list(_pushed(row, chosen))
            steps += new
            taken.append(len(new))
            self.stats.accepted += min(len(new), len(chosen) - 1)
        cache.fit(len(rows), max(row.cached + n for row, n in zip(rows, taken, strict=True)))
        commit(cache, tail, taken)
        for row, count in zip(rows, taken, strict=True):
            row.cached += count
        self.drafter.keep()
        self.stats.forwards += len(rows)
        self.stats.tokens += len(steps)
        self.stats.proposed += sum(len(own.tokens) for own in proposals)
        return steps


@dataclass(frozen=True)
class Choice:
    """A token that is text, and its log-probabilities where they were asked for."""

    token: int
    log_probs: tuple[float, float] | None


def _pushed(row: Row, chosen: Sequence[Choice]) -> Iterator[Step]:
    """Steps up to the row's end: a stop may stand in the middle of what was accepted."""
    for each in chosen:
        yield row.push(each.token, each.log_probs)
        if row.finish is not None:
            return


def judged(logits_TV: torch.Tensor, rows: Sequence[Row], proposals: Sequence[Proposal]) -> list[list[Choice]]:
    """For each row the proposals that are accepted, and one token more.

    Args:
        logits_TV: the model's, row by row: before the first proposal, and after each.
    """
    starts = [0, *accumulate(len(own.tokens) + 1 for own in proposals)]
    by_setting: dict[SamplingConfig, list[int]] = {}
    for index, row in enumerate(rows):
        by_setting.setdefault(row.choosing, []).append(index)
    found: list[list[Choice]] = [[] for _ in rows]
    for cfg, indices in by_setting.items():
        places = [place for i in indices for place in range(starts[i], starts[i + 1])]
        own = logits_TV if len(places) == logits_TV.shape[0] else logits_TV[places]
        some, ahead = [rows[i] for i in indices], [proposals[i] for i in indices]
        for i, choices in zip(indices, _judged_alike(own, cfg, some, ahead), strict=True):
            found[i] = choices
    return found


def _judged_alike(
    logits_MV: torch.Tensor, cfg: SamplingConfig, rows: Sequence[Row], proposals: Sequence[Proposal]
) -> list[list[Choice]]:
    """The same for rows of one setting."""
    sources = [
        replace(row.source, tokens=[*row.tokens, *own.tokens[:place]])
        for row, own in zip(rows, proposals, strict=True)
        for place in range(len(own.tokens) + 1)
    ]
    starts = [0, *accumulate(len(own.tokens) + 1 for own in proposals)][:-1]
    own_MV = shaped(logits_MV, cfg, sources)
    judge = _same if cfg.temperature == 0 else _by_chance
    accepted, last = judge(own_MV, starts, sources, proposals)
    texts = [[*own.tokens[:count], token] for own, count, token in zip(proposals, accepted, last, strict=True)]
    if not cfg.log_probs:
        return [[Choice(token, None) for token in text] for text in texts]
    places = [start + i for start, text in zip(starts, texts, strict=True) for i in range(len(text))]
    tokens = torch.tensor([token for text in texts for token in text], device=own_MV.device)
    model = log_prob_of(logits_MV[places], tokens).tolist()
    sampled = [0.0] * len(places) if cfg.temperature == 0 else log_prob_of(own_MV[places], tokens).tolist()
    pairs = iter(zip(sampled, model, strict=True))
    return [[Choice(token, next(pairs)) for token in text] for text in texts]


def _same(
    logits_MV: torch.Tensor, starts: Sequence[int], sources: Sequence[Source], proposals: Sequence[Proposal]
) -> tuple[list[int], list[int]]:
    """How many proposals of each row are the most probable tokens, and the most probable one after them."""
    best = logits_MV.argmax(-1).tolist()
    accepted = [
        _run(token == best[start + i] for i, token in enumerate(own.tokens))
        for start, own in zip(starts, proposals, strict=True)
    ]
    return accepted, [best[start + count] for start, count in zip(starts, accepted, strict=True)]


def _by_chance(
    logits_MV: torch.Tensor, starts: Sequence[int], sources: Sequence[Source], proposals: Sequence[Proposal]
) -> tuple[list[int], list[int]]:
    """How many proposals of each row are accepted, and the token after them: instead of one, or free."""
    probs_MV = logits_MV.softmax(-1)
    placed = [
        (start + i, token) for start, own in zip(starts, proposals, strict=True) for i, token in enumerate(own.tokens)
    ]
    place_P, token_P = torch.tensor(placed, dtype=torch.int64, device=probs_MV.device).reshape(-1, 2).t()
    ours = iter(probs_MV[place_P, token_P].tolist())
    accepted = []
    for start, own in zip(starts, proposals, strict=True):
        before = sources[start : start + len(own.tokens)]
        chances = [uniform_of(each.seed, each.sample, len(each.tokens), "accept") for each in before]
        # A list, so that each row takes its own part of `ours`.
        accepted.append(_run([u * q < next(ours) for u, q in zip(chances, own.own, strict=True)]))
    places = [start + count for start, count in zip(starts, accepted, strict=True)]
    left = probs_MV[places]
    refused = [i for i, own in enumerate(proposals) if accepted[i] < len(own.tokens)]
    if refused:
        theirs = torch.stack([proposals[i].probs[accepted[i]] for i in refused])
        rest = (left[refused] - theirs).clamp_min_(0)
        # Nothing is left where the two are one but for rounding.
        left[refused] = torch.where(rest.sum(-1, keepdim=True) > 0, rest, left[refused])
    kinds = ["instead" if accepted[i] < len(own.tokens) else "" for i, own in enumerate(proposals)]
    return accepted, drawn(left, [sources[place] for place in places], kinds).tolist()


def _run(good: Iterable[bool]) -> int:
    """How many are true before the first that is not."""
    return sum(1 for _ in takewhile(bool, good))
