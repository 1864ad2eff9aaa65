"""Put adapters on a decoder: its own parameters are frozen, the adapters' are trained."""

from __future__ import annotations

from models.adapters.config import AdapterConfig, BitfitConfig, LoraConfig
from models.adapters.experts import adapted_experts
from models.adapters.ia3 import Factors, scaled
from models.adapters.lora import LowRank, adapted
from models.adapters.targets import expert_layers, layers_of, linears, stacks
from models.blocks.moe import Experts
from models.decoder import Decoder
from models.heads import ScalarHead


def attach(model: Decoder, cfg: AdapterConfig) -> None:
    """Give a decoder on the meta device, or a chunk of one, its adapters.

    Trained are the adapters (of BitFit the biases) and a scalar head, which a language model does not bring. Parameters
    keep their names; those of an adapter are `<layer>.adapter.<…>`.
    """
    model.requires_grad_(False)
    if isinstance(model.head, ScalarHead):
        model.head.requires_grad_(True)
    if isinstance(cfg, BitfitConfig):
        for name, param in model.named_parameters():
            param.requires_grad_(param.requires_grad or name.endswith(".bias"))
        return
    if isinstance(cfg, LoraConfig):
        for path, base in list(stacks(model)):
            _attach_to_experts(model, path, base, cfg)
    plain = dict(linears(model))
    for layer in layers_of(model, cfg.targets):
        if layer.experts:
            continue
        above, _, name = layer.path.rpartition(".")
        base = plain[layer.path]
        if isinstance(cfg, LoraConfig):
            if layer.chosen or cfg.base == "nf4":
                low_rank = LowRank(layer, base, cfg, model.place) if layer.chosen else None
                setattr(model.get_submodule(above), name, adapted(base, low_rank, cfg.base == "nf4"))
        elif layer.chosen:
            setattr(model.get_submodule(above), name, scaled(base, Factors(layer, base, model.place)))


def _attach_to_experts(model: Decoder, path: str, base: Experts, cfg: LoraConfig) -> None:
    kinds = {layer.path.rpartition(".")[2]: layer for layer in expert_layers(path, base, cfg.targets)}
    if cfg.base == "nf4" or any(layer.chosen for layer in kinds.values()):
        above, _, name = path.rpartition(".")
        setattr(model.get_submodule(above), name, adapted_experts(base, kinds, cfg))


def ask_for_input_gradients(model: Decoder) -> None:
    """Have the backward go down to the hidden states that enter the first layer, below which nothing is trained.

    DeepSpeed's ZeRO-3 takes the gradients of a layer when that of its input is there, and too early where none is made.
    """
    if model.embed is not None:
        model.embed.register_forward_hook(lambda module, given, hidden: hidden.requires_grad_())
