"""One cross-attention of a square of queries, with sine positions in two dimensions.

Source: Bai et al. 2023, Qwen-VL, section 2.1. Legend: B tiles, S features of a tile, Q queries, D width of the decoder.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from models.vision.config import ResamplerConfig, VisionConfig
from models.vision.layers import LayerNorm, Linear, attend
from parallel.layers import ColumnLinear, RowLinear, parameter
from parallel.sharding import REPLICATED, Place


class Resampler(nn.Module):
    """[B S, D'] -> [B Q, D]"""

    def __init__(self, cfg: VisionConfig, width: int, place: Place, recompute: bool) -> None:
        super().__init__()
        own = cfg.connector
        assert isinstance(own, ResamplerConfig) and not cfg.tower.keep_class
        heads = own.num_heads
        self.side, self.heads, self.width = own.side, heads // place.tp.size, width
        self.queries = parameter((own.queries, width), REPLICATED, "normal", place)
        self.features = Linear(cfg.tower.hidden_size, width, False, place)
        self.norm_q, self.norm_kv, self.norm = (LayerNorm(width, own.norm_eps, place) for _ in range(3))
        self.q, self.k, self.v = (
            ColumnLinear(width, (width,), True, "normal", place, (heads,)) for _ in range(3)
        )  # fmt: skip
        self.out = RowLinear(width, width, True, "normal", place)
        self.proj = Linear(width, width, False, place)

    def forward(self, features: torch.Tensor, grids: tuple[tuple[int, int], ...]) -> torch.Tensor:
        tiles, (rows, columns) = len(grids), grids[0]
        assert len(set(grids)) == 1, "the tiles of a micro-batch have one size"
        table = sine_positions(self.side, self.width, features.device)
        place_q = table.flatten(0, 1)
        place_k = table if (rows, columns) == (self.side, self.side) else _stretched(table, rows, columns)
        kv = self.norm_kv(self.features(features))
        q = self.q((self.norm_q(self.queries) + place_q).to(kv.dtype)).expand(tiles, -1, -1).flatten(0, 1)
        k = self.k((kv.unflatten(0, (tiles, -1)) + place_k.flatten(0, 1)).to(kv.dtype).flatten(0, 1))
        v = self.v(kv)
        q, k, v = (x.unflatten(1, (self.heads, -1)) for x in (q, k, v))
        out = attend(q, k, v, tiles)
        return self.proj(self.norm(self.out(out, out.new_zeros(out.shape[0], self.width))))


def sine_positions(side: int, width: int, device: torch.device) -> torch.Tensor:
    """fp32 [side, side, W]: half of the numbers tell the column, half the row, each by sines, then cosines."""
    quarter = width // 4
    frequency = 1.0 / 10000 ** (torch.arange(quarter, dtype=torch.float64, device=device) / quarter)
    angle = torch.arange(side, dtype=torch.float64, device=device)[:, None] * frequency
    of_one = torch.cat([angle.sin(), angle.cos()], 1)  # [side, W / 2]
    columns, rows = of_one[None].expand(side, -1, -1), of_one[:, None].expand(-1, side, -1)
    return torch.cat([columns, rows], 2).float()


def _stretched(table: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """The positions of a square for a grid of another size, bicubic."""
    image = table.permute(2, 0, 1)[None]
    return F.interpolate(image, (rows, columns), mode="bicubic", align_corners=False)[0].permute(1, 2, 0)
