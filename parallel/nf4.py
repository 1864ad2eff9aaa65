"""Frozen weights in 4 bits: each block of 64 values along a row as NormalFloat codes and one fp32 factor.

Source: Dettmers et al. 2023, QLoRA. The codes are bitsandbytes' own.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch

BLOCK = 64


def available() -> bool:
    """Whether bitsandbytes is installed."""
    return importlib.util.find_spec("bitsandbytes") is not None


@dataclass(frozen=True)
class Nf4:
    """A weight [O, I] in 4 bits; I is a multiple of 64, so that a part of its rows or columns has the same codes."""

    codes: torch.Tensor
    state: Any

    @staticmethod
    def of(weight: torch.Tensor) -> Nf4:
        """The weight packed."""
        from bitsandbytes.functional import quantize_4bit  # half a second to import

        assert weight.shape[1] % BLOCK == 0, f"{tuple(weight.shape)} does not fall into blocks of {BLOCK} in a row"
        codes, state = quantize_4bit(weight.contiguous(), blocksize=BLOCK, quant_type="nf4", compress_statistics=False)
        return Nf4(codes, state)

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight [O, I] that the codes mean."""
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(self.codes, self.state).to(dtype)

    @property
    def bytes(self) -> int:
        """Memory of codes and factors."""
        return self.codes.numel() * self.codes.element_size() + self.state.absmax.numel() * 4
