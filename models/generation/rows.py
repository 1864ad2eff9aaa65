"""A row from its prompt to its end, and the rows of one prompt together."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from models.config import ModelConfig
from models.generation.cache import Prefix
from models.generation.config import (
    CONSTRAINTS,
    Completion,
    Finish,
    GeneratorConfig,
    Request,
    SamplingConfig,
    Settings,
    Step,
    told,
)
from models.generation.constraint import Constraints, Guide
from models.generation.sampling import Source
from models.generation.search_config import BeamConfig, ContrastiveConfig
from models.generation.sight import Sight
from models.generation.text import TextStream, Tokenizer, decoded


class Row:
    """One text that grows."""

    def __init__(self, index: int, sample: int, prompt: Sequence[int], request: Request, limit: int) -> None:
        self.index, self.sample, self.prompt, self.sampling = index, sample, prompt, _drawing(request.sampling)
        bound = any(getattr(self.sampling, key) is not None for key in CONSTRAINTS)
        guided = dict.fromkeys(CONSTRAINTS) | {"allowed_tokens": () if bound else None}
        plain = replace(self.sampling, **guided)
        self.choosing = replace(plain, seed=0, samples=1, max_new_tokens=1, stop_tokens=None, stop=())
        """The settings that decide how a token is chosen; of a constraint only that there is a guide."""
        self.limit = limit
        """Most new tokens: what was asked for, or what the context has room for."""
        self.cached = 0
        """Tokens in the cache: all but the last."""
        self.tokens: list[int] = []
        self.finish: Finish | None = None
        self.error = ""
        self.score: float | None = None
        self.stop_tokens: tuple[int, ...] = ()
        self._text: TextStream | None = None
        self._log_probs: list[tuple[float, float]] = []
        seed = self.sampling.seed if request.seed is None else request.seed
        self.source = Source(seed, sample, prompt, self.tokens)

    @property
    def reserve(self) -> int:
        """Places in the cache it may come to need."""
        return len(self.prompt) + self.limit

    def guided(self, guide: Guide) -> None:
        """Let only those tokens come that the guide allows."""
        self.source = replace(self.source, guide=guide)

    def follow(self, tokenizer: Tokenizer) -> None:
        """Make its text while it grows, for streams and stop strings."""
        if self._text is None:
            self._text = TextStream(tokenizer, self.sampling.stop)

    def push(self, token: int, log_probs: tuple[float, float] | None) -> Step:
        """Take the next token."""
        self.tokens.append(token)
        if log_probs is not None:
            self._log_probs.append(log_probs)
        if token in self.stop_tokens:
            self.finish = "stop"
        elif self.source.guide is not None:
            self.finish, self.error = self.source.guide.take(token)
        if self.finish is None and len(self.tokens) == self.limit:
            self.finish = "length"
        text = ""
        if self._text is not None:
            if token not in self.stop_tokens:
                self._text.push(token)
            if self.finish is not None:
                self._text.finish()
            if self._text.stopped:
                self.finish = "stop"
            text = self._text.new(self.finish is not None)
        sampled, model = log_probs or (None, None)
        return Step(self.index, self.sample, token, text, self.finish, self.error, sampled, model)

    def completion(self, tokenizer: Tokenizer | None) -> Completion:
        """What became of it."""
        assert self.finish is not None
        text = None
        if self._text is not None:
            text = self._text.text
        elif tokenizer is not None:
            ended = bool(self.tokens) and self.tokens[-1] in self.stop_tokens
            text = decoded(tokenizer, self.tokens[:-1] if ended else self.tokens)
        log_probs = model = None
        if self.sampling.log_probs and self.finish != "error":
            log_probs, model = (tuple(part) for part in zip(*self._log_probs, strict=True))
        made = (tuple(self.prompt), tuple(self.tokens), text, self.finish, self.error)
        return Completion(self.index, self.sample, *made, log_probs, model, self.score)


@dataclass
class Group:
    """The rows of one prompt. Those that begin later take its cache from `prefix`."""

    index: int
    prompt: Sequence[int]
    rows: list[Row]
    error: str = ""
    begun: int = 0
    prefix: Prefix | None = None
    logits_V: torch.Tensor | None = field(default=None, repr=False)
    search: BeamConfig | ContrastiveConfig | None = None
    """How its tokens are searched for; None = they are drawn."""
    sight: Sight | None = None

    @property
    def reserve(self) -> int:
        """Places in the cache one of its rows may come to need."""
        return self.rows[0].reserve


def made_groups(
    requests: Sequence[Request],
    cfg: ModelConfig,
    tokenizer: Tokenizer | None,
    stop_tokens: tuple[int, ...],
    config: GeneratorConfig,
    constraints: Constraints,
) -> list[Group]:
    """The rows of every request; one that cannot be run has a single row that has ended, with the reason.

    Raises:
        ValueError: settings that cannot be, or text without a tokenizer.
    """
    settings = {request.sampling for request in requests}
    _check(settings, requests, tokenizer, config.max_rows, cfg.vocab_size)
    begins, lines = constraints.all_of(settings, stop_tokens)
    _refuse(lines)
    groups = []
    for index, request in enumerate(requests):
        prompt = request.prompt
        if isinstance(prompt, str):
            assert tokenizer is not None
            prompt = tokenizer.encode(prompt)
        prompt = [int(token) for token in prompt]
        sampling = request.sampling
        limit = min(sampling.max_new_tokens, cfg.max_seq_len - len(prompt))
        search = None if isinstance(sampling, SamplingConfig) else sampling
        error = _error(prompt, limit, cfg, config.max_cached_tokens, search.width if search else 1)
        if not error and request.sight is not None:
            error = request.sight.problem(len(prompt), cfg)
        rows = [Row(index, sample, prompt, request, limit) for sample in range(1 if error else sampling.samples)]
        for row in rows:
            row.stop_tokens = stop_tokens if sampling.stop_tokens is None else sampling.stop_tokens
            if sampling.stop and tokenizer is not None:
                row.follow(tokenizer)
            if error:
                row.finish, row.error = "error", error
            elif begin := begins[sampling]:
                row.guided(begin())
        groups.append(Group(index, prompt, rows, error, search=search, sight=request.sight))
    return groups


def _drawing(settings: Settings) -> SamplingConfig:
    """What a row knows of its settings; of a search it only follows what that found."""
    if isinstance(settings, SamplingConfig):
        return settings
    ends = {"stop_tokens": settings.stop_tokens, "stop": settings.stop, "log_probs": settings.log_probs}
    return SamplingConfig(settings.max_new_tokens, samples=settings.samples, **ends)


def _error(prompt: Sequence[int], limit: int, cfg: ModelConfig, max_cached_tokens: int, width: int) -> str:
    """Why a prompt cannot be run; empty if it can."""
    if not prompt:
        return "the prompt is empty; give at least one token"
    if limit < 1:
        return f"the prompt has {len(prompt)} tokens and the model's context is {cfg.max_seq_len}; shorten it"
    if not 0 <= min(prompt) <= max(prompt) < cfg.vocab_size:
        bad = next(token for token in prompt if not 0 <= token < cfg.vocab_size)
        known = f"0 to {cfg.vocab_size - 1}"
        return f"the prompt has token {bad} and the model knows {known}; is the tokenizer another model's?"
    if width * (len(prompt) + limit) > max_cached_tokens:
        times = f" {width} times" if width > 1 else ""
        return (
            f"{len(prompt)} tokens of prompt and up to {limit} new ones do not fit{times} max_cached_tokens="
            f"{max_cached_tokens}; raise it, or shorten the prompt or max_new_tokens"
        )
    return ""


def _check(
    settings: set[Settings], requests: Sequence[Request], tokenizer: Tokenizer | None, max_rows: int, vocab: int
) -> None:
    lines = sorted({line for setting in settings for line in told(setting.problems())})
    searches = {(each.width_key, each.width) for each in settings if not isinstance(each, SamplingConfig)}
    for key, width in sorted(searches):
        if width > max_rows:
            lines.append(f"{key}={width}: takes more rows than max_rows={max_rows}; raise that, or take fewer")
        if width > vocab:
            lines.append(f"{key}={width}: the model knows {vocab} tokens; take fewer")
    if tokenizer is None and any(isinstance(request.prompt, str) for request in requests):
        lines.append("prompts are text and there is no tokenizer; give one, or prompts as lists of tokens")
    if tokenizer is None and any(setting.stop for setting in settings):
        lines.append("stop strings need a tokenizer; give one, or stop_tokens instead of stop")
    _refuse(lines)


def _refuse(lines: Sequence[str]) -> None:
    if lines:
        raise ValueError("generation cannot start:\n" + "\n".join(f"  {line}" for line in lines))
