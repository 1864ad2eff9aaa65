"""What a model learns from preferences: pure functions of log-probabilities and scores, one loss a pair.

A log-probability here is the sum over the learnt tokens of a document, in nats. The *implicit reward* of an answer is
beta x (log-probability of the policy - that of the reference); losses without a reference use the policy's alone.
Legend: P pairs, N unpaired documents.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import logsigmoid

LARGEST_MEAN = -1e-7
"""Where odds are taken, mean log-probabilities are kept below 0 by this much: the odds at 0 are infinite."""


@dataclass(frozen=True)
class Pairs:
    """Log-probabilities of chosen and rejected answers, fp32 [P] each, and how many tokens each answer has."""

    chosen_P: torch.Tensor
    rejected_P: torch.Tensor
    chosen_tokens_P: torch.Tensor
    rejected_tokens_P: torch.Tensor
    reference_chosen_P: torch.Tensor | None = None
    reference_rejected_P: torch.Tensor | None = None

    @property
    def ratios(self) -> tuple[torch.Tensor, torch.Tensor]:
        """log(policy / reference) of the chosen and of the rejected answers."""
        assert self.reference_chosen_P is not None and self.reference_rejected_P is not None, "needs a reference"
        return self.chosen_P - self.reference_chosen_P, self.rejected_P - self.reference_rejected_P

    @property
    def means(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean log-probability of a token of the chosen and of the rejected answers."""
        return self.chosen_P / self.chosen_tokens_P, self.rejected_P / self.rejected_tokens_P


@dataclass(frozen=True)
class Settings:
    """What the losses are tuned by; each reads what it knows."""

    beta: float
    label_smoothing: float = 0.0
    """Share of pairs whose labels are believed to be swapped."""
    gamma: float = 0.0
    """SimPO: by how much the rewards of a pair shall differ."""


def sigmoid(pairs: Pairs, settings: Settings) -> torch.Tensor:
    """DPO: -log sigmoid(beta x difference of the log-ratios), with smoothed labels the conservative DPO.

    Sources: Rafailov et al. 2023, Direct Preference Optimization, equation 7; Mitchell 2023, A note on DPO with noisy
    preferences.
    """
    chosen_P, rejected_P = pairs.ratios
    return _smoothed(settings.beta * (chosen_P - rejected_P), settings.label_smoothing)


def robust(pairs: Pairs, settings: Settings) -> torch.Tensor:
    """DPO whose expectation under swapped labels is that of clean ones; label_smoothing, below 1/2, is their share.

    Source: Chowdhury et al. 2024, Provably Robust DPO.
    """
    chosen_P, rejected_P = pairs.ratios
    logit_P, swapped = settings.beta * (chosen_P - rejected_P), settings.label_smoothing
    return (swapped * logsigmoid(-logit_P) - (1 - swapped) * logsigmoid(logit_P)) / (1 - 2 * swapped)


def hinge(pairs: Pairs, settings: Settings) -> torch.Tensor:
    """max(0, 1 - beta x difference of the log-ratios).

    Sources: Zhao et al. 2023, SLiC-HF; Liu et al. 2023, Statistical Rejection Sampling Improves Preference
    Optimization (the ratios to a reference).
    """
    chosen_P, rejected_P = pairs.ratios
    return torch.relu(1 - settings.beta * (chosen_P - rejected_P))


def ipo(pairs: Pairs, settings: Settings) -> torch.Tensor:
    """(difference of the mean log-ratios of a token - 1 / (2 beta)) squared.

    The paper writes sums; its authors' results are of means, so that the aim does not hang on the answers' lengths.
    Source: Azar et al. 2023, A General Theoretical Paradigm to Understand Learning from Human Preferences, equation 17.
    """
    chosen_P, rejected_P = pairs.ratios
    difference_P = chosen_P / pairs.chosen_tokens_P - rejected_P / pairs.rejected_tokens_P
    return (difference_P - 1 / (2 * settings.beta)) ** 2


def sppo(pairs: Pairs, settings: Settings) -> torch.Tensor:
    """SPPO with hard labels: the log-ratios shall be 1 / (2 beta) and -1 / (2 beta).

    Source: Wu et al. 2024, Self-Play Preference Optimization, equation 4.7 with win rates 1 and 0.
    """
    chosen_P, rejected_P = pairs.ratios
    aim = 0.5 / settings.beta
    return (chosen_P - aim) ** 2 + (rejected_P + aim) ** 2


def apo_zero(pairs: Pairs, settings: Settings) -> torch.Tensor:
    """Chosen answers more, rejected ones less probable: where chosen answers are better than the model's own.

    Source: D'Oosterlinck et al. 2024, Anchored Preference Optimization, equation 7.
    """
    chosen_P, rejected_P = pairs.ratios
    return 1 - torch.sigmoid(settings.beta * chosen_P) + torch.sigmoid(settings.beta * rejected_P)


def apo_down(pairs: Pairs, settings: Settings) -> torch.Tensor:
    """Both less probable, rejected answers more so: where even chosen answers are worse than the model's own.

    Source: D'Oosterlinck et al. 2024, Anchored Preference Optimization, equation 8.
    """
    chosen_P, rejected_P = pairs.ratios
    return torch.sigmoid(settings.beta * chosen_P) + 1 - torch.sigmoid(settings.beta * (chosen_P - rejected_P))


def orpo(pairs: Pairs, settings: Settings) -> torch.Tensor:
    """The odds-ratio term of ORPO, -beta log sigmoid(log(odds of chosen / odds of rejected)), of mean probabilities.

    ORPO is this and the loss of next-token training on the chosen answers (`negative_log_likelihood`).
    Source: Hong et al. 2024, ORPO, equations 6 and 7.
    """
    chosen_P, rejected_P = (mean_P.clamp(max=LARGEST_MEAN) for mean_P in pairs.means)
    log_odds_P = (chosen_P - rejected_P) - (_log1mexp(chosen_P) - _log1mexp(rejected_P))
    return -settings.beta * logsigmoid(log_odds_P)


