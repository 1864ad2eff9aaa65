"""The pictures of scripts/inspect_model.py: lines over layers, heat maps of layers by tokens, attention maps."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
import torch

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager, get_font
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from models.inspection.attention import HeadNumbers
from models.inspection.findings import Findings, LayerFindings

_BLUE, _RED, _GREEN = "#4477AA", "#EE6677", "#228833"  # Paul Tol's "bright" scheme, as in scripts/plot.py
_MOST_LABELS = 64
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.edgecolor": "#888888",
    "lines.linewidth": 1.5,
    "legend.frameon": False,
}


def png(draw: Callable[..., Figure], *args: Any) -> bytes:
    """A picture as the bytes of a PNG file."""
    with plt.rc_context(_STYLE):
        figure = draw(*args)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110)
        plt.close(figure)
    return buffer.getvalue()


def label(text: str) -> str:
    """A token as an axis can show it: blanks visible, no formulas, and a box for what the font has no sign for."""
    known = get_font(fontManager.findfont("DejaVu Sans")).get_charmap()
    shown = text.replace("\n", "↵").replace("\t", "→").replace(" ", "·")
    shown = "".join(sign if ord(sign) in known else "□" for sign in shown)
    return (shown if len(shown) <= 14 else shown[:13] + "…").replace("$", r"\$")


def median(tensor: torch.Tensor) -> float:
    """The middle value, which one token with huge numbers does not move."""
    return tensor.double().quantile(0.5).item()


def profile(findings: Findings) -> Figure:
    """Six curves over the layers on one page."""
    layers = findings.layers
    at = [layer.layer for layer in layers]
    figure, axes = plt.subplots(2, 3, figsize=(12, 5.6), layout="constrained")
    targets = max(sum(target >= 0 for target in findings.targets), 1)

    _curves(axes[0, 0], at, "Cosine distance, input to output", {"": [1 - x.cosine_T.mean().item() for x in layers]})
    norms = {
        "median token": [median(x.norm_T) for x in layers],
        "largest token": [x.norm_T.max().item() for x in layers],
    }
    _curves(axes[0, 1], at, "Norm of what leaves the layer", norms, log=True)
    added = {
        "attention": [median(x.attn_update_T / x.norm_in_T) for x in layers],
        "feed-forward": [median(x.mlp_update_T / x.norm_in_T) for x in layers],
    }
    _curves(axes[0, 2], at, "Norm of what is added / of the input, median token", added, log=True)
    losses = {"": [x.lens.loss_T.sum().item() / targets for x in layers if x.lens is not None]}
    _curves(axes[1, 0], at, "Logit lens: loss of the next token (nats)", losses if any(losses.values()) else {})
    grads = [x.gradient_T.norm().item() for x in layers if x.gradient_T is not None]
    _curves(axes[1, 1], at, "Gradient norm of what leaves the layer", {"": grads} if grads else {}, log=True)
    weights = [x.weight_gradients for x in layers if x.weight_gradients is not None]
    parts = {"attention": "attention", "feed-forward": "mlp", "norms": "norms"}
    series = {name: [each[key] for each in weights] for name, key in parts.items()} if weights else {}
    _curves(axes[1, 2], at, "Gradient norm of the layer's weights", series, log=True)
    return figure


def _curves(axes: Axes, at: list[int], title: str, series: dict[str, list[float]], log: bool = False) -> None:
    axes.set_title(title)
    axes.set_xlabel("layer")
    axes.grid(color="#E6E6E6", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    if not series:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color="#999999")
    for colour, (name, values) in zip((_BLUE, _RED, _GREEN), series.items(), strict=False):
        axes.plot(at, values, "o-", color=colour, markersize=3, label=name)
    shown = [value for values in series.values() for value in values if math.isfinite(value)]
    if log and shown and min(shown) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        axes.yaxis.set_minor_formatter("{x:g}" if max(shown) < 100 * min(shown) else NullFormatter())
    if len(series) > 1:
        axes.legend(fontsize=8)


def by_token(values_LT: Sequence[torch.Tensor], layers: Sequence[int], tokens: Sequence[str], unit: str) -> Figure:
    """A heat map: a row for each layer, the last on top; a column for each token. Colours are logarithmic."""
    values = torch.stack([row.double() for row in values_LT]).numpy()
    good = values[np.isfinite(values) & (values > 0)]
    high = good.max() if good.size else 1.0
    low = max(np.quantile(good, 0.02) if good.size else 0.0, high / 1000)  # one still token does not take all colours
    low = low if low < high else high / 10
    scale = LogNorm(low, high)
    values = np.where(np.isfinite(values), np.maximum(values, low / 10), np.nan)  # a zero has no logarithm
    width = min(max(0.2 * len(tokens) + 2.5, 7), 16)
    figure, axes = plt.subplots(figsize=(width, min(max(0.2 * len(layers) + 1.6, 2.8), 9)), layout="constrained")
    shades = matplotlib.colormaps["magma"].with_extremes(bad="#00C0C0", under="black")
    image = axes.imshow(values, aspect="auto", origin="lower", cmap=shades, norm=scale, interpolation="nearest")
    figure.colorbar(image, ax=axes, label=unit, pad=0.01)
    _ticks(axes, "y", [str(layer) for layer in layers], 32)
    _ticks(axes, "x", [label(token) for token in tokens], _MOST_LABELS)
    axes.set_ylabel("layer")
    return figure


def _ticks(axes: Axes, which: str, names: Sequence[str], most: int) -> None:
    step = -(-len(names) // most)
    at = range(0, len(names), step)
    shown = [names[i] for i in at]
    if which == "x":
        axes.set_xticks(list(at), shown, rotation=90, fontsize=7)
    else:
        axes.set_yticks(list(at), shown, fontsize=7)


def heads_overview(layers: Sequence[LayerFindings]) -> Figure:
    """Four heat maps of layers by heads: what kind of thing each head does."""
    panels: tuple[tuple[str, Callable[[HeadNumbers], float], float | None], ...] = (
        ("Weight on the document's first token", lambda x: x.first, 1.0),
        ("Weight on the token before", lambda x: x.previous, 1.0),
        ("Entropy of the weights (nats)", lambda x: x.entropy, None),
        ("Mean distance looked back (tokens)", lambda x: x.distance, None),
    )
    heads = list(layers[0].heads)
    width, height = min(max(0.22 * len(heads) + 2, 3), 8), min(max(0.16 * len(layers) + 1.2, 2.4), 8)
    figure, axes = plt.subplots(1, 4, figsize=(4 * width * 0.8, height), layout="constrained", squeeze=False)
    for place, (title, pick, most) in zip(axes[0], panels, strict=True):
        values = np.array([[pick(layer.heads[head]) for head in heads] for layer in layers])
        image = place.imshow(values, aspect="auto", origin="lower", cmap="viridis", vmin=0, vmax=most)
        figure.colorbar(image, ax=place, pad=0.02)
        place.set_title(title, fontsize=8)
        _ticks(place, "y", [str(layer.layer) for layer in layers], 32)
        _ticks(place, "x", [str(head) for head in heads], 32)
        place.set_xlabel("head")
        place.set_ylabel("layer")
    return figure


def mosaic(layer: LayerFindings) -> Figure:
    """Small attention maps of all chosen heads of a layer, side by side."""
    maps = [each.float().numpy() for each in layer.maps.values()]
    across = min(len(maps), 9)
    down, side = -(-len(maps) // across), maps[0].shape[0]
    gap = max(side // 16, 1)
    sheet = np.full((down * (side + gap) - gap, across * (side + gap) - gap), np.nan)
    for i, each in enumerate(maps):
        top, left = (i // across) * (side + gap), (i % across) * (side + gap)
        sheet[top : top + side, left : left + side] = np.where(np.tri(side, dtype=bool), each, 0.0)
    figure, axes = plt.subplots(figsize=(1.4 * across + 0.3, 1.55 * down), layout="constrained")
    axes.imshow(np.sqrt(sheet), cmap=_maps(), vmin=0, vmax=1, interpolation="nearest")  # the root shows small weights
    for i, head in enumerate(layer.maps):
        top, left = (i // across) * (side + gap), (i % across) * (side + gap)
        axes.text(left + side * 0.96, top + side * 0.14, f"{head}", color="#C03030", ha="right", fontsize=9)
    axes.axis("off")
    return figure


def attention_map(weights_TT: torch.Tensor, tokens: Sequence[str], title: str) -> Figure:
    """One head's map with the tokens written beside it."""
    size = min(max(0.17 * len(tokens) + 2, 4.5), 12)
    figure, axes = plt.subplots(figsize=(size + 0.8, size), layout="constrained")
    image = axes.imshow(weights_TT.float().sqrt().numpy(), cmap=_maps(), vmin=0, vmax=1, interpolation="auto")
    bar = figure.colorbar(image, ax=axes, label="weight", pad=0.01, shrink=0.8)
    shown = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0)
    bar.set_ticks([value**0.5 for value in shown], labels=[f"{value:g}" for value in shown])
    names = [label(token) for token in tokens]
    _ticks(axes, "y", names, _MOST_LABELS)
    _ticks(axes, "x", names, _MOST_LABELS)
    axes.set_title(title)
    axes.set_ylabel("the token that looks")
    axes.set_xlabel("the token looked at")
    return figure


def _maps() -> Any:
    return matplotlib.colormaps["Blues"].with_extremes(bad="white")


def experts(layers: Sequence[LayerFindings]) -> Figure:
    """A heat map of layers by experts: choices over the even share."""
    rows = [np.array(layer.experts, dtype=float) for layer in layers if layer.experts is not None]
    values = np.array([row * len(row) / max(row.sum(), 1) for row in rows])
    width = min(max(0.12 * values.shape[1] + 2.5, 5), 14)
    figure, axes = plt.subplots(figsize=(width, min(max(0.2 * len(rows) + 1.4, 2.2), 9)), layout="constrained")
    image = axes.imshow(values, aspect="auto", origin="lower", cmap="viridis", vmin=0)
    figure.colorbar(image, ax=axes, label="choices / even share", pad=0.01)
    _ticks(axes, "y", [str(layer.layer) for layer in layers if layer.experts is not None], 32)
    _ticks(axes, "x", [str(expert) for expert in range(values.shape[1])], _MOST_LABELS)
    axes.set_ylabel("layer")
    axes.set_xlabel("expert")
    return figure
