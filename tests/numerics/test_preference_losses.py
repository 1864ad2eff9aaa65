"""Losses of preferences: TRL's own trainers on the same model and batch, and values worked by hand.

Both sides run the same tiny model; losses and gradients are compared in fp32.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForSequenceClassification

from tests.trl_reference import PAIRS, TakesMargin, bare, dpo_trainer, kto_trainer, padded_pairs, scoring_models, seeded
from trainer.losses import preference
from trainer.losses.preference import PAIR_LOSSES, Pairs, Settings

TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def batch() -> dict[str, torch.Tensor]:
    return padded_pairs()


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    return scoring_models()


def log_probs(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Summed log-probability of each answer [2P], from the plain logits."""
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits[:, :-1]
    picked = logits.log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
    return (picked * batch["completion_mask"][:, 1:]).sum(1)


def pairs_of(models: tuple[Any, Any], batch: dict[str, torch.Tensor]) -> Pairs:
    """What our losses start from."""
    with torch.no_grad():
        reference = log_probs(models[1], batch).chunk(2)
    counts = batch["completion_mask"].sum(1).chunk(2)
    return Pairs(*log_probs(models[0], batch).chunk(2), *counts, *reference)


def gradient(model: nn.Module, loss: torch.Tensor) -> torch.Tensor:
    """All gradients of a loss as one vector."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()), allow_unused=False)])


def same(model: nn.Module, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """The same loss, and the same gradient in every weight."""
    assert float((ours - theirs).detach().abs()) <= TOLERANCE * max(1.0, float(theirs.detach().abs()))
    a, b = gradient(model, ours), gradient(model, theirs)
    assert float((a - b).abs().max()) <= 1e-5 * float(b.abs().max())


@pytest.mark.parametrize(
    ("ours", "theirs", "eps"),
    [
        ("sigmoid", "sigmoid", 0.0),
        ("ipo", "ipo", 0.0),
        ("hinge", "hinge", 0.0),
        ("robust", "robust", 0.2),
        ("sppo", "sppo_hard", 0.0),
        ("apo_zero", "apo_zero", 0.0),
        ("apo_down", "apo_down", 0.0),
    ],
)
@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_losses_with_a_reference(
    models: Any, batch: dict[str, torch.Tensor], ours: str, theirs: str, eps: float, beta: float
) -> None:
    trainer = dpo_trainer(models, [theirs], [1.0], beta, eps)
    expected = trainer._compute_loss(models[0], dict(batch), False)
    pairs = pairs_of(models, batch)
    same(models[0], PAIR_LOSSES[ours].function(pairs, Settings(beta, eps)).mean(), expected)
    chosen, rejected = preference.implicit_rewards(pairs, ours, beta)
    seen = trainer._metrics["eval"]
    assert chosen.mean().item() == pytest.approx(seen["rewards/chosen"][0], abs=1e-5)
    assert (chosen - rejected).mean().item() == pytest.approx(seen["rewards/margins"][0], abs=1e-5)
    assert (chosen > rejected).float().mean().item() == pytest.approx(seen["rewards/accuracies"][0])


def test_sft_term_beside_dpo(models: Any, batch: dict[str, torch.Tensor]) -> None:
    """RPO: TRL's loss types sigmoid and sft with weights 1 and 0.3; sums of tokens over the batch's tokens."""
    expected = dpo_trainer(models, ["sigmoid", "sft"], [1.0, 0.3], 0.1, 0.0)._compute_loss(
        models[0], dict(batch), False
    )
    pairs = pairs_of(models, batch)
    nll = preference.negative_log_likelihood(pairs).sum() / pairs.chosen_tokens_P.sum()
    same(models[0], preference.sigmoid(pairs, Settings(0.1)).mean() + 0.3 * nll, expected)


def test_label_smoothing_of_dpo(models: Any, batch: dict[str, torch.Tensor]) -> None:
    """TRL's aot loss of one pair (it sorts pairs of a batch) is the conservative DPO."""
    trainer = dpo_trainer(models, ["aot"], [1.0], 0.1, 0.15)
    losses = [
        trainer._compute_loss(models[0], {k: x[[i, i + PAIRS]] for k, x in batch.items()}, False) for i in range(PAIRS)
    ]
    ours = preference.sigmoid(pairs_of(models, batch), Settings(0.1, 0.15)).mean()
    same(models[0], ours, torch.stack(losses).mean())