def simpo(pairs: Pairs, settings: Settings) -> torch.Tensor:
    """-log sigmoid(beta x difference of the mean log-probabilities of a token - gamma).

    Source: Meng et al. 2024, SimPO, equation 6.
    """
    chosen_P, rejected_P = pairs.means
    return _smoothed(settings.beta * (chosen_P - rejected_P) - settings.gamma, settings.label_smoothing)


def cpo(pairs: Pairs, settings: Settings) -> torch.Tensor:
    """DPO with a uniform reference; goes with the behaviour-cloning term (`negative_log_likelihood`).

    Source: Xu et al. 2024, Contrastive Preference Optimization, equation 3.
    """
    return _smoothed(settings.beta * (pairs.chosen_P - pairs.rejected_P), settings.label_smoothing)


def negative_log_likelihood(pairs: Pairs) -> torch.Tensor:
    """Next-token loss of the chosen answers, summed over their tokens [P].

    Divided by all chosen tokens of the global batch it is the term that CPO and ORPO are defined with, and that was
    found to help DPO: Pang et al. 2024, Iterative Reasoning Preference Optimization, equation 1 (RPO).
    """
    return -pairs.chosen_P


def implicit_rewards(pairs: Pairs, loss: str, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The rewards that a loss gives chosen and rejected answers, detached fp32 [P] each."""
    kind = PAIR_LOSSES[loss]
    chosen_P, rejected_P = pairs.chosen_P, pairs.rejected_P
    if kind.needs_reference:
        chosen_P, rejected_P = pairs.ratios
    elif kind.of_means:
        chosen_P, rejected_P = pairs.means
    return beta * chosen_P.detach(), beta * rejected_P.detach()


def kto(
    ratio_N: torch.Tensor,
    desirable_N: torch.Tensor,
    baseline: torch.Tensor | float,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> torch.Tensor:
    """Loss of each unpaired answer: its reward shall be above the baseline if it is desirable, else below.

    Args:
        ratio_N: log(policy / reference) of the answer.
        desirable_N: bool.
        baseline: see `kl_baseline`; takes no gradient.

    Source: Ethayarajh et al. 2024, KTO, equation 7.
    """
    above_N = beta * (ratio_N - baseline)
    return torch.where(
        desirable_N, desirable_weight * torch.sigmoid(-above_N), undesirable_weight * torch.sigmoid(above_N)
    )


def kl_baseline(ratio_sum: float, count: float) -> float:
    """KTO's reference point in nats: the mean of log(policy / reference) over answers to other prompts, at least 0.

    The sums are over the global batch, so that the loss of an answer does not hang on what else its rank has.
    Source: Ethayarajh et al. 2024, KTO, section 4.1.
    """
    return max(0.0, ratio_sum / count)


def bradley_terry(
    chosen_P: torch.Tensor,
    rejected_P: torch.Tensor,
    margin_P: torch.Tensor | float = 0.0,
    label_smoothing: float = 0.0,
    centring: float = 0.0,
) -> torch.Tensor:
    """Loss of a reward model on each pair: -log sigmoid(score of chosen - score of rejected - margin) + centring term.

    Args:
        margin_P: by how much the scores of a pair shall differ.
        centring: weight of (chosen + rejected) squared, which keeps the scores around 0; nothing else fixes their zero.

    Sources: Ouyang et al. 2022, InstructGPT, equation 1; Touvron et al. 2023, Llama 2, equation 2 (margin); Eisenstein
    et al. 2023, Helping or Herding?, equation 2 (centring).
    """
    loss_P = _smoothed(chosen_P - rejected_P - margin_P, label_smoothing)
    return loss_P + centring * (chosen_P + rejected_P) ** 2 if centring else loss_P


def _smoothed(logit_P: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    """Cross-entropy of sigmoid(logit) with the label 1, which is wrong in a share `label_smoothing` of all cases."""
    if not label_smoothing:
        return -logsigmoid(logit_P)
    return -(1 - label_smoothing) * logsigmoid(logit_P) - label_smoothing * logsigmoid(-logit_P)


def _log1mexp(x_P: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(x)) for x < 0, exact at both ends."""
    return torch.where(x_P > -math.log(2), (-torch.expm1(x_P)).log(), torch.log1p(-x_P.exp()))


@dataclass(frozen=True)
class PairLoss:
    """A loss of pairs and what it is made of."""

    function: Callable[[Pairs, Settings], torch.Tensor]
    needs_reference: bool = True
    of_means: bool = False
    """Its rewards are mean log-probabilities of a token."""
    smooths: bool = False
    """It reads label_smoothing."""
    sft_weight: float = 0.0
    """Weight of the next-token loss of chosen answers in the loss as published."""


PAIR_LOSSES = {
    "sigmoid": PairLoss(sigmoid, smooths=True),
    "ipo": PairLoss(ipo),
    "hinge": PairLoss(hinge),
    "robust": PairLoss(robust, smooths=True),
    "sppo": PairLoss(sppo),
    "apo_zero": PairLoss(apo_zero),
    "apo_down": PairLoss(apo_down),
    "orpo": PairLoss(orpo, needs_reference=False, of_means=True, sft_weight=1.0),
    "simpo": PairLoss(simpo, needs_reference=False, of_means=True, smooths=True),
    "cpo": PairLoss(cpo, needs_reference=False, smooths=True, sft_weight=1.0),
}
