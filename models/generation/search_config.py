"""How tokens are searched for instead of drawn: beam search and contrastive search."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from models.config import Problem

EarlyStopping = Literal["full", "heuristic", "exact"]
"""When the search for a prompt's texts ends, once `num_beams` of them have ended:

"full": at once (`early_stopping=True` in transformers);
"heuristic": when the best beam, scored at the length it has, is no better than the worst of them (`False`);
"exact": when the best beam can be no better at any length that is left (`"never"`).
"""


@dataclass(frozen=True)
class BeamConfig:
    """Beam search: the `num_beams` most probable beginnings are continued side by side.

    A text that has ended scores (sum of its log-probabilities) / (number of its tokens) ** `length_penalty`.

    With `beam_groups` the beams are dealt out to groups that choose one after another at every token; a token that
    earlier groups go on with there costs a later one `diversity_penalty` for each of their beams that does (diverse
    beam search, Vijayakumar et al. 2016, Hamming diversity). Penalties count in a group's own choices, not in the
    scores that are given.
    """

    title: ClassVar = "beam search"
    width_key: ClassVar = "num_beams"
    num_beams: int = 4
    max_new_tokens: int = 128
    length_penalty: float = 1.0
    """Above 0 favours long texts, below 0 short ones; 0 = the plain sum."""
    early_stopping: EarlyStopping = "heuristic"
    beam_groups: int = 1
    diversity_penalty: float = 0.0
    """nats; 0 = none."""
    samples: int = 1
    """Texts for each prompt: the best ones, the best first."""
    stop_tokens: tuple[int, ...] | None = None
    """End a text and are its last token; None = those of the generator (the tokenizer's end of text)."""
    stop: tuple[str, ...] = ()
    """End a text wherever they come in it; the text goes up to there, the tokens include it."""
    log_probs: bool = False
    """Give each token's log-probability under the model."""

    @property
    def width(self) -> int:
        """Rows of the cache a prompt takes."""
        return self.num_beams

    def problems(self) -> list[Problem]:
        """Every value that cannot be, as (key, value, reason, way out)."""
        beams, groups, found = self.num_beams, self.beam_groups, _common_problems(self)

        def need(good: bool, key: str, reason: str, way: str) -> None:
            if not good:
                found.append((key, getattr(self, key), reason, way))

        names = get_args(EarlyStopping)
        need(beams >= 1, "num_beams", "must be at least 1", "num_beams=4")
        need(abs(self.length_penalty) <= 20, "length_penalty", "is no exponent of use", "length_penalty=1")
        need(self.early_stopping in names, "early_stopping", "is none of the ways to end", f"one of {', '.join(names)}")
        need(groups >= 1, "beam_groups", "must be at least 1", "beam_groups=1 for plain beam search")
        if beams >= 1 and groups >= 1:
            need(beams % groups == 0, "beam_groups", f"must divide num_beams={beams}", f"beam_groups={beams}, or 1")
        penalty = self.diversity_penalty
        need(0 <= penalty < 1e4, "diversity_penalty", "must not be below 0", "diversity_penalty=0.5")
        if groups > 1:
            need(penalty != 0, "diversity_penalty", "makes all groups find the same", "0.5, or beam_groups=1")
        else:
            need(penalty == 0, "diversity_penalty", "has no effect on one group", f"beam_groups={max(beams, 1)}, or 0")
        need(self.samples >= 1, "samples", "must be at least 1", "samples=1")
        if beams >= 1:
            need(self.samples <= beams, "samples", f"are more than num_beams={beams}", f"num_beams={self.samples}")
        return found


@dataclass(frozen=True)
class ContrastiveConfig:
    """Contrastive search (Su et al. 2022): of the `top_k` most probable tokens the one with the largest

    (1 - a) x its probability - a x the largest cosine between its hidden state and that of a token before it,

    where a is the `degeneration_penalty` and hidden states are the last layer's after the final norm.
    """

    title: ClassVar = "contrastive search"
    width_key: ClassVar = "top_k"
    top_k: int = 4
    degeneration_penalty: float = 0.6
    """The paper's alpha, 0 to 1; 0 takes the most probable token."""
    max_new_tokens: int = 128
    stop_tokens: tuple[int, ...] | None = None
    """As in `BeamConfig`."""
    stop: tuple[str, ...] = ()
    """As in `BeamConfig`."""
    log_probs: bool = False
    """Give each token's log-probability under the model."""

    @property
    def width(self) -> int:
        """Rows of the cache a prompt takes."""
        return self.top_k

    @property
    def samples(self) -> int:
        """Texts for each prompt: there is only one."""
        return 1

    def problems(self) -> list[Problem]:
        """Every value that cannot be, as (key, value, reason, way out)."""
        found = _common_problems(self)
        if self.top_k < 1:
            found.append(("top_k", self.top_k, "must be at least 1", "top_k=4"))
        if not 0 <= self.degeneration_penalty <= 1:
            reason = "is a share between 0 and 1"
            found.append(("degeneration_penalty", self.degeneration_penalty, reason, "degeneration_penalty=0.6"))
        return found


def search_kind(keys: Collection[str]) -> type[BeamConfig] | type[ContrastiveConfig] | None:
    """The kind of search that settings ask for by the keys only it has; None = tokens are drawn.

    Raises:
        ValueError: they ask for both.
    """
    beams = [key for key in keys if key in _BEAM_KEYS]
    contrastive = [key for key in keys if key in _CONTRASTIVE_KEYS]
    if beams and contrastive:
        raise ValueError(
            f"sampling settings:\n  {contrastive[0]} asks for contrastive search and {beams[0]} for beam search; "
            "leave one of them out"
        )
    return BeamConfig if beams else ContrastiveConfig if contrastive else None


_BEAM_KEYS = ("num_beams", "length_penalty", "early_stopping", "beam_groups", "diversity_penalty")
_CONTRASTIVE_KEYS = ("degeneration_penalty",)


def _common_problems(cfg: BeamConfig | ContrastiveConfig) -> list[Problem]:
    found: list[Problem] = []
    if cfg.max_new_tokens < 1:
        found.append(("max_new_tokens", cfg.max_new_tokens, "must be at least 1", "max_new_tokens=128"))
    if not all(cfg.stop):
        found.append(("stop", cfg.stop, "holds an empty string, which would end every text at once", "stop=()"))
    if any(token < 0 for token in cfg.stop_tokens or ()):
        found.append(("stop_tokens", cfg.stop_tokens, "holds a number that is no token", "stop_tokens=()"))
    return found
