"""What is asked of a generator and what it gives back."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from models.config import Problem
from models.generation.search_config import BeamConfig, ContrastiveConfig, EarlyStopping, search_kind
from models.generation.sight import Sight

Finish = Literal["stop", "length", "error"]
"""A stop token or string came, or nothing may follow; `max_new_tokens` or the model's context is used up; the row could
not be run, or no token that the model has can follow."""


CONSTRAINTS = ("allowed", "regex", "allowed_tokens")
"""Settings that say what a text may be."""


@dataclass(frozen=True)
class SamplingConfig:
    """How the tokens of a row are chosen and when it ends. The filters work in the order in which they stand here.

    Sources: min-p: Nguyen et al. 2024; top-p: Holtzman et al. 2019; repetition penalty: Keskar et al. 2019 (CTRL).
    """

    max_new_tokens: int = 128
    repetition_penalty: float = 1.0
    """Logits of tokens that prompt or text already have are divided (positive) or multiplied (negative) by it."""
    frequency_penalty: float = 0.0
    """Taken from a token's logit once for each time the text has it; the prompt does not count."""
    temperature: float = 0.0
    """0 takes the most probable token (greedy)."""
    top_k: int = 0
    """Only the k most probable tokens; 0 = all."""
    top_p: float = 1.0
    """Only the fewest tokens that together have this probability."""
    min_p: float = 0.0
    """Only tokens with at least this share of the most probable token's probability."""
    seed: int = 0
    """Of rows without a seed of their own: prompt i of a list draws with seed + i."""
    samples: int = 1
    """Texts for each prompt; the prompt is run once for those that begin together."""
    stop_tokens: tuple[int, ...] | None = None
    """End the row and are its last token; None = those of the generator (the tokenizer's end of text)."""
    stop: tuple[str, ...] = ()
    """End the row wherever they come in its text; the text goes up to there, the tokens include it."""
    log_probs: bool = False
    """Give each token's log-probability, under the distribution it was drawn from and under the model's own."""
    allowed: tuple[str, ...] | None = None
    """The text is one of these, written in the tokenizer's own tokens. What may not come has no chance before the
    filters; the row ends where nothing more can come. `stop_tokens` end it only where the text is whole."""
    regex: str | None = None
    """The whole text matches this regular expression, in whatever tokens; the rest as for `allowed`."""
    allowed_tokens: tuple[int, ...] | None = None
    """Only these tokens may come, and of `stop_tokens` only those among them."""

    def problems(self) -> list[Problem]:
        """Every value that cannot be, as (key, value, reason, way out)."""
        found: list[Problem] = []

        def need(good: bool, key: str, reason: str, way: str) -> None:
            if not good:
                found.append((key, getattr(self, key), reason, way))

        need(self.max_new_tokens >= 1, "max_new_tokens", "must be at least 1", "max_new_tokens=128")
        need(self.repetition_penalty > 0, "repetition_penalty", "must be above 0", "repetition_penalty=1 for none")
        need(abs(self.frequency_penalty) < 1e4, "frequency_penalty", "is no number of use", "frequency_penalty=0")
        need(
            0 <= self.temperature < 1e4, "temperature", "must not be below 0", "temperature=0 for greedy, 1 as trained"
        )
        need(self.top_k >= 0, "top_k", "counts tokens", "top_k=0 for all")
        need(0 < self.top_p <= 1, "top_p", "is a probability above 0", "top_p=1 for all tokens")
        need(0 <= self.min_p <= 1, "min_p", "is a share between 0 and 1", "min_p=0 for all tokens")
        need(self.samples >= 1, "samples", "must be at least 1", "samples=1")
        need(all(self.stop), "stop", "holds an empty string, which would end every row at once", "stop=()")
        tokens = self.stop_tokens or ()
        need(all(t >= 0 for t in tokens), "stop_tokens", "holds a number that is no token", "stop_tokens=()")
        found += self._constraint_problems()
        for key, unused in (("top_k", 0), ("top_p", 1.0), ("min_p", 0.0)):
            if self.temperature == 0:
                greedy = "has no effect at temperature=0 (greedy)"
                need(getattr(self, key) == unused, key, greedy, f"temperature=1, or {key}={unused:g}")
        return found

    def _constraint_problems(self) -> list[Problem]:
        asked = [(key, getattr(self, key)) for key in CONSTRAINTS if getattr(self, key) is not None]
        found: list[Problem] = []
        for key, value in asked:
            if not value or (key == "allowed" and not all(value)):
                found.append((key, value, "holds nothing, or an empty text", f"{key}=None for no constraint"))
        if any(token < 0 for token in self.allowed_tokens or ()):
            reason = "holds a number that is no token"
            found.append(("allowed_tokens", self.allowed_tokens, reason, "allowed_tokens=None for all tokens"))
        for key, value in asked[1:]:
            found.append((key, value, f"does not go together with {asked[0][0]}", "give one of the two"))
        if self.stop and (self.allowed, self.regex) != (None, None):
            found.append(("stop", self.stop, f"would cut short what {asked[0][0]} asks for", "stop=()"))
        return found


