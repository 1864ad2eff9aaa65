"""From the tokens of a picture to its spots: its features, or the patches that a connector's learnt queries read.

Legend: B tiles, Q queries of a tile, S what they read of a tile (its patches, and a class token before them where that
is kept) or the spots of all tiles, H heads, W words, T tokens.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn

from models.vision.config import VisionConfig
from models.vision.connectors.cross import CrossAttention
from models.vision.connectors.perceiver import Perceiver
from models.vision.connectors.qformer import QFormer
from models.vision.connectors.resampler import Resampler
from models.vision.eyes import Connection, Pictures


class Reader:
    """Listens to a connector while it runs; connectors whose features keep their places have nothing to tell."""

    def __init__(self, connector: nn.Module, hooks: ExitStack) -> None:
        self._layers: list[torch.Tensor] = []
        self._latents = 0  # keys behind the patches
        assert isinstance(connector, Connection)
        body = connector.body
        if isinstance(body, QFormer):
            self._hear([layer.cross for layer in body.layers if layer.cross is not None], hooks)
        elif isinstance(body, Perceiver):
            self._latents = body.latents.shape[0]
            self._hear([layer.attn for layer in body.layers], hooks)
        elif isinstance(body, Resampler):
            heard: dict[str, torch.Tensor] = {}
            for name in ("q", "k"):
                hooks.callback(getattr(body, name).register_forward_hook(partial(_keep, heard, name)).remove)
            hooks.callback(body.register_forward_hook(partial(self._resampled, heard)).remove)

    def weights(self, patches: int) -> torch.Tensor | None:
        """Mean over heads and layers that read, of what each query takes from so many patches of each tile: fp32
        [B, Q, patches], each row sums to 1. What is no patch (a class token, the latents themselves) does not count."""
        if not self._layers:
            return None
        read_BQS = torch.stack(self._layers).mean(0)
        stop = read_BQS.shape[2] - self._latents
        read_BQS = read_BQS[..., stop - patches : stop]
        return read_BQS / read_BQS.sum(2, keepdim=True)

    def _hear(self, modules: list[Any], hooks: ExitStack) -> None:
        for module in modules:
            assert isinstance(module, CrossAttention)
            hooks.callback(module.register_forward_pre_hook(self._crossed).remove)

    @torch.no_grad()
    def _crossed(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        queries, keys, _, tiles = args
        assert isinstance(module, CrossAttention)
        k = module.kv(keys).chunk(2, 1)[0]
        self._add(module.q(queries), k, module.heads, tiles)

    @torch.no_grad()
    def _resampled(self, heard: dict[str, torch.Tensor], module: nn.Module, args: tuple[Any, ...], _: Any) -> None:
        tiles = len(args[1])
        assert isinstance(module, Resampler)
        self._add(heard["q"].repeat(tiles, 1), heard["k"], module.heads, tiles)

    def _add(self, q: torch.Tensor, k: torch.Tensor, heads: int, tiles: int) -> None:
        q_BHQK, k_BHSK = (x.float().unflatten(1, (heads, -1)).unflatten(0, (tiles, -1)).transpose(1, 2) for x in (q, k))
        weights_BHQS = (q_BHQK @ k_BHSK.mT * q_BHQK.shape[-1] ** -0.5).softmax(3)
        self._layers.append(weights_BHQS.mean(1))


def _keep(heard: dict[str, torch.Tensor], name: str, _: nn.Module, __: Any, out: torch.Tensor) -> None:
    heard[name] = out.detach()


def on_spots(
    weights_WHT: torch.Tensor, pictures: Pictures, vision: VisionConfig, reads_BQS: torch.Tensor | None
) -> torch.Tensor:
    """Weights on tokens as weights on the spots of all tiles, fp32 [W, H, S]; of a query as those of what it read."""
    taken_WHF = weights_WHT[..., pictures.slots_F]
    placed_F = pictures.order_F >= 0  # what ends a row of features is no spot
    spots_WHS = taken_WHF.new_zeros(*taken_WHF.shape[:2], _features(pictures, vision))
    spots_WHS.index_add_(2, pictures.order_F[placed_F], taken_WHF[..., placed_F])
    if reads_BQS is None:
        return spots_WHS
    asked_WHBQ = spots_WHS.unflatten(2, reads_BQS.shape[:2])
    return torch.einsum("whbq,bqs->whbs", asked_WHBQ, reads_BQS).flatten(2)


def _features(pictures: Pictures, vision: VisionConfig) -> int:
    if vision.features_per_tile is not None:
        return vision.features_per_tile * len(pictures.grids)
    extra = int(vision.tower.has_class and vision.tower.keep_class)
    return sum(rows * columns // vision.connector.block**2 + extra for rows, columns in pictures.grids)
