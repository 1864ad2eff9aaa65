"""TRL's trainers as references: made without their constructors, which want data sets and a tokenizer, and given the
attributes that their loss functions read. And a padded batch of pairs, with tiny models that have opinions on it."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB, PAIRS, WIDTH = 61, 5, 14
SIZES = LlamaConfig(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.3,
    pad_token_id=0,
)


def seeded(cls: Any, seed: int, **changes: Any) -> Any:
    """A model with random weights large enough to have opinions."""
    torch.manual_seed(seed)
    return cls(LlamaConfig(**{**SIZES.to_dict(), **changes})).eval()


def padded_pairs() -> dict[str, torch.Tensor]:
    """Chosen answers, then rejected ones [2P, W], of uneven prompts and lengths, padded on the right."""
    torch.manual_seed(5)
    prompts, lengths = torch.randint(1, 6, (PAIRS,)), torch.randint(7, WIDTH + 1, (2 * PAIRS,))
    place_W = torch.arange(WIDTH)
    ids = torch.randint(1, VOCAB, (2 * PAIRS, WIDTH))
    prompt_W = place_W < prompts.repeat(2)[:, None]
    ids[PAIRS:] = torch.where(prompt_W[PAIRS:], ids[:PAIRS], ids[PAIRS:])
    real = place_W < lengths[:, None]
    return {
        "input_ids": ids.where(real, 0),
        "attention_mask": real.long(),
        "completion_mask": (real & ~prompt_W).long(),
    }


def scoring_models() -> tuple[Any, Any]:
    """A policy and its reference, both with TRL's head that gives log-probabilities."""
    from trl.trainer.utils import add_fused_lm_head

    made = seeded(LlamaForCausalLM, 1), seeded(LlamaForCausalLM, 2)
    for model in made:
        add_fused_lm_head(model, outputs=("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1"))
    return made


def bare(cls: Any, **attributes: Any) -> Any:
    """A trainer of TRL with these attributes and nothing else."""
    trainer = object.__new__(cls)
    alone = SimpleNamespace(device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x)
    common = {"accelerator": alone, "aux_loss_enabled": False, "_total_train_tokens": 0, "_tp_size": 1}
    metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
    trainer.__dict__.update({**common, "_metrics": metrics, "is_encoder_decoder": False, **attributes})
    return trainer


def dpo_trainer(models: tuple[Any, Any], loss_types: list[str], weights: list[float], beta: float, eps: float) -> Any:
    """TRL's DPOTrainer."""
    from trl.trainer.dpo_trainer import DPOTrainer

    return bare(
        DPOTrainer,
        model=models[0],
        ref_model=models[1],
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        beta=beta,
        loss_types=loss_types,
        loss_weights=weights,
        label_smoothing=eps,
        f_divergence_type="reverse_kl",
        ld_alpha=None,
        precompute_ref_logps=False,
        use_weighting=False,
    )


def kto_trainer(policy: Any, reference: Any, beta: float, desirable: float, undesirable: float) -> Any:
    """TRL's KTOTrainer."""
    from trl.trainer.kto_trainer import KTOTrainer

    return bare(
        KTOTrainer,
        model=policy,
        ref_model=reference,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        beta=beta,
        loss_type="kto",
        calculate_KL=True,
        precompute_ref_logps=False,
        desirable_weight=desirable,
        undesirable_weight=undesirable,
    )


class TakesMargin(nn.Module):
    """A model as the reward trainer calls it, with all that is in the batch."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, margin: Any = None, **inputs: Any) -> Any:
        """The model's output."""
        return self.model(**inputs)
