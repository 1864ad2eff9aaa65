"""One forward of packed documents, and one backward of their loss, with what every layer did written down.

The stream is what goes from layer to layer: L + 1 tensors [T, D], the input of the first layer and the output of each.
Hooks take it, so that the model runs as it always does. Weight gradients are measured as they are made and freed.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from models.blocks.attention import Packing
from models.blocks.moe import MoE
from models.blocks.router import Choice, Router
from models.config import ModelConfig
from models.decoder import Decoder, Layer, build
from models.inspection.reading import Reader
from models.vision.eyes import Pictures


@dataclass(frozen=True)
class Gradients:
    """Of the mean loss over the targets."""

    stream_LT: torch.Tensor
    """fp32 [L + 1, T]: L2 norm of the gradient of each token's row of each stream."""
    weights: dict[str, float]
    """L2 norm of the gradient of each parameter, by name."""


@dataclass(frozen=True)
class Recording:
    """What was written down; tensors are fp32 and no longer part of a graph."""

    tokens_T: torch.Tensor
    targets_T: torch.Tensor
    """The next token of the same document, -100 at a document's end and where the next one stands for a picture."""
    packing: Packing
    streams: tuple[torch.Tensor, ...]
    attn_update_LT: torch.Tensor
    """fp32 [L, T]: L2 norm of what attention added to each token's stream."""
    mlp_update_LT: torch.Tensor
    experts: dict[int, torch.Tensor]
    """Layers with experts: how often each expert was chosen, int64 [E]."""
    loss_T: torch.Tensor | None
    """Loss of each token in nats, 0 where there is no target; None for a model without a language-model head."""
    gradients: Gradients | None
    pictures: Pictures | None = None
    reads_BQS: torch.Tensor | None = None
    """Where learnt queries made the features: what each of a tile takes from each of its patches, rows sum to 1."""


@dataclass
class _Notes:
    """What the hooks write into."""

    packing: Packing | None = None
    live: dict[int, torch.Tensor] = field(default_factory=dict)
    """Streams by number, as autograd knows them."""
    attn: dict[int, torch.Tensor] = field(default_factory=dict)
    mlp: dict[int, torch.Tensor] = field(default_factory=dict)
    experts: dict[int, torch.Tensor] = field(default_factory=dict)

    # Hooks. A layer gets (stream, packing, ...), what is inside it (normed, residual, ...).
    def before_layer(self, index: int, _: nn.Module, args: tuple[Any, ...]) -> None:
        self.packing = args[1]
        if index == 0:
            self.after_layer(-1, _, args, args[0])

    def after_layer(self, index: int, _: nn.Module, __: tuple[Any, ...], hidden_TD: torch.Tensor) -> None:
        if hidden_TD.requires_grad:
            hidden_TD.retain_grad()
        self.live[index + 1] = hidden_TD

    def update(
        self, kept: dict[int, torch.Tensor], index: int, _: nn.Module, args: tuple[Any, ...], out: torch.Tensor
    ) -> None:
        kept[index] = (out.detach().float() - args[1].detach().float()).norm(dim=1)

    def chosen(self, index: int, router: Router, _: tuple[Any, ...], choice: Choice) -> None:
        self.experts[index] = choice.expert_Tk.flatten().bincount(minlength=router.moe.num_experts)


def record(
    model: Decoder,
    tokens_T: torch.Tensor,
    borders: Sequence[int],
    gradients: bool,
    pictures: Pictures | None = None,
    rotary_3T: torch.Tensor | None = None,
) -> Recording:
    """Run documents through a whole model.

    Args:
        model: all of it in one process (no tensor, context, expert or pipeline parallelism).
        tokens_T: int64 [T], documents one after another.
        borders: of the documents, [N + 1], from 0 to T.
        gradients: also one backward of the mean loss. The model's own `.grad` are as before afterwards.
        pictures, rotary_3T: see `Decoder.forward`.
    """
    place, cfg, chunk = model.place, model.cfg, model.chunk
    assert place.tp.size == place.cp.size == place.ep.size == 1 and chunk.embeds and chunk.heads, "a whole model"
    positions_T, targets_T = positions_and_targets(tokens_T, borders, pictures)
    count = int((targets_T >= 0).sum())
    assert not gradients or (cfg.head == "lm" and count), "a gradient needs a loss"
    notes, loss_T, found, reader = _Notes(), None, None, None
    with torch.set_grad_enabled(gradients):
        with ExitStack() as hooks:
            _listen(model, notes, hooks)
            if pictures is not None and model.connector is not None:
                reader = Reader(model.connector, hooks)
            given: dict[str, Any] = {"pictures": pictures, "rotary_3T": rotary_3T}
            if cfg.head == "lm":
                loss, loss_T = model(tokens_T, positions_T, borders, None, targets_T, 1.0 / max(count, 1), **given)
            else:
                loss = model(tokens_T, positions_T, borders, **given)
        streams = tuple(notes.live[i].detach().float().clone() for i in range(cfg.num_layers + 1))
        if gradients:
            found = _backward(model, loss, notes.live)
    assert notes.packing is not None
    attn, mlp = (torch.stack([kept[i] for i in range(cfg.num_layers)]) for kept in (notes.attn, notes.mlp))
    written = (tokens_T, targets_T, notes.packing, streams, attn, mlp, notes.experts, loss_T, found)
    if reader is None or pictures is None:
        return Recording(*written, pictures)
    rows, columns = pictures.grids[0]
    return Recording(*written, pictures, reader.weights(rows * columns))