def in_their_words(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The batch as TRL's older trainers have it."""
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    parts = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}
    return {
        f"{side}_{name}": x
        for name, whole in parts.items()
        for side, x in zip(("chosen", "rejected"), whole.chunk(2), strict=True)
    }


@pytest.mark.parametrize(
    ("ours", "theirs", "alpha", "eps", "gamma"),
    [
        ("cpo", "sigmoid", 1.0, 0.0, 0.0),
        ("cpo", "sigmoid", 0.4, 0.1, 0.0),
        ("simpo", "simpo", 0.0, 0.0, 0.5),
        ("simpo", "simpo", 0.3, 0.2, 1.0),
    ],
)
def test_losses_without_a_reference(
    models: Any, batch: dict[str, torch.Tensor], ours: str, theirs: str, alpha: float, eps: float, gamma: float
) -> None:
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    beta = 0.6
    trainer = bare(
        CPOTrainer,
        beta=beta,
        loss_type=theirs,
        cpo_alpha=alpha,
        alpha=0.0,
        label_smoothing=eps,
        simpo_gamma=gamma,
        pad_token_id=0,
    )
    expected, seen = trainer.get_batch_loss_metrics(models[0], in_their_words(batch))
    pairs = pairs_of(models, batch)
    nll = preference.negative_log_likelihood(pairs).sum() / pairs.chosen_tokens_P.sum()
    loss = PAIR_LOSSES[ours].function(pairs, Settings(beta, eps, gamma)).mean() + alpha * nll
    same(models[0], loss, expected)
    chosen, rejected = preference.implicit_rewards(pairs, ours, beta)
    assert chosen.mean().item() == pytest.approx(seen["rewards/chosen"], abs=1e-5)
    assert (chosen - rejected).mean().item() == pytest.approx(seen["rewards/margins"], abs=1e-5)


def test_orpo(models: Any, batch: dict[str, torch.Tensor]) -> None:
    """TRL's next-token term of ORPO covers the prompt too; ours, as the paper's, the answer: prompts of one token."""
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    short = batch | {"completion_mask": batch["attention_mask"].clone()}
    short["completion_mask"][:, 0] = 0
    trainer = bare(ORPOTrainer, beta=0.3, padding_value=0)
    expected, seen = trainer.get_batch_loss_metrics(models[0], in_their_words(short))
    pairs = pairs_of(models, short)
    nll = preference.negative_log_likelihood(pairs).sum() / pairs.chosen_tokens_P.sum()
    same(models[0], preference.orpo(pairs, Settings(0.3)).mean() + nll, expected)
    chosen, _ = preference.implicit_rewards(pairs, "orpo", 0.3)
    assert chosen.mean().item() == pytest.approx(seen["rewards/chosen"], abs=1e-5)


@pytest.mark.parametrize("apart", [1, -1])
def test_kto(models: Any, batch: dict[str, torch.Tensor], apart: int) -> None:
    """With the baseline of mismatched answers, above 0 one way round, clamped at 0 the other."""
    policy, reference = models[::apart]
    label = torch.tensor([1, 0, 0, 1, 1, 0, 1, 0, 1, 1])
    strange = {name: x.roll(3, 0) for name, x in batch.items()}
    with_kl = {**batch, **{f"KL_{name}": x for name, x in strange.items()}, "label": label}
    trainer = kto_trainer(policy, reference, 0.2, 1.3, 0.8)
    expected = trainer._compute_loss(policy, with_kl, False)
    ratio = log_probs(policy, batch) - log_probs(reference, batch).detach()
    with torch.no_grad():
        other = log_probs(policy, strange) - log_probs(reference, strange)
    baseline = preference.kl_baseline(float(other.sum()), len(label))
    assert baseline == pytest.approx(trainer._metrics["eval"]["kl"][0], abs=1e-5)
    assert (baseline > 0) == (float(other.sum()) > 0)
    same(policy, preference.kto(ratio, label.bool(), baseline, 0.2, 1.3, 0.8).mean(), expected)


