"""The adapter section: which few parameters are trained while the model itself stays as it is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from models.adapters.virtual_config import PrefixConfig, PromptConfig
from models.config import Problem

ALL_LINEAR = "all-linear"
"""Every linear layer but the head, as `peft` means it."""


@dataclass(frozen=True)
class LoraConfig:
    """Adapters of low rank beside linear layers (Hu et al. 2021, LoRA), with the variants rsLoRA (Kalajdzievski 2023),
    DoRA (Liu et al. 2024), PiSSA (Meng et al. 2024) and QLoRA (Dettmers et al. 2023)."""

    name: Literal["lora"] = "lora"
    """Which kind of adapter."""
    rank: int = 16
    """Rank of each adapter."""
    alpha: float = 32.0
    """The adapter's output is multiplied with alpha / rank."""
    targets: tuple[str, ...] = (ALL_LINEAR,)
    """Names of linear layers as Hugging Face has them (q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj),
    or all-linear: every one but the head. Experts are chosen by experts.gate_up_proj and experts.down_proj, never by
    all-linear; routers and shared experts take none."""
    dropout: float = 0.0
    """Share of an adapter's input elements that are dropped in training; those of experts and beside the decoder (a
    vision tower's, a connector's) have none."""
    rank_stabilized: bool = False
    """Multiply with alpha / sqrt(rank) instead (rsLoRA)."""
    dora: bool = False
    """Train the length of each output row by itself, the adapter only turns it (DoRA)."""
    init: Literal["zero", "pissa"] = "zero"
    """zero = A is drawn and B is 0: the start is the model; pissa = the largest singular values go into the adapter."""
    base: Literal["fp32", "nf4"] = "fp32"
    """How the frozen linear layers are kept; nf4 = in 4 bits (QLoRA), needs bitsandbytes."""
    start: str | None = None
    """Folder of an adapter in peft's format to start from."""

    can_be_off: ClassVar[bool] = True
    """Whether the model without the adapter is at hand at any time."""

    @property
    def scale(self) -> float:
        """What the adapter's output is multiplied with."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    def problems(self) -> list[Problem]:
        """Values wrong in themselves."""
        rules = [
            ("rank", self.rank >= 1, "must be at least 1", "adapter.rank=16"),
            ("alpha", self.alpha > 0, "must be above 0", "adapter.alpha=32"),
            ("targets", bool(self.targets), "names no layer", "'adapter.targets=[all-linear]'"),
            ("dropout", 0 <= self.dropout < 1, "is a share, at least 0 and below 1", "adapter.dropout=0.05"),
            (
                "dora",
                not (self.dora and self.init == "pissa"),
                "measures rows of the weight that adapter.init=pissa takes apart",
                "adapter.dora=false or adapter.init=zero",
            ),
            (
                "init",
                not (self.init == "pissa" and self.start is not None),
                "makes adapters anew and adapter.start brings some",
                "adapter.init=zero or adapter.start=null",
            ),
        ]
        return [(key, getattr(self, key), why, way) for key, good, why, way in rules if not good]


@dataclass(frozen=True)
class Ia3Config:
    """Learnt factors on activations (Liu et al. 2022, IA3): outputs of column layers (k_proj, v_proj, …), inputs of row
    layers (down_proj, o_proj)."""

    name: Literal["ia3"] = "ia3"
    targets: tuple[str, ...] = ("k_proj", "v_proj", "down_proj")
    """Names of linear layers as Hugging Face has them."""
    start: str | None = None
    """Folder of an adapter in peft's format to start from."""

    can_be_off: ClassVar[bool] = True

    def problems(self) -> list[Problem]:
        """Values wrong in themselves."""
        good = bool(self.targets)
        way = "'adapter.targets=[k_proj,v_proj,down_proj]'"
        return [] if good else [("targets", self.targets, "names no layer", way)]


@dataclass(frozen=True)
class BitfitConfig:
    """Biases alone are trained (Ben Zaken et al. 2021, BitFit)."""

    name: Literal["bitfit"] = "bitfit"
    """Which kind of adapter."""

    can_be_off: ClassVar[bool] = False

    def problems(self) -> list[Problem]:
        """None: there is nothing to set."""
        return []


AdapterConfig = LoraConfig | Ia3Config | BitfitConfig | PromptConfig | PrefixConfig
