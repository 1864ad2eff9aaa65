"""What a recording says, asked layer by layer. Layers and heads are counted from 0, as in the parameters' names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch.nn import functional as F

from models.decoder import Decoder, Layer
from models.heads import LMHead
from models.inspection.attention import HeadNumbers, attention_weights, head_numbers
from models.inspection.reading import on_spots
from models.inspection.recording import Recording, positions_and_targets, record
from models.vision.eyes import Pictures

LENS_TOKENS = 256
"""Tokens whose logits exist at once."""


@dataclass(frozen=True)
class Cosine:
    """How far a layer turns the stream: cosine of each token's row as it enters and as it leaves."""

    per_token_T: torch.Tensor
    """fp64 [T]."""

    @property
    def mean(self) -> float:
        """Over all tokens; 1 = the layer changes no direction."""
        return self.per_token_T.mean().item()

    @property
    def distance(self) -> float:
        """1 - mean."""
        return (1 - self.per_token_T).mean().item()


@dataclass(frozen=True)
class TopTokens:
    """What the head would say after a layer (logit lens: nostalgebraist 2020)."""

    ids_Tk: torch.Tensor
    """int64 [T, k], the most probable first."""
    prob_Tk: torch.Tensor
    """fp32 [T, k]."""
    loss_T: torch.Tensor
    """fp32 [T]: nats for the token that comes next, 0 where none does."""


