"""Frozen weights in 4 bits: each block of 64 values along a row as NormalFloat codes and one fp32 factor.

Source: Dettmers et al. 2023, QLoRA. The codes are bitsandbytes' own.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

BLOCK = 64
_KEY = "four_bits"


def available() -> bool:
    """Whether bitsandbytes is installed."""
    return importlib.util.find_spec("bitsandbytes") is not None


@dataclass(frozen=True)
class Nf4:
    """A weight [O, I] or stacked ones [E, O, I] in 4 bits; I is a multiple of 64, so that a part of the rows or columns
    has the same codes."""

    codes: torch.Tensor
    state: Any

    @staticmethod
    def of(weight: torch.Tensor) -> Nf4:
        """The weight packed."""
        from bitsandbytes.functional import quantize_4bit  # half a second to import

        assert weight.shape[-1] % BLOCK == 0, f"{tuple(weight.shape)} does not fall into blocks of {BLOCK} in a row"
        codes, state = quantize_4bit(weight.contiguous(), blocksize=BLOCK, quant_type="nf4", compress_statistics=False)
        return Nf4(codes, state)

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight that the codes mean."""
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(self.codes, self.state).to(dtype)

    @property
    def bytes(self) -> int:
        """Memory of codes and factors."""
        return self.codes.numel() * self.codes.element_size() + self.state.absmax.numel() * 4


def pack_(weight: nn.Parameter) -> Nf4:
    """Put a frozen parameter into 4 bits. It is empty from then on, and `four_bits` knows its values."""
    packed = Nf4.of(weight.detach())
    weight.data = weight.data.new_empty(0)
    vars(weight)[_KEY] = packed
    return packed


def four_bits(weight: torch.Tensor) -> Nf4 | None:
    """What a parameter is kept as; None where it is itself."""
    return vars(weight).get(_KEY)
