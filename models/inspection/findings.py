"""All that an inspection says of some layers and heads, gathered once: what reports and JSON files are made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn import functional as F

from models.inspection.attention import HeadNumbers, head_numbers
from models.inspection.inspection import Inspection, TopTokens

MAP_SIDE = 128
"""Attention maps are kept at most so many places wide."""


@dataclass(frozen=True)
class LayerFindings:
    """Of one layer. Tensors are of all tokens, [T]."""

    layer: int
    cosine_T: torch.Tensor
    norm_in_T: torch.Tensor
    norm_T: torch.Tensor
    """L2 norm of what leaves the layer."""
    attn_update_T: torch.Tensor
    mlp_update_T: torch.Tensor
    largest: float
    """Largest absolute number in what leaves the layer."""
    broken: int
    """How many numbers of what leaves the layer are not finite."""
    gradient_T: torch.Tensor | None
    """L2 norm of the gradient of what leaves the layer."""
    weight_gradients: dict[str, float] | None
    lens: TopTokens | None
    heads: dict[int, HeadNumbers]
    maps: dict[int, torch.Tensor]
    """Attention weights by head, fp16; of long texts the largest of each block of places, `MAP_SIDE` wide."""
    experts: list[int] | None
    """How often each expert was chosen."""


@dataclass(frozen=True)
class Findings:
    """Of a text and the chosen layers, in their order."""

    tokens: list[int]
    borders: tuple[int, ...]
    targets: list[int]
    loss: float | None
    """Mean over the targets, nats; None without a language-model head or without a target."""
    layers: tuple[LayerFindings, ...]
    other_gradients: dict[str, float]
    """L2 norm of the gradient of each parameter outside the layers (embedding, final norm, head); a tower's and a
    connector's as one."""


def gather(
    inspection: Inspection, layers: Sequence[int], heads: Sequence[int], k: int, done: Callable[[], object] = lambda: 0
) -> Findings:
    """Ask an inspection about some layers and heads.

    Args:
        k: most probable tokens of the logit lens; 0 = no lens.
        done: called after each layer.

    Raises:
        ValueError: there is no such layer or head.
    """
    recording, found = inspection.recording, []
    for layer in layers:
        found.append(_of_layer(inspection, layer, heads, k))
        done()
    targets = recording.targets_T.tolist()
    count = sum(target >= 0 for target in targets)
    loss = recording.loss_T.sum().item() / count if recording.loss_T is not None and count else None
    weights = recording.gradients.weights if recording.gradients is not None else {}
    others = _together({name: norm for name, norm in weights.items() if not name.startswith("layers.")})
    return Findings(recording.tokens_T.tolist(), recording.packing.borders, targets, loss, tuple(found), others)


def _together(norms: dict[str, float]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, norm in norms.items():
        part = name.partition(".")[0]
        key = part if part in ("vision", "connector") else name
        found[key] = math.hypot(found.get(key, 0.0), norm)
    return found


def _of_layer(inspection: Inspection, layer: int, heads: Sequence[int], k: int) -> LayerFindings:
    cosine_T = inspection.show_cos_distance(layer).per_token_T
    recording, numbers, maps = inspection.recording, {}, {}
    for head, weights_TT in zip(heads, inspection.attention(layer, heads), strict=True):
        numbers[head] = head_numbers(weights_TT, recording.packing.borders)
        maps[head] = smaller(weights_TT).half()
    out, grads = recording.streams[layer + 1], recording.gradients
    experts = recording.experts.get(layer)
    return LayerFindings(
        layer=layer,
        cosine_T=cosine_T,
        norm_in_T=recording.streams[layer].norm(dim=1),
        norm_T=out.norm(dim=1),
        attn_update_T=recording.attn_update_LT[layer],
        mlp_update_T=recording.mlp_update_LT[layer],
        largest=out.abs().max().item(),
        broken=int((~out.isfinite()).sum()),
        gradient_T=None if grads is None else grads.stream_LT[layer + 1],
        weight_gradients=None if grads is None else inspection.weight_gradients(layer),
        lens=inspection.show_topk_token(layer, k) if k else None,
        heads=numbers,
        maps=maps,
        experts=None if experts is None else experts.tolist(),
    )


def smaller(weights_TT: torch.Tensor) -> torch.Tensor:
    """A map of at most `MAP_SIDE` x `MAP_SIDE`, of long texts the largest weight of each block of places."""
    block = -(-weights_TT.shape[0] // MAP_SIDE)
    return weights_TT if block == 1 else F.max_pool2d(weights_TT[None, None], block, ceil_mode=True)[0, 0]


def numbers_of(findings: Findings, text_of: Callable[[int], str]) -> dict[str, Any]:
    """The numbers for a JSON file: all but the maps. What is not finite becomes null.

    Args:
        text_of: the text of a token.
    """
    tokens = [{"id": token, "text": text_of(token)} for token in findings.tokens]
    targets = sum(target >= 0 for target in findings.targets)
    return {
        "tokens": tokens,
        "borders": list(findings.borders),
        "targets": targets,
        "loss": _finite(findings.loss),
        "gradients_outside_layers": _finite(findings.other_gradients),
        "layers": [_layer_numbers(layer, targets, text_of) for layer in findings.layers],
    }


def _layer_numbers(layer: LayerFindings, targets: int, text_of: Callable[[int], str]) -> dict[str, Any]:
    found: dict[str, Any] = {
        "layer": layer.layer,
        "cosine": {"mean": layer.cosine_T.mean().item(), "per_token": layer.cosine_T.tolist()},
        "norm": {"mean": layer.norm_T.mean().item(), "largest": layer.largest, "per_token": layer.norm_T.tolist()},
        "not_finite": layer.broken,
        "attention_update_norm": layer.attn_update_T.mean().item(),
        "mlp_update_norm": layer.mlp_update_T.mean().item(),
        "heads": [{"head": head, **asdict(numbers)} for head, numbers in layer.heads.items()],
    }
    if layer.gradient_T is not None and layer.weight_gradients is not None:
        whole = layer.gradient_T.norm().item()
        found["gradient"] = {
            "stream": whole, "stream_per_token": layer.gradient_T.tolist(), "weights": layer.weight_gradients
        }  # fmt: skip
    if layer.lens is not None:
        lens = layer.lens
        found["lens"] = {
            "loss": lens.loss_T.sum().item() / targets if targets else None,
            "top": [
                [{"id": token, "text": text_of(token), "p": p} for token, p in zip(ids, probs, strict=True)]
                for ids, probs in zip(lens.ids_Tk.tolist(), lens.prob_Tk.tolist(), strict=True)
            ],
        }
    if layer.experts is not None:
        found["experts"] = layer.experts
    return _finite(found)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