class Inspection:
    """A model and the recording of one text in it."""

    def __init__(self, model: Decoder, recording: Recording) -> None:
        self.model, self.recording = model, recording

    @staticmethod
    def of(
        model: Decoder,
        tokens_T: torch.Tensor,
        borders: Sequence[int] | None = None,
        gradients: bool = True,
        pictures: Pictures | None = None,
        rotary_3T: torch.Tensor | None = None,
    ) -> Inspection:
        """Run a text through a whole model and record it.

        Args:
            tokens_T: int64 [T], one document or several packed.
            borders: of the documents, [N + 1], from 0 to T; None = one document.
            gradients: also run the backward of the mean loss; needs a language-model head and a token that follows
                another.
            pictures: of all documents, for a model that sees.
            rotary_3T: int64 [3, T], time, row and column of each token, for one with `rope.sections`.

        Raises:
            ValueError: no token, tokens outside the vocabulary, a document longer than the context, gradients where
                there is no loss, or pictures for a model that sees none.
        """
        borders = (0, tokens_T.shape[0]) if borders is None else tuple(borders)
        if pictures is not None and model.cfg.vision is None:
            raise ValueError("the model sees no pictures (model.vision=null); give none")
        _check_text(model, tokens_T, borders, gradients)
        if gradients and not (positions_and_targets(tokens_T, borders, pictures)[1] >= 0).any():
            raise ValueError("gradients need a loss, and no token comes next that is none of a picture's; ask for none")
        return Inspection(model, record(model, tokens_T, borders, gradients, pictures, rotary_3T))

    @property
    def layers(self) -> int:
        """Number of layers."""
        return self.model.cfg.num_layers

    @property
    def heads(self) -> int:
        """Number of query heads of a layer."""
        return self.model.cfg.num_heads

    def show_cos_distance(self, layer: int) -> Cosine:
        """Cosine of what enters a layer and what leaves it.

        Raises:
            ValueError: there is no such layer.
        """
        before, after = (self.recording.streams[self._layer(layer) + i].double() for i in (0, 1))
        return Cosine(F.cosine_similarity(before, after, dim=1, eps=1e-30))

    @torch.no_grad()
    def show_topk_token(self, layer: int, k: int) -> TopTokens:
        """The k tokens that final norm and head find most probable in what leaves a layer.

        Raises:
            ValueError: no such layer, k is not 1 to the size of the vocabulary, or the model has no such head.
        """
        vocab = self.model.cfg.vocab_size
        if not 1 <= k <= vocab:
            raise ValueError(f"k={k}: give 1 to {vocab}, the size of the vocabulary")
        ids, probs, losses = [], [], []
        for part, logits in self._lens(layer):
            log_p = logits.float().log_softmax(1)
            top = log_p.topk(k, 1)
            ids.append(top.indices)
            probs.append(top.values.exp())
            losses.append(F.nll_loss(log_p, self.recording.targets_T[part], ignore_index=-100, reduction="none"))
        return TopTokens(torch.cat(ids), torch.cat(probs), torch.cat(losses))

    def lens_logits(self, layer: int) -> torch.Tensor:
        """All logits [T, V] after a layer; of the last layer those of the model. Raises as `show_topk_token`."""
        with torch.no_grad():
            return torch.cat([logits for _, logits in self._lens(layer)])

    def _lens(self, layer: int) -> Iterator[tuple[slice, torch.Tensor]]:
        stream = self.recording.streams[self._layer(layer) + 1]
        norm, head = self.model.norm, self.model.head
        if norm is None or not isinstance(head, LMHead):
            raise ValueError("the logit lens needs a language-model head; this model has a scalar head")
        for start in range(0, stream.shape[0], LENS_TOKENS):
            part = slice(start, start + LENS_TOKENS)
            logits = head(norm(stream[part])[0])
            assert isinstance(logits, torch.Tensor)
            yield part, logits

    def show_attention(self, layer: int, head: int, tokens: Sequence[int] | None = None) -> torch.Tensor:
        """The attention weights of one query head, fp32 [T, T]: rows look at columns, each row sums to 1.

        Args:
            tokens: places in the text to show, rows and columns alike; None = all. A row then sums to 1 or less.

        Raises:
            ValueError: no such layer, head or place.
        """
        return next(self.attention(layer, [head])) if tokens is None else self._places(layer, head, tokens)

    def _places(self, layer: int, head: int, tokens: Sequence[int]) -> torch.Tensor:
        total = self.recording.tokens_T.shape[0]
        if outside := [place for place in tokens if not 0 <= place < total]:
            raise ValueError(f"tokens={outside[0]}: the text has the places 0 to {total - 1}")
        at = torch.tensor(list(tokens), dtype=torch.int64, device=self.recording.tokens_T.device)
        return next(self.attention(layer, [head]))[at][:, at]

    def attention(self, layer: int, heads: Sequence[int] | None = None) -> Iterator[torch.Tensor]:
        """The weights [T, T] of several heads (None = all), one after another. Raises as `show_attention`."""
        stream = self.recording.streams[self._layer(layer)]
        heads = range(self.heads) if heads is None else heads
        for head in heads:
            if not 0 <= head < self.heads:
                raise ValueError(f"head {head}: the layers have the heads 0 to {self.heads - 1}")
        return attention_weights(self._module(layer), stream, self.recording.packing, heads)

    def look(self, layer: int, words: Sequence[Sequence[int]], heads: Sequence[int] | None = None) -> torch.Tensor:
        """What words take from each spot of the pictures: of each feature of their tiles, or, where learnt queries made
        the features, of each patch: the queries' weights times what each of them read (`Recording.reads_BQS`).

        Args:
            words: the places of each word's tokens, whose mean is taken.
            heads: query heads; None = all.

        Returns:
            fp32 [words, heads, S], all pictures' tiles one after another.

        Raises:
            ValueError: no such layer or head.
        """
        pictures = self.recording.pictures
        assert pictures is not None, "no picture was shown"
        taken = []
        for weights_TT in self.attention(layer, heads):
            taken.append(torch.stack([weights_TT[list(places)].mean(0) for places in words]))
        vision = self.model.cfg.vision
        assert vision is not None
        return on_spots(torch.stack(taken, 1), pictures, vision, self.recording.reads_BQS)

    def head_numbers(self, layer: int, heads: Sequence[int] | None = None) -> list[HeadNumbers]:
        """What each head looks at, in a few numbers. Raises as `show_attention`."""
        return [head_numbers(weights, self.recording.packing.borders) for weights in self.attention(layer, heads)]

    def stream_norms(self) -> torch.Tensor:
        """fp32 [L + 1, T]: L2 norm of each token's row as it enters the first layer and as it leaves each layer."""
        return torch.stack([stream.norm(dim=1) for stream in self.recording.streams])

    def weight_gradients(self, layer: int) -> dict[str, float]:
        """L2 norm of the gradient of a layer's weights: of all, of attention, of the feed-forward, of the two norms.

        Raises:
            ValueError: no such layer, or no gradients were recorded.
        """
        if self.recording.gradients is None:
            raise ValueError("no gradients were recorded; run Inspection.of(..., gradients=True)")
        start = f"layers.{self._layer(layer)}."
        squares: dict[str, float] = {"all": 0.0, "attention": 0.0, "mlp": 0.0, "norms": 0.0}
        for name, norm in self.recording.gradients.weights.items():
            if name.startswith(start):
                part = name.removeprefix(start).split(".")[0]
                squares["all"] += norm**2
                squares[{"attn": "attention", "mlp": "mlp"}.get(part, "norms")] += norm**2
        return {part: square**0.5 for part, square in squares.items()}

    def _layer(self, layer: int) -> int:
        if not 0 <= layer < self.layers:
            raise ValueError(f"layer {layer}: the model has the layers 0 to {self.layers - 1}")
        return layer

    def _module(self, layer: int) -> Layer:
        module = self.model.layers[str(layer)]
        assert isinstance(module, Layer)
        return module


def _check_text(model: Decoder, tokens_T: torch.Tensor, borders: Sequence[int], gradients: bool) -> None:
    cfg = model.cfg
    lengths = [b - a for a, b in pairwise(borders)]
    if not lengths or not tokens_T.numel() or min(lengths) < 1:
        raise ValueError("the text is empty; give at least one token in each document")
    if max(lengths) > cfg.max_seq_len:
        raise ValueError(f"a text of {max(lengths)} tokens is longer than the model's context of {cfg.max_seq_len}")
    low, high = int(tokens_T.min()), int(tokens_T.max())
    if low < 0 or high >= cfg.vocab_size:
        wrong = low if low < 0 else high
        raise ValueError(
            f"token {wrong} is none of the model's {cfg.vocab_size}; the tokenizer belongs to another model"
        )
    if gradients and cfg.head != "lm":
        raise ValueError("gradients need a loss, and a model with a scalar head has none; ask for none")
    if gradients and max(lengths) < 2:
        raise ValueError("gradients need a loss, and a single token has no next one; give a text of two tokens or more")
