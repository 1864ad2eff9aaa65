"""Contrastive search over the text of one prompt: probable tokens that say something new. Source: Su et al. 2022.

Each of the candidates is run to see its hidden state. The one that is taken has its logits and cache then already; the
others' places in the cache differ from its own in that one token.
"""

import torch
from torch.nn import functional as F

from models.generation.config import Step
from models.generation.rows import Row
from models.generation.search_config import ContrastiveConfig


class ContrastiveSearch:
    """The search for one prompt's text, which `row` takes token by token."""

    def __init__(self, cfg: ContrastiveConfig, row: Row) -> None:
        self.cfg, self.row = cfg, row
        self._before_TD = torch.empty(0)
        """Hidden states of prompt and text, of length one; those after `_count` hold nothing yet."""
        self._count = 0
        self._tokens: list[int] = []
        """The candidates, and under which log-probabilities."""
        self._log_probs = torch.empty(0)

    def advance(self, logits_BV: torch.Tensor, states_ND: torch.Tensor) -> tuple[list[tuple[int, int]], list[Step]]:
        """See `search.Search`."""
        states_ND, chosen, steps = F.normalize(states_ND.float(), dim=-1), 0, []
        if self._tokens:
            likeness_B = (states_ND @ self._before_TD[: self._count].t()).max(-1).values
            penalty = self.cfg.degeneration_penalty
            chosen = int(((1 - penalty) * self._log_probs.exp() - penalty * likeness_B).argmax())
            log_probs = (0.0, float(self._log_probs[chosen])) if self.cfg.log_probs else None
            steps = [self.row.push(self._tokens[chosen], log_probs)]
            states_ND = states_ND[chosen : chosen + 1]
        else:
            self._before_TD = states_ND.new_empty(self.row.reserve, states_ND.shape[1])
        if self.row.finish is not None:
            return [], steps
        self._before_TD[self._count : self._count + len(states_ND)] = states_ND
        self._count += len(states_ND)
        top = logits_BV[chosen].topk(self.cfg.top_k)
        self._log_probs = top.values - logits_BV[chosen].logsumexp(-1)
        self._tokens = top.indices.tolist()
        return [(chosen, token) for token in self._tokens], steps
