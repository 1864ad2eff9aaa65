"""Samples of a policy as both sides want them: padded matrices for TRL, a packed micro-batch for us.

Legend: B samples, W tokens of a completion, padded; V vocabulary.
"""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from data.batch import Document, MicroBatch, collate

PROMPT, VOCAB = 2, 11
LENGTHS = (9, 7, 7, 5, 3, 1)
GROUP = 3


@dataclass(frozen=True)
class Samples:
    """Numbers of every token; log-probabilities come from logits [B, W, V], which gradients are taken of."""

    ids_BW: torch.Tensor
    mask_BW: torch.Tensor
    """Written, and by the policy: a task's tokens stand in between."""
    logits_BWV: torch.Tensor
    old_BW: torch.Tensor
    reference_BW: torch.Tensor
    generated_BW: torch.Tensor
    reward_B: torch.Tensor
    advantage_B: torch.Tensor

    def scores(self, logits_BWV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability of each token and entropy, [B, W] both."""
        log_p = logits_BWV.log_softmax(-1)
        return log_p.gather(-1, self.ids_BW[..., None]).squeeze(-1), -(log_p.exp() * log_p).sum(-1)

    def batch(self, advantage_BW: torch.Tensor | None = None, moved: bool = True) -> MicroBatch:
        """The samples as a micro-batch with their facts; advantages of tokens instead of samples where given."""
        if advantage_BW is None:
            advantage_BW = self.advantage_B[:, None].expand_as(self.old_BW)
        facts = {"advantage": advantage_BW, "generated": self.generated_BW, "reference": self.reference_BW}
        if moved:
            facts["old"] = self.old_BW
        documents = []
        for row, length in enumerate(LENGTHS):
            learn = np.concatenate([np.zeros(PROMPT), self.mask_BW[row, :length].numpy()]).astype(bool)
            tokens = np.concatenate([np.ones(PROMPT), self.ids_BW[row, :length].numpy()])
            padded = {k: np.concatenate([np.zeros(PROMPT), fact[row, :length].numpy()]) for k, fact in facts.items()}
            documents.append(Document(tokens, learn, row % 2, {}, padded))
        return collate(documents)

    def packed(self, x_BW: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
        """Numbers of tokens where those are predicted, [T]; 0 where nothing is learnt."""
        x_T = x_BW.new_zeros(len(batch.targets_T))
        for row, length in enumerate(LENGTHS):  # they fall, so the batch has them in this order
            first = int(batch.cu_seqlens[row]) + PROMPT - 1
            x_T = x_T.index_add(0, torch.arange(first, first + length), x_BW[row, :length])
        return torch.where(batch.targets_T >= 0, x_T, torch.zeros(()))


def samples(seed: int = 0, spread: float = 0.4, alone: bool = False) -> Samples:
    """``spread``: how far the policy has moved in the logits; ``alone``: no task's tokens in between."""
    torch.manual_seed(seed)
    shape = (len(LENGTHS), max(LENGTHS))
    ids = torch.randint(0, VOCAB, shape)
    mask = torch.arange(shape[1]) < torch.tensor(LENGTHS)[:, None]
    if not alone:
        mask[0, 2:4] = mask[3, 1] = False
    logits = torch.randn(*shape, VOCAB)
    reward = torch.tensor([1.0, 0.0, 0.5, 0.0, 2.0, 2.0])
    advantage = torch.tensor([0.7, -0.7, 0.1, -1.2, 0.6, 0.6])
    blank = Samples(ids, mask, logits, torch.zeros(shape), torch.zeros(shape), torch.zeros(shape), reward, advantage)

    def near(how: float) -> torch.Tensor:
        return blank.scores(logits + how * torch.randn_like(logits))[0]

    return Samples(ids, mask, logits, near(spread), near(2 * spread), near(spread), reward, advantage)


def model_of(given: Samples, batch: MicroBatch, logits_BWV: torch.Tensor) -> Any:
    """What a stage calls as its model: the packed log-probabilities and entropies of the logits."""

    def model(**asked: Any) -> tuple[torch.Tensor, torch.Tensor]:
        assert asked["output"] == "log_probs" and asked["temperature"] == 1.0
        log_prob, entropy = given.scores(logits_BWV)
        return given.packed(log_prob, batch), given.packed(entropy, batch)

    return model


class Alone:
    """TRL's accelerator where there is one process."""

    device, num_processes, process_index, sync_gradients = torch.device("cpu"), 1, 0, True

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def reduce(self, x: torch.Tensor, reduction: str) -> torch.Tensor:
        return x


def trl_trainer(cls: type, given: Samples, logits_BWV: torch.Tensor | None = None, **changes: Any) -> Any:
    """A GRPOTrainer or RLOOTrainer of TRL that samples what is given, with the settings that its methods read."""
    trainer = object.__new__(cls)
    args = SimpleNamespace(
        delta=changes.pop("delta", None),
        use_bias_correction_kl=changes.pop("use_bias_correction_kl", False),
        steps_per_generation=1,
        gradient_accumulation_steps=1,
        gradient_checkpointing_kwargs=None,
        per_device_train_batch_size=len(LENGTHS),
        report_to=[],
    )
    settings: dict[str, Any] = {
        "accelerator": Alone(), "args": args, "aux_loss_enabled": False, "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None, "importance_sampling_level": "token", "beta": 0.0, "loss_type": "grpo",
        "epsilon_low": 0.2, "epsilon_high": 0.2, "use_vllm": False, "vllm_importance_sampling_correction": False,
        "max_completion_length": 12, "current_gradient_accumulation_steps": 1, "_entropy_bonus_enabled": False,
        "use_adaptive_entropy": False, "entropy_coef": 0.0, "environment_factories": None, "environments": None,
        "tools": [], "pad_to_multiple_of": None, "mask_truncated_completions": False, "num_iterations": 1,
        "num_generations": GROUP, "reward_weights": torch.ones(1), "reward_func_names": ["given"],
        "multi_objective_aggregation": "sum_then_normalize", "scale_rewards": "group", "_pending_extra_logs": {},
        "_pending_metrics": {}, "log_multimodal": False, "reward_clip_range": None, "normalize_advantages": False,
        "ref_model": "reference", "_tokenizer": SimpleNamespace(pad_token_id=0), "reward_funcs": [None],
    }  # fmt: skip
    logs = {"prompt": deque(), "completion": deque(), "rewards": defaultdict(deque), "advantages": deque()}
    settings |= {"_metrics": {"train": defaultdict(list)}, "_logs": {**logs, "extra": defaultdict(deque)}}
    trainer.__dict__.update({**settings, **changes})
    trainer.model = SimpleNamespace(training=True, is_gradient_checkpointing=False)

    def scores(model: Any, *_: Any, compute_entropy: bool = False, **__: Any) -> tuple[Any, Any, None]:
        if compute_entropy:
            return *given.scores(given.logits_BWV if logits_BWV is None else logits_BWV), None
        return (given.reference_BW if model == "reference" else given.old_BW), None, None

    def generate(prompts: Any) -> tuple[Any, ...]:
        ids = [given.ids_BW[row, :length].tolist() for row, length in enumerate(LENGTHS)]
        own = [given.mask_BW[row, :length].int().tolist() for row, length in enumerate(LENGTHS)]
        drawn = [given.generated_BW[row, :length].tolist() for row, length in enumerate(LENGTHS)]
        prompt = [[1] * PROMPT] * len(LENGTHS)
        if cls.__name__ == "RLOOTrainer":
            return prompt, ids, ids
        return prompt, ids, own, ids, drawn, {}, None, None

    trainer._get_per_token_logps_and_entropies, trainer._generate = scores, generate
    trainer._calculate_rewards = lambda *_: given.reward_B[:, None].clone()
    return trainer
