"""Put adapters on a decoder: its own parameters are frozen, the adapters' are trained."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from models.adapters.config import AdapterConfig, BitfitConfig, Ia3Config, LoraConfig
from models.adapters.experts import adapted_experts
from models.adapters.ia3 import Factors, scaled
from models.adapters.lora import LowRank, adapted
from models.adapters.targets import Layer, Linear, expert_layers, layers_of, linears, stacks
from models.adapters.virtual import attach_virtual
from models.adapters.virtual_config import PrefixConfig, PromptConfig
from models.blocks.moe import Experts
from models.decoder import Decoder
from models.heads import ScalarHead
from parallel.dropout import Dropout
from parallel.layers import RowLinear
from parallel.sharding import Place, belong_to_base, is_kept


def attach(model: Decoder, cfg: AdapterConfig, seed: int = 0) -> None:
    """Give a decoder on the meta device, or a chunk of one, its adapters. Their dropout follows from `seed`.

    Trained are the adapters (of BitFit the biases) and a scalar head, which a language model does not bring. Parameters
    keep their names; those of an adapter are `<layer>.adapter.<…>`.
    """
    layers = layers_of(model, cfg.targets) if isinstance(cfg, LoraConfig | Ia3Config) else []
    model.requires_grad_(False)
    idle = [param for param in model.parameters() if is_kept(param)]
    for param in idle:
        belong_to_base(param)
    if isinstance(model.head, ScalarHead):
        model.head.requires_grad_(True)
    if isinstance(cfg, BitfitConfig):
        for name, param in model.named_parameters():
            param.requires_grad_(param.requires_grad or name.endswith(".bias"))
        for param in idle:
            param.requires_grad_(False)
        return
    if isinstance(cfg, LoraConfig):
        for path, base in list(stacks(model)):
            _attach_to_experts(model, path, base, cfg)
    if isinstance(cfg, PromptConfig | PrefixConfig):
        attach_virtual(model, cfg)
        return
    plain = dict(linears(model))
    for layer in layers:
        if layer.experts:
            continue
        above, _, name = layer.path.rpartition(".")
        base = plain[layer.path]
        if isinstance(cfg, LoraConfig):
            if layer.chosen or cfg.base == "nf4":
                low_rank = LowRank(layer, base, cfg, model.place) if layer.chosen else None
                dropout = _dropout(layer, base, cfg, model.place, seed) if layer.chosen and cfg.dropout else None
                setattr(model.get_submodule(above), name, adapted(base, low_rank, cfg.base == "nf4", dropout))
        elif layer.chosen:
            setattr(model.get_submodule(above), name, scaled(base, Factors(layer, base, model.place)))
    _name_tokens_to_dropouts(model)


def _dropout(layer: Layer, base: Linear, cfg: LoraConfig, place: Place, seed: int) -> Dropout | None:
    if not layer.path.startswith("layers."):  # its rows are patches, and no token tells them apart
        return None
    local, row = base.weight.shape[1], isinstance(base, RowLinear)
    first = place.tp.rank * local if row else 0
    return Dropout(cfg.dropout, seed, layer.path, range(first, first + local), not row, place)


def _name_tokens_to_dropouts(model: Decoder) -> None:
    """Have every layer tell its dropouts the tokens when it is entered, also to be made again in the backward."""
    for layer in model.layers.values():
        dropouts = [module for module in layer.modules() if isinstance(module, Dropout)]
        if dropouts:
            layer.register_forward_pre_hook(functools.partial(_enter, dropouts))


def _enter(dropouts: list[Dropout], layer: nn.Module, given: tuple[Any, ...]) -> None:
    if layer.training and torch.is_grad_enabled():
        for dropout in dropouts:
            dropout.key_T = given[2].key_T


def _attach_to_experts(model: Decoder, path: str, base: Experts, cfg: LoraConfig) -> None:
    kinds = {layer.path.rpartition(".")[2]: layer for layer in expert_layers(path, base, cfg.targets)}
    if cfg.base == "nf4" or any(layer.chosen for layer in kinds.values()):
        above, _, name = path.rpartition(".")
        setattr(model.get_submodule(above), name, adapted_experts(base, kinds, cfg))


def ask_for_input_gradients(model: Decoder) -> None:
    """Have the backward go down to the hidden states that enter the first layer, below which nothing is trained.

    Routers count there, in the first layers too. DeepSpeed's ZeRO-3 takes the gradients of a layer when that of its
    input is there, and too early where none is made.
    """
    if model.embed is not None:
        model.embed.register_forward_hook(lambda module, given, hidden: hidden.requires_grad_())
