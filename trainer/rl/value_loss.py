"""The critic's loss and how good it is."""

from __future__ import annotations

import numpy as np
import torch


def value_loss(
    value_T: torch.Tensor, old_T: torch.Tensor, return_T: torch.Tensor, clip: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Half the squared distance to the return, [T], and where the clipped one counts, bool [T].

    With ``clip`` the larger of that and of the same for a value held within ``clip`` of the value at the rollout
    (``old_T``), as in PPO's first implementations: what has moved further than that is pulled back only.
    """
    error_T = (value_T - return_T) ** 2
    if clip is None:
        return error_T / 2, torch.zeros_like(error_T, dtype=torch.bool)
    moved_T = value_T - old_T
    held_error_T = (old_T + moved_T.clamp(-clip, clip) - return_T) ** 2
    held_T = (moved_T.abs() > clip) & (held_error_T > error_T)
    return torch.maximum(error_T, held_error_T) / 2, held_T


def explained_variance(return_L: np.ndarray, value_L: np.ndarray) -> float:
    """1 - var(return - value) / var(return) over all learnt tokens of a step: 1 for a perfect critic, 0 for one that
    says the mean, below 0 for a worse one. 0 where all returns are equal."""
    spread = float(np.var(np.asarray(return_L, dtype=np.float64))) if len(return_L) else 0.0
    if spread == 0.0:
        return 0.0
    error_L = np.asarray(return_L, dtype=np.float64) - np.asarray(value_L, dtype=np.float64)
    return 1.0 - float(np.var(error_L)) / spread