def positions_and_targets(
    tokens_T: torch.Tensor, borders: Sequence[int], pictures: Pictures | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of packed documents, int64 [T] each. What stands for a picture is no target, as in training."""
    positions_T, targets_T = torch.empty_like(tokens_T), torch.full_like(tokens_T, -100)
    for start, stop in pairwise(borders):
        positions_T[start:stop] = torch.arange(stop - start, device=tokens_T.device)
        targets_T[start : stop - 1] = tokens_T[start + 1 : stop]
    if pictures is not None:
        behind_F = pictures.slots_F[pictures.slots_F > 0]
        targets_T[behind_F - 1] = -100
    return positions_T, targets_T


def _listen(model: Decoder, notes: _Notes, hooks: ExitStack) -> None:
    """Hook all layers; leaving `hooks` takes the hooks off (before a backward that makes layers again)."""

    for name, layer in model.layers.items():
        assert isinstance(layer, Layer)
        i = int(name)
        handles = [
            layer.register_forward_pre_hook(partial(notes.before_layer, i)),
            layer.register_forward_hook(partial(notes.after_layer, i)),
            layer.attn.register_forward_hook(partial(notes.update, notes.attn, i)),
            layer.mlp.register_forward_hook(partial(notes.update, notes.mlp, i)),
        ]
        if isinstance(layer.mlp, MoE):
            handles.append(layer.mlp.router.register_forward_hook(partial(notes.chosen, i)))
        for handle in handles:
            hooks.callback(handle.remove)


def _backward(model: Decoder, loss: torch.Tensor, live: dict[int, torch.Tensor]) -> Gradients:
    norms: dict[str, float] = {}
    own = {param: param.grad for param in model.parameters()}

    def measure(name: str, param: torch.Tensor) -> None:
        assert param.grad is not None
        norms[name] = param.grad.norm(dtype=torch.float32).item()
        param.grad = None

    with ExitStack() as hooks:
        for name, param in model.named_parameters():
            param.grad = None
            if param.requires_grad:
                handle = param.register_post_accumulate_grad_hook(lambda p, name=name: measure(name, p))
                hooks.callback(handle.remove)
        try:
            loss.backward()
        finally:
            for param, grad in own.items():
                param.grad = grad
    rows = []
    for i in sorted(live):
        grad = live[i].grad
        assert grad is not None
        rows.append(grad.float().norm(dim=1))
    return Gradients(torch.stack(rows), {name: norms.get(name, 0.0) for name, _ in model.named_parameters()})


def memory_needed(cfg: ModelConfig, tokens: int, gradients: bool, patches: int = 0) -> int:
    """Bytes that a model in fp32 and a recording of so many tokens, and patches of pictures, need at most, roughly.

    Weights; what the layers keep for the backward; streams; logits of one chunk; scores of a few heads.
    """
    params = [param.numel() for param in build(cfg).parameters()]
    ffn = cfg.intermediate_size
    if cfg.moe is not None:
        ffn = max(ffn, cfg.moe.top_k * cfg.moe.expert_size + cfg.moe.shared_size)
    kept = 8 * cfg.hidden_size + 2 * sum(cfg.qkv_parts) + 4 * ffn
    layers = cfg.num_layers if gradients else 1
    rows = tokens * (kept * layers + cfg.hidden_size * (cfg.num_layers + 1)) + 2 * min(tokens, 1024) * cfg.vocab_size
    if cfg.vision is not None:
        tower = cfg.vision.tower
        rows += patches * (10 * tower.hidden_size + 2 * tower.intermediate_size) * (tower.runs if gradients else 1)
    spare = max(params) * (2 if gradients else 1)
    return 4 * (sum(params) + spare + rows + 6 * tokens**2)
