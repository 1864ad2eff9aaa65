"""From logits to tokens. Rows of one setting are worked on together; what a row draws depends on itself alone.

A row's uniform number comes from its own seed and place, and one inverse of the cumulated probabilities turns it into
a token: no generator's state is shared, so the batch does not matter.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from models.generation.config import SamplingConfig
from models.generation.constraint import Guide, permitted

_FEW = (64, 1024)
"""Most probable tokens among which top-p looks first: sorting a whole vocabulary costs 50 times as much."""
_BLOCK = 256
"""Probabilities that are summed first when one is drawn: cumulating all of them is slow, and in fp32 inexact."""


@dataclass(frozen=True)
class Source:
    """What a row's next token is made from, beside the logits."""

    seed: int
    sample: int
    prompt: Sequence[int]
    tokens: Sequence[int]
    guide: Guide | None = None
    """What its text may be."""


@dataclass(frozen=True)
class Drawn:
    """The next token of each row; log-probabilities where they were asked for."""

    tokens: list[int]
    log_probs: list[float] | None
    model_log_probs: list[float] | None


def choose(logits_NV: torch.Tensor, cfg: SamplingConfig, rows: Sequence[Source]) -> Drawn:
    """The next token of rows that have one setting, from their fp32 logits."""
    own_NV = shaped(logits_NV, cfg, rows)
    if cfg.temperature == 0:
        tokens_N = own_NV.argmax(-1)
        log_probs = torch.zeros(len(rows)) if cfg.log_probs else None
    else:
        probs_NV = own_NV.softmax(-1)
        tokens_N = drawn(probs_NV, rows)
        log_probs = probs_NV.gather(1, tokens_N[:, None]).squeeze(1).log() if cfg.log_probs else None
    model = log_probs
    if cfg.log_probs and (own_NV is not logits_NV or cfg.temperature == 0):
        model = log_prob_of(logits_NV, tokens_N)
    return Drawn(
        tokens_N.tolist(),
        None if log_probs is None else log_probs.tolist(),
        None if model is None else model.tolist(),
    )


def shaped(logits_NV: torch.Tensor, cfg: SamplingConfig, rows: Sequence[Source]) -> torch.Tensor:
    """The logits of the distribution that tokens are drawn from, or of which a greedy row takes the highest."""
    own_NV = permitted(penalised(logits_NV, cfg, rows), [row.guide for row in rows])
    return own_NV if cfg.temperature == 0 else filtered(own_NV, cfg)


def drawn(probs_NV: torch.Tensor, rows: Sequence[Source], kinds: Sequence[str] | None = None) -> torch.Tensor:
    """A token for each row by its own chance, int64 [N]; `kinds` as in `uniform_of`."""
    places = [(row.seed, row.sample, len(row.tokens)) for row in rows]
    uniform = [uniform_of(*place, kind) for place, kind in zip(places, kinds or [""] * len(rows), strict=True)]
    return draw(probs_NV, torch.tensor(uniform, dtype=torch.float64, device=probs_NV.device))


def penalised(logits_NV: torch.Tensor, cfg: SamplingConfig, rows: Sequence[Source]) -> torch.Tensor:
    """The logits after the penalties on what a row has already; the given ones stay as they are."""
    if cfg.repetition_penalty == 1 and cfg.frequency_penalty == 0:
        return logits_NV
    out = logits_NV.clone()
    for logits_V, row in zip(out, rows, strict=True):
        if cfg.repetition_penalty != 1:
            seen = torch.tensor(sorted({*row.prompt, *row.tokens}), device=out.device)
            values = logits_V[seen]
            logits_V[seen] = torch.where(values > 0, values / cfg.repetition_penalty, values * cfg.repetition_penalty)
        if cfg.frequency_penalty != 0 and row.tokens:
            own, times = torch.tensor(row.tokens, device=out.device).unique(return_counts=True)
            logits_V[own] -= cfg.frequency_penalty * times
    return out


def filtered(logits_NV: torch.Tensor, cfg: SamplingConfig) -> torch.Tensor:
    """The logits over the temperature, -inf where top-k, top-p or min-p leave a token out; always one is left.

    Where nothing changes, the given tensor itself.
    """
    out = logits_NV if cfg.temperature == 1 else logits_NV / cfg.temperature
    if 0 < cfg.top_k < out.shape[1]:
        out = out.masked_fill(out < out.topk(cfg.top_k).values[:, -1:], float("-inf"))
    if cfg.top_p < 1:
        out = _top_p(out, cfg.top_p)
    if cfg.min_p > 0:
        least = out.max(-1, keepdim=True).values + torch.tensor(cfg.min_p).log()
        out = out.masked_fill(out < least, float("-inf"))
    return out


def _top_p(logits_NV: torch.Tensor, top_p: float) -> torch.Tensor:
    probs_NV, vocab = logits_NV.softmax(-1), logits_NV.shape[1]
    out = torch.full_like(logits_NV, float("-inf"))
    row_N1 = torch.arange(out.shape[0], device=out.device)[:, None]
    for few in (*(few for few in _FEW if few < vocab), vocab):
        top = probs_NV.topk(few)
        mass = top.values.double().cumsum(-1)
        kept = mass - top.values < top_p  # what came before does not suffice
        values = logits_NV[row_N1, top.indices].masked_fill(~kept, float("-inf"))
        out[row_N1, top.indices] = values
        open_N = mass[:, -1] < top_p
        if few == vocab or not bool(open_N.any()):
            break
        probs_NV, row_N1 = probs_NV[open_N], row_N1[open_N]
    return out


def uniform_of(seed: int, sample: int, place: int, kind: str = "") -> float:
    """A number in [0, 1) from a row's seed, its sample's number, the token's place in its text and what it decides
    there, if that is not the token itself."""
    digest = hashlib.blake2b(f"{seed}:{sample}:{place}{kind}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53


def draw(probs_NV: torch.Tensor, uniform_N: torch.Tensor) -> torch.Tensor:
    """The token at which the cumulated probabilities pass `uniform_N` (fp64, in [0, 1)) times their sum, int64 [N].

    Sums are fp64. A token of probability zero is never drawn: only where the sum rises it can pass anything.
    """
    count, vocab = probs_NV.shape
    blocks = torch.nn.functional.pad(probs_NV, (0, -vocab % _BLOCK)).unflatten(1, (-1, _BLOCK))
    sums = blocks.sum(-1, dtype=torch.float64)
    block, rest = _passed(sums, uniform_N * sums.sum(-1))
    inside, _ = _passed(blocks[torch.arange(count, device=block.device), block].double(), rest)
    return block * _BLOCK + inside


def _passed(parts_NM: torch.Tensor, target_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first part at which the running sum is above the target, and the target less what came before."""
    sums = parts_NM.cumsum(-1)
    below_all = torch.nextafter(sums[:, -1], torch.zeros_like(target_N))  # rounding may have passed the whole sum
    target = torch.minimum(target_N, below_all)[:, None]
    at = torch.searchsorted(sums, target, right=True)
    before = torch.where(at > 0, sums.gather(1, (at - 1).clamp_min(0)), 0.0)
    return at.squeeze(1), (target - before).squeeze(1)


def log_prob_of(logits_NV: torch.Tensor, tokens_N: torch.Tensor) -> torch.Tensor:
    """Log-probability of each row's token, in nats [N]."""
    return logits_NV.gather(1, tokens_N[:, None]).squeeze(1) - logits_NV.logsumexp(-1)