Settings = SamplingConfig | BeamConfig | ContrastiveConfig
"""How the texts of a prompt are made."""


def sampling_config(given: Mapping[str, Any]) -> Settings:
    """The settings of a mapping (a row of a file, a command line), checked.

    Keys that only a search has (`num_beams`, `degeneration_penalty`, ...) make it that search's.

    Raises:
        ValueError: unknown keys, values of another type, impossible values; all of them in one message.
    """
    search = search_kind(given)
    kind, where = search or SamplingConfig, f" in {search.title}" if search else ""
    names = [each.name for each in fields(kind)]
    bad = [f"{key}: there is no such setting{where}; there are {', '.join(names)}" for key in given if key not in names]
    values: dict[str, Any] = {}
    for key in (key for key in given if key in names):
        values[key], wanted = _typed(key, given[key])
        if wanted:
            bad.append(f"{key}={given[key]!r}: give {wanted}")
    if not bad:
        made = kind(**values)
        bad = told(made.problems())
        if not bad:
            return made
    raise ValueError("sampling settings:\n" + "\n".join(f"  {line}" for line in bad))


def _typed(key: str, value: Any) -> tuple[Any, str]:
    """The value as the field has it, and what should have been given where it does not fit (else nothing)."""
    if key == "log_probs":
        return value, "" if isinstance(value, bool) else "true or false"
    if key == "early_stopping":
        names = get_args(EarlyStopping)
        return value, "" if value in names else f"one of {', '.join(names)}"
    if key in ("stop", "stop_tokens", *CONSTRAINTS):
        if value is None and key != "stop":
            return None, ""
        if key == "regex":
            return value, "" if isinstance(value, str) else "a string"
        inner, wanted = (int, "a list of token ids") if key.endswith("tokens") else (str, "a list of strings")
        if isinstance(value, (list, tuple)) and all(type(each) is inner for each in value):
            return tuple(value), ""
        return value, wanted
    if key in ("max_new_tokens", "top_k", "seed", "samples", "num_beams", "beam_groups"):
        return value, "" if type(value) is int else "a whole number"
    return (float(value), "") if type(value) in (int, float) else (value, "a number")


def told(problems: Sequence[Problem]) -> list[str]:
    """A line for each problem."""
    return [f"{key}={value!r}: {reason}; {way}" for key, value, reason, way in problems]


@dataclass(frozen=True)
class GeneratorConfig:
    """How much is worked on at once; changes speed and memory, never what a row is drawn from."""

    max_rows: int = 64
    """Rows that are decoded together."""
    max_cached_tokens: int = 32768
    """Places for tokens in the cache. A row is let in when its prompt and all its new tokens will have room."""
    prefill_tokens: int = 2048
    """Tokens of prompts that are run together; a longer prompt runs alone."""
    draft_tokens: int = 4
    """With a draft model: how many tokens it proposes a turn."""

    def problems(self) -> list[Problem]:
        """Every value that cannot be, as (key, value, reason, way out)."""
        return [
            (each.name, getattr(self, each.name), "must be at least 1", f"{each.name}={each.default}")
            for each in fields(self)
            if getattr(self, each.name) < 1
        ]


@dataclass(frozen=True)
class Request:
    """One prompt, as text or tokens, with its own settings."""

    prompt: str | Sequence[int]
    sampling: Settings = field(default_factory=SamplingConfig)
    seed: int | None = None
    """A row's draws depend on this, the sample's number and the token's place; None = `sampling.seed`."""
    sight: Sight | None = None
    """What the prompt shows; it is given as tokens then, those that stand for features in their places."""


@dataclass(frozen=True)
class Step:
    """One new token of a row, or its end without one (`token` is None: the row could not be run)."""

    prompt: int
    """Number of the prompt in the list."""
    sample: int
    token: int | None
    text: str
    """What the token adds to the text. Held back while it may be the begin of a stop string or half a character."""
    finish: Finish | None = None
    error: str = ""
    log_prob: float | None = None
    model_log_prob: float | None = None


@dataclass(frozen=True)
class Completion:
    """One text for one prompt."""

    prompt: int
    sample: int
    prompt_tokens: tuple[int, ...]
    tokens: tuple[int, ...]
    """With the stop token, if one came."""
    text: str | None
    """Without stop token and stop string; None without a tokenizer."""
    finish: Finish
    error: str = ""
    log_probs: tuple[float, ...] | None = None
    """nats, under the distribution each token was drawn from; 0 for greedy."""
    model_log_probs: tuple[float, ...] | None = None
    """nats, under the model's own distribution (no penalty, temperature 1, all tokens)."""
    score: float | None = None
    """Of beam search: the sum of the model's log-probabilities over (number of tokens) ** length_penalty."""
