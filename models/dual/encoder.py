"""A pair of encoders: a tower for pictures and an encoder for texts, whose vectors are compared.

Sources: Radford et al. 2021 (CLIP); Zhai et al. 2023 (SigLIP).
Legend: T tokens of all texts, N texts (document n belongs to tile n), W width of the common space.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from models.config import ModelConfig, Runtime
from models.dual.text import Positions, layer_config, text_rows
from models.vision.config import PooledConfig
from models.vision.eyes import Pictures, build_eyes
from models.vision.layers import LayerNorm, Linear
from models.vision.tower_layers import Layer, run_layers
from parallel.layers import VocabEmbedding, parameter
from parallel.sharding import REPLICATED, Place

LARGEST_SCALE = 100.0
"""Similarities are multiplied by at most so much."""


class Encoded(NamedTuple):
    """What a model that compares makes of a micro-batch. The similarity of picture i and text j is
    `scale * image_NW[i] @ text_NW[j] + bias`; the same on every tp rank."""

    image_NW: torch.Tensor
    """fp32, of length 1; no rows where the micro-batch has no picture."""
    text_NW: torch.Tensor
    """fp32, of length 1."""
    scale: torch.Tensor
    """fp32, no dims; at most 100."""
    bias: torch.Tensor
    """fp32, no dims; CLIP: 0."""


class Temperature(nn.Module):
    """How similarities are scaled and shifted; a module of its own, so that ZeRO-3 gathers it."""

    def __init__(self, cfg: ModelConfig, place: Place) -> None:
        super().__init__()
        self.scale = parameter((1,), REPLICATED, f"{cfg.family}_scale", place)
        self.bias = parameter((1,), REPLICATED, "siglip_bias", place) if cfg.family == "siglip" else None

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and bias. CLIP keeps the scale below a limit; where it is reached it has no gradient."""
        log_scale = self.scale.float()[0]
        if self.bias is not None:
            return log_scale.exp(), self.bias.float()[0]
        return log_scale.clamp(max=math.log(LARGEST_SCALE)).exp(), torch.zeros_like(log_scale)


class DualEncoder(nn.Module):
    """Tower and what pools its features (`vision`, `connector`), and a text encoder."""

    def __init__(self, cfg: ModelConfig, place: Place, runtime: Runtime) -> None:
        super().__init__()
        assert cfg.vision is not None
        assert place.cp.size == 1, "a text is not cut"
        self.cfg, self.place, self.runtime = cfg, place, runtime
        self.recompute = runtime.recompute == "full"
        plain = Place(tp=place.tp)
        self.vision, self.connector = build_eyes(cfg.vision, cfg.hidden_size, plain, self.recompute)
        self.embed = VocabEmbedding(cfg.vocab_size, cfg.hidden_size, "normal", plain)
        self.positions = Positions(cfg, plain)
        layers = layer_config(cfg)
        self.layers = nn.ModuleDict({str(i): Layer(layers, plain) for i in range(cfg.num_layers)})
        self.norm = LayerNorm(cfg.hidden_size, cfg.norm_eps, plain)
        self.head = Linear(cfg.hidden_size, width_of(cfg), cfg.family == "siglip", plain)
        self.temperature = Temperature(cfg, plain)

    def forward(
        self,
        tokens_T: torch.Tensor,
        positions_T: torch.Tensor,
        cu_seqlens: torch.Tensor | Sequence[int],
        max_seqlen: int | None = None,
        channel_T: torch.Tensor | None = None,
        pictures: Pictures | None = None,
    ) -> Encoded:
        """Encode packed texts and their pictures.

        Args:
            tokens_T, positions_T: int64 [T]; positions restart at each text.
            cu_seqlens: borders of the texts, [N + 1], starting with 0 and ending with T; on the CPU.
            max_seqlen, channel_T: as a decoder takes them; not needed.
            pictures: one tile for each text, in their order. Without any, the tower looks at a blank one and nothing of
                it is used, so that every rank runs the same modules.
        """
        borders = tuple(cu_seqlens.tolist()) if isinstance(cu_seqlens, torch.Tensor) else tuple(cu_seqlens)
        image = self._image(pictures, tokens_T.device)
        assert pictures is None or len(image) == len(borders) - 1, f"{len(image)} tiles, {len(borders) - 1} texts"
        text = self._text(tokens_T, positions_T, borders)
        scale, bias = self.temperature()
        return Encoded(F.normalize(image.float(), dim=1), F.normalize(text.float(), dim=1), scale, bias)

    def _image(self, pictures: Pictures | None, device: torch.device) -> torch.Tensor:
        assert self.cfg.vision is not None
        if pictures is not None:
            return self.connector(self.vision(pictures.patches_PX, pictures.grids), pictures.grids)
        tower = self.cfg.vision.tower
        blank = torch.zeros(1, 3 * tower.frames * tower.patch_size**2, device=device)
        return self.connector(self.vision(blank, ((1, 1),)), ((1, 1),))[:0]

    def _text(self, tokens_T: torch.Tensor, positions_T: torch.Tensor, borders: tuple[int, ...]) -> torch.Tensor:
        rows = text_rows(self.cfg, tokens_T, positions_T, borders)
        x = self.embed(rows.tokens_R) + self.positions(rows.positions_R)
        x = run_layers(self.layers.values(), x, [rows.seen] * self.cfg.num_layers, self.recompute)
        return self.head(self.norm(x.index_select(0, rows.pooled_N)))


def width_of(cfg: ModelConfig) -> int:
    """Width of the space where pictures and texts are compared."""
    assert cfg.vision is not None and isinstance(cfg.vision.connector, PooledConfig)
    return cfg.vision.connector.width