@pytest.mark.parametrize("margin", [None, torch.tensor([0.0, 1.5, -0.5, 3.0, 0.25])])
@pytest.mark.parametrize("centring", [None, 0.01])
def test_reward_model(batch: dict[str, torch.Tensor], margin: torch.Tensor | None, centring: float | None) -> None:
    from trl.trainer.reward_trainer import RewardTrainer

    model = seeded(LlamaForSequenceClassification, 3, num_labels=1)
    inputs: dict[str, Any] = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    if margin is not None:
        inputs["margin"] = margin
    trainer = bare(RewardTrainer, model=model, args=SimpleNamespace(center_rewards_coefficient=centring))
    expected = trainer.compute_loss(TakesMargin(model), inputs)
    scores = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.squeeze(-1)
    ours = preference.bradley_terry(
        *scores.chunk(2), margin_P=0.0 if margin is None else margin, centring=centring or 0.0
    )
    same(model, ours.mean(), expected)


HAND = Pairs(*(torch.tensor([x]) for x in (-10.0, -12.0, 5.0, 4.0, -11.0, -10.0)))
"""Log-ratios 1 and -2, mean log-probabilities -2 and -3 of a token."""


@pytest.mark.parametrize(
    ("loss", "settings", "by_hand"),
    [
        ("sigmoid", Settings(0.5), math.log(1 + math.exp(-1.5))),
        ("sigmoid", Settings(0.5, 0.1), math.log(1 + math.exp(-1.5)) + 0.1 * 1.5),
        ("robust", Settings(0.5, 0.1), math.log(1 + math.exp(-1.5)) - 0.1 / 0.8 * 1.5),
        ("hinge", Settings(0.2), 1 - 0.2 * 3),
        ("hinge", Settings(0.5), 0.0),
        ("ipo", Settings(0.5), (1 / 5 + 2 / 4 - 1) ** 2),
        ("sppo", Settings(0.5), 0.0 + 1.0),
        ("apo_zero", Settings(1.0), 1 / (1 + math.e) + 1 / (1 + math.e**2)),
        ("apo_down", Settings(1.0), 1 / (1 + math.exp(-1)) + 1 / (1 + math.exp(3))),
        ("orpo", Settings(2.0), 2 * math.log(1 + (math.e**2 - 1) / (math.e**3 - 1))),
        ("simpo", Settings(2.0, 0.0, 1.5), math.log(1 + math.exp(-0.5))),
        ("cpo", Settings(0.5), math.log(1 + math.exp(-1.0))),
    ],
)
def test_by_hand(loss: str, settings: Settings, by_hand: float) -> None:
    assert PAIR_LOSSES[loss].function(HAND, settings).item() == pytest.approx(by_hand, abs=2e-7, rel=2e-6)


def test_unpaired_and_scores_by_hand() -> None:
    ratio, label = torch.tensor([3.0, 3.0, -1.0]), torch.tensor([True, False, False])
    found = preference.kto(ratio, label, 1.0, 0.5, 2.0, 3.0)
    high, low = 1 / (1 + math.e), 1 / (1 + math.exp(-1))
    assert found.tolist() == pytest.approx([2 * high, 3 * low, 3 * high], rel=1e-6)
    assert preference.kl_baseline(-4.0, 2.0) == 0.0
    assert preference.kl_baseline(5.0, 2.0) == 2.5
    two, one = torch.tensor([2.0]), torch.tensor([1.0])
    plain = math.log(1 + math.exp(-1))
    assert preference.bradley_terry(two, one).item() == pytest.approx(plain, rel=1e-6)
    assert preference.bradley_terry(two, one, 1.0).item() == pytest.approx(math.log(2), rel=1e-6)
    assert preference.bradley_terry(two, one, 0.0, 0.25).item() == pytest.approx(plain + 0.25, rel=1e-6)
    assert preference.bradley_terry(two, one, 0.0, 0.0, 0.5).item() == pytest.approx(plain + 4.5, rel=1e-6)


def test_a_certain_answer_has_finite_odds() -> None:
    """Where every token has probability 1 in fp32 the odds would be infinite, and the gradient not a number."""
    chosen = torch.tensor([0.0], requires_grad=True)
    loss = preference.orpo(Pairs(chosen, *(torch.tensor([x]) for x in (-3.0, 2.0, 2.0))), Settings(0.1))
    loss.sum().backward()
    assert chosen.grad is not None
    assert torch.isfinite(loss).all()
    assert torch.isfinite(chosen.grad).all()
