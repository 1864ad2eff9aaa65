"""Rotary position embedding and its scalings, in fp32, equal to what `transformers` computes.

Sources: Su et al. 2021 (RoFormer); linear: Chen et al. 2023 (position interpolation); dynamic: NTK-aware scaling as in
`transformers`; yarn: Peng et al. 2023; llama3: the Llama 3.1 reference code; sections: Wang et al. 2024 (Qwen2-VL).
"""

import math
from collections.abc import Sequence
from typing import Any

import torch

from models.config import ModelConfig, RopeConfig


class Rope:
    """cos and sin of a model's positions. Not a module: no weights, and fp32 whatever the model is cast to."""

    def __init__(self, cfg: ModelConfig) -> None:
        self.rope, self.head_dim = cfg.rope, cfg.mla.rope_dim if cfg.mla else cfg.head_dim
        self.trained_len = cfg.rope.original_max_seq_len or cfg.max_seq_len
        self._frequencies: dict[tuple[torch.device, int], torch.Tensor] = {}

    def tables(
        self,
        positions_T: torch.Tensor,
        doc_lengths: Sequence[int],
        here: Sequence[int] | None = None,
        rotary_3T: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin, each fp32 [T, K / 2], for documents of `doc_lengths` lying one after another.

        Dynamic scaling depends on a document's own length, not on what else is packed beside it. `here`: how many of
        each document's tokens `positions_T` are of, where not all. `rotary_3T`: time, row and column of each token, by
        which the model's sections turn; without it all three are the position.
        """
        device = positions_T.device
        if self.rope.scaling == "dynamic" and max(doc_lengths) > self.trained_len:
            rows = torch.stack([self._frequency(device, length) for length in doc_lengths])
            repeats = torch.tensor(doc_lengths if here is None else here, device=device)
            frequency = rows.repeat_interleave(repeats, 0, output_size=positions_T.shape[0])
        else:
            frequency = self._frequency(device, self.trained_len)
        places_TK = positions_T[:, None]
        if self.rope.sections and rotary_3T is not None:
            axes_K = torch.arange(3).repeat_interleave(torch.tensor(self.rope.sections)).to(device)
            places_TK = rotary_3T[axes_K].T
        angle_TK = places_TK.float() * frequency
        factor = attention_factor(self.rope)
        cos, sin = angle_TK.cos(), angle_TK.sin()
        return (cos, sin) if factor == 1.0 else (cos * factor, sin * factor)

    def _frequency(self, device: torch.device, length: int) -> torch.Tensor:
        length = max(length, self.trained_len) if self.rope.scaling == "dynamic" else self.trained_len
        key = (device, length)
        if key not in self._frequencies:
            self._frequencies[key] = frequencies(self.rope, self.head_dim, self.trained_len, length).to(device)
        return self._frequencies[key]


def frequencies(rope: RopeConfig, head_dim: int, trained_len: int, length: int) -> torch.Tensor:
    """Radians per position of each pair of dimensions, fp32 [K / 2]. `length` matters to dynamic scaling only."""
    theta = rope.theta
    if rope.scaling == "dynamic":
        stretch = rope.factor * length / trained_len - (rope.factor - 1)
        theta = theta * stretch ** (head_dim / (head_dim - 2))
    exponent = torch.arange(0, head_dim, 2, dtype=torch.int64, device="cpu").float() / head_dim
    plain = 1.0 / (theta**exponent)
    if rope.scaling == "linear":
        return plain / rope.factor
    if rope.scaling == "yarn":
        return _yarn(rope, theta**exponent, head_dim, trained_len)
    if rope.scaling == "llama3":
        return _llama3(rope, plain, trained_len)
    return plain


def _yarn(rope: RopeConfig, wavelength_K: torch.Tensor, head_dim: int, trained_len: int) -> torch.Tensor:
    def dim_turning(rotations: float) -> float:
        return head_dim * math.log(trained_len / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dim_turning(rope.beta_fast), dim_turning(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    span = high - low if high != low else 0.001
    ramp_K = ((torch.arange(head_dim // 2, dtype=torch.float32, device="cpu") - low) / span).clamp(0, 1)
    keep_K = 1 - ramp_K
    return 1.0 / (rope.factor * wavelength_K) * (1 - keep_K) + 1.0 / wavelength_K * keep_K


def _llama3(rope: RopeConfig, plain_K: torch.Tensor, trained_len: int) -> torch.Tensor:
    wavelength_K = 2 * math.pi / plain_K
    longest, shortest = trained_len / rope.low_freq_factor, trained_len / rope.high_freq_factor
    smooth = (trained_len / wavelength_K - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended_K = (1 - smooth) * plain_K / rope.factor + smooth * plain_K
    slow_K = torch.where(wavelength_K > longest, plain_K / rope.factor, plain_K)
    between = (wavelength_K >= shortest) & (wavelength_K <= longest)
    return torch.where(between, blended_K, slow_K)


def attention_factor(rope: RopeConfig) -> float:
    """What cos and sin are multiplied with (yarn), else 1."""
    if rope.scaling != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor

    if rope.mscale and rope.mscale_all_dim:
        return _mscale(rope, rope.mscale) / _mscale(rope, rope.mscale_all_dim)
    return _mscale(rope, 1.0)


def score_factor(rope: RopeConfig) -> float:
    """What DeepSeek multiplies the scores of whole heads with under yarn (`mscale_all_dim`), else 1."""
    if rope.scaling != "yarn" or not rope.mscale_all_dim:
        return 1.0
    return _mscale(rope, rope.mscale_all_dim) ** 2


def _mscale(rope: RopeConfig, weight: float) -> float:
    return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0


def rotate_(heads_THK: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Turn every head in place: (a, b) -> (a cos - b sin, b cos + a sin), a and b the halves of K."""
    rotate_into(heads_THK, heads_THK, cos, sin)


def rotate_into(out_THK: torch.Tensor, heads_THK: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Write the turned heads into `out_THK` (which may be `heads_THK`)."""
    _turn(heads_THK.chunk(2, -1), out_THK.chunk(2, -1), cos[:, None], sin[:, None])


def rotate_pairs_into(out_THK: torch.Tensor, heads_THK: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """The same with neighbours of K as pairs (a, b): DeepSeek's layout."""
    pairs, out = (x.unflatten(-1, (-1, 2)).unbind(-1) for x in (heads_THK, out_THK))
    _turn(pairs, out, cos[:, None], sin[:, None])


def _turn(ab: Sequence[torch.Tensor], out: Sequence[torch.Tensor], cos: torch.Tensor, sin: torch.Tensor) -> None:
    (a, b), (out_a, out_b) = ab, out
    turned = a * sin
    torch.mul(a, cos, out=out_a).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=out_b).add_(turned)


def turned_pairs(heads_THK: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """`rotate_pairs_into` a new tensor, differentiable."""
    a, b = heads_THK.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)


class _RotateQK(torch.autograd.Function):
    """Turn q and k inside the fused buffer. The projection does not keep its output, so no copy is needed; the result
    is told to autograd as a new tensor, because DeepSpeed's module hooks forbid marking theirs as changed."""

    @staticmethod
    def forward(
        ctx: Any, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, width: int, dim: int
    ) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.width, ctx.dim = width, dim
        out = qkv.detach()
        rotate_(out[:, :width].unflatten(1, (-1, dim)), cos.to(qkv.dtype), sin.to(qkv.dtype))
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        grad = grad.clone()
        rotate_(grad[:, : ctx.width].unflatten(1, (-1, ctx.dim)), cos.to(grad.dtype), -sin.to(grad.dtype))
        return grad, None, None, None, None


def rotate_qk(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, width: int, head_dim: int) -> torch.Tensor:
    """Turn the first `width` columns (q and k heads) of `qkv [T, (H + 2G) K]`, overwriting it."""
    return _RotateQK.apply(qkv, cos, sin, width, head_dim)
