"""A Q-Former in its first stage: one transformer reads a picture through learnt queries, and a text, together or apart.

Queries and texts share the attention of every layer and have feed-forwards of their own; queries alone read the tower's
features. One pass computes all that is asked: pictures and texts apart (to compare them), texts that see their
picture's queries and their own past (to write them), and pairs that see all of each other (to match them).

Source: Li et al. 2023, BLIP-2, section 3.2.
Legend: B pictures, S features of each, Q queries of each, W width; N texts, T their tokens; M pairs to match.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from models.config import ModelConfig, Runtime
from models.dual.qformer_text import TextLayer, TextSide
from models.dual.sights import Lines, Sight, look
from models.vision.config import QFormerConfig
from models.vision.connectors.cross import CrossAttention, of_each_tile
from models.vision.connectors.qformer import QFormer, QFormerLayer
from models.vision.eyes import Pictures
from models.vision.layers import attend
from models.vision.tower import build_tower
from parallel.sharding import Place


@dataclass(frozen=True)
class Matches:
    """Pairs of a picture that is here and any text."""

    image_M: torch.Tensor
    """int64 [M]: which picture."""
    tokens_T: torch.Tensor
    """int64: the tokens of the texts, one text after another."""
    lengths: tuple[int, ...]
    """Tokens of each text."""


@dataclass(frozen=True)
class Plan:
    """What a pass computes, in rows: queries and texts to compare, to write, to match."""

    sights: tuple[Sight, ...]
    image_X: torch.Tensor
    """int64: the picture that each sequence of queries reads."""
    each: int
    """Queries of a sequence."""


def run_layer(
    own: QFormerLayer, other: TextLayer, x: torch.Tensor, text: torch.Tensor, features: torch.Tensor, plan: Plan
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """A layer of queries and one of texts: [rows of queries, W], [rows of texts, W] and [B, S, D'] -> both as they come
    out."""
    rows = torch.cat([x, text])
    heads, count = own.attn.heads, x.shape[0]
    q = own.attn.q(rows).unflatten(1, (heads, -1))
    k, v = own.attn.kv(rows).unflatten(1, (2, heads, -1)).unbind(1)
    q, k, v = ((part[:count], part[count:]) for part in (q, k, v))
    seen = torch.cat(look(q, k, v, plan.sights, plan.each))
    rows = own.attn_norm(own.attn.out(seen, rows))
    x, text = rows[:count], rows[count:]
    if own.cross is not None and own.cross_norm is not None:
        x = own.cross_norm(_read(own.cross, x, features, plan))
    return own.mlp_norm(own.mlp(x, x)), other(text)


def _read(cross: CrossAttention, x: torch.Tensor, features: torch.Tensor, plan: Plan) -> torch.Tensor:
    """A picture's keys and values are made once, whoever reads it."""
    q = cross.q(x).unflatten(1, (cross.heads, -1))
    both = cross.kv(features.flatten(0, 1)).unflatten(0, features.shape[:2]).index_select(0, plan.image_X)
    k, v = both.flatten(0, 1).unflatten(1, (2, cross.heads, -1)).unbind(1)
    return cross.out(attend(q, k, v, len(plan.image_X)), x)


class Reader(QFormer):
    """A Q-Former without the layer to a decoder, which takes texts along."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, features: torch.Tensor, text: torch.Tensor, layers: Sequence[TextLayer], plan: Plan
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """
        Args:
            features: [B, S, D'].
            text: [rows of texts, W], words and places.
            layers: the feed-forwards of texts.

        Returns:
            Rows of queries and of texts behind the last layer.
        """
        queries = of_each_tile(self.queries[0], len(plan.image_X))
        count, rows = queries.shape[0], self.norm(torch.cat([queries, text.to(queries.dtype)]))
        x, text = rows[:count], rows[count:]
        owns: Any = self.layers
        for own, other in zip(owns, layers, strict=True):
            if self.recompute and torch.is_grad_enabled():
                found: Any = checkpoint(
                    run_layer, own, other, x, text, features, plan, use_reentrant=False, preserve_rng_state=False
                )
                x, text = found
            else:
                x, text = run_layer(own, other, x, text, features, plan)
        return x, text


class Eye(nn.Module):
    """The connector of the first stage; its `body` is the next stage's but for the layer to a decoder."""

    def __init__(self, body: Reader) -> None:
        super().__init__()
        self.body = body
        self.newline, self.gated = None, nn.ModuleDict()  # what the connector of a decoder may have besides

    def forward(
        self, features: torch.Tensor, text: torch.Tensor, layers: Sequence[TextLayer], plan: Plan
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """See `Reader.forward`."""
        return self.body(features, text, layers, plan)


class Read(NamedTuple):
    """What a pass gives; the same on every tp rank."""

    image_NQP: torch.Tensor
    """fp32, of length 1: what each query says of a picture; no rows where there is no picture."""
    text_NP: torch.Tensor
    """fp32, of length 1, of a text's first token."""
    scale: torch.Tensor
    """What their products are multiplied with; fp32, no dims."""
    features_BSD: torch.Tensor
    """Of the tower."""
    written_T: torch.Tensor | None = None
    """fp32: the loss of each target; 0 where there is none."""
    matched_M2: torch.Tensor | None = None
    """fp32 logits of no and yes, the mean over the queries."""


class QFormerPair(nn.Module):
    """Tower, Q-Former and its text side."""

    def __init__(self, cfg: ModelConfig, place: Place, runtime: Runtime) -> None:
        super().__init__()
        assert cfg.vision is not None and isinstance(cfg.vision.connector, QFormerConfig)
        self.cfg, self.own = cfg, cfg.vision.connector
        again, plain = runtime.recompute == "full", Place(tp=place.tp)
        self.vision = build_tower(cfg.vision.tower, 1, plain, again)
        self.connector = Eye(Reader(cfg.vision, 0, plain, again))
        self.text = TextSide(cfg, self.own, plain, runtime.loss_chunk)
        self.layers, self.norm, self.head = nn.ModuleDict(), None, None  # a decoder's: the connector has the layers

    def forward(
        self,
        tokens_T: torch.Tensor,
        positions_T: torch.Tensor,
        cu_seqlens: torch.Tensor | Sequence[int],
        max_seqlen: int | None = None,
        channel_T: torch.Tensor | None = None,
        pictures: Pictures | None = None,
        features_BSD: torch.Tensor | None = None,
        targets_T: torch.Tensor | None = None,
        smoothing: float = 0.0,
        first_word: int | None = None,
        matches: Matches | None = None,
    ) -> Read:
        """Read pictures and texts: document n's picture is tile n.

        Args:
            tokens_T, positions_T, cu_seqlens: packed texts, as a decoder takes them.
            pictures: their tiles. Without any, a blank one is looked at (see `models.vision.eyes.see`).
            features_BSD: what the tower gave of them before, in its place.
            targets_T: int64 [T], the next word or -100: asks for the loss of writing the texts.
            smoothing: of these targets.
            first_word: stands in place of a text's first one where texts are written.
            matches: asks whether these pairs belong together.
        """
        borders = tuple(cu_seqlens.tolist()) if isinstance(cu_seqlens, torch.Tensor) else tuple(cu_seqlens)
        features = self._seen(pictures, tokens_T.device) if features_BSD is None else features_BSD
        tokens, plan = [tokens_T], [Lines.of(borders, tokens_T.device)]
        places = [positions_T]
        if targets_T is not None:
            tokens.append(_begun(tokens_T, borders, first_word))
            plan, places = plan * 2, places * 2
        if matches is not None:
            stops = (0, *accumulate(matches.lengths))
            tokens.append(matches.tokens_T)
            plan.append(Lines.of(stops, tokens_T.device))
            places.append(torch.cat([torch.arange(n, device=tokens_T.device) for n in matches.lengths]))
        rows = self.text.words(torch.cat(tokens)) + self.text.positions(torch.cat(places))
        layout = _planned(features.shape[0], self.own.queries, plan, targets_T is not None, matches)
        x, text = self.connector(features, rows, list(self.text.layers), layout)  # pyright: ignore
        count, here = features.shape[0] * self.own.queries, 0 if pictures is None else None
        first_N = torch.tensor(borders[:-1], device=text.device)
        image = self.text.image_proj(x[:count]).float().unflatten(0, (-1, self.own.queries))[:here]
        written = matched = None
        if targets_T is not None:
            written = self.text.head(text[borders[-1] : 2 * borders[-1]], targets_T, smoothing)
        if matches is not None:
            matched = self.text.match(x[count:]).float().unflatten(0, (-1, self.own.queries)).mean(1)
        return Read(
            F.normalize(image, dim=-1),
            F.normalize(self.text.text_proj(text[first_N]).float(), dim=-1),
            self.text.temperature(),
            features,
            written,
            matched,
        )

    def _seen(self, pictures: Pictures | None, device: torch.device) -> torch.Tensor:
        assert self.cfg.vision is not None
        if pictures is None:
            numbers = 3 * self.cfg.vision.tower.patch_size**2
            patches_PX, grids = torch.zeros(1, numbers, device=device), ((1, 1),)
        else:
            patches_PX, grids = pictures.patches_PX, pictures.grids
        return self.vision(patches_PX, grids).unflatten(0, (len(grids), -1))


def _begun(tokens_T: torch.Tensor, borders: Sequence[int], first_word: int | None) -> torch.Tensor:
    if first_word is None:
        return tokens_T
    first_N = torch.tensor(borders[:-1], device=tokens_T.device)
    return tokens_T.index_fill(0, first_N, first_word)


def _planned(pictures: int, each: int, lines: Sequence[Lines], writes: bool, matches: Matches | None) -> Plan:
    """Rows of queries: those of the pictures, then of the matches; of texts: to compare, to write, to match."""
    alone, ends = slice(0, pictures * each), list(accumulate(len(line.place_T) for line in lines))
    texts = [slice(start, stop) for start, stop in zip([0, *ends], ends, strict=False)]
    device = lines[0].place_T.device
    sights, image_X = (
        [Sight(queries=alone), Sight(texts=texts[0], lines=lines[0])],
        torch.arange(pictures, device=device),
    )
    if writes:
        sights.append(Sight(texts=texts[1], lines=lines[1], shown=alone, causal=True))
    if matches is not None:
        image_X = torch.cat([image_X, matches.image_M])
        sights.append(Sight(slice(alone.stop, each * len(image_X)), texts[-1], lines[-1]))
    return Plan(tuple(sights), image_X, each)
