"""Adapters in the format of the `peft` package: adapter_config.json beside adapter_model.safetensors.

`peft` has no BitFit. PiSSA's adapters are written as `peft` itself converts them: of twice the rank beside the model as
it was, so that whoever loads them needs no other base.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from convert.adapters import AdapterWeights, adapted_layers
from convert.peft_experts import expert_names, flattened, is_expert, stacked, targeted, unwrapped, wrapped
from convert.stored import read_header
from convert.virtual import KINDS, read_virtual, virtual_config, write_virtual
from models.adapters.config import AdapterConfig, Ia3Config, LoraConfig
from models.adapters.names import Key, Kind, parameters
from models.adapters.targets import Part
from models.adapters.virtual_config import PrefixConfig, PromptConfig
from models.config import ModelConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
SUFFIX: dict[Kind, str] = {
    "a": "lora_A.weight",
    "b": "lora_B.weight",
    "magnitude": "lora_magnitude_vector",
    "factor": "ia3_l",
}


def is_peft(folder: Path) -> bool:
    """Whether a folder holds an adapter in this format."""
    return (folder / CONFIG).is_file()


def write_peft(folder: Path, model: ModelConfig, adapter: AdapterWeights, base: str) -> None:
    """Write an adapter of `model`; `base` names the model it belongs to.

    Raises:
        ValueError: the format has no such adapter.
    """
    if isinstance(adapter.cfg, PromptConfig | PrefixConfig):
        write_virtual(folder, model, adapter, base)
        return
    if not isinstance(adapter.cfg, LoraConfig | Ia3Config):
        raise ValueError("peft has no format for adapter.name=bitfit; export the full weights instead")
    folder.mkdir(parents=True, exist_ok=True)
    written: dict[str, torch.Tensor] = {}
    experts = expert_names(key.module for key in adapter.tensors)
    for key, tensor in adapter.tensors.items():
        if key.kind in SUFFIX:
            module = wrapped(key.module, experts)
            written[f"{PREFIX}{module}.{SUFFIX[key.kind]}"] = _theirs(adapter, key, tensor, model)
    written |= {f"{PREFIX}{hf}": tensor.contiguous() for hf, tensor in adapter.others.items() if hf == "score.weight"}
    save_file(written, folder / WEIGHTS, metadata={"format": "pt"})
    text = json.dumps(_config(model, adapter, base), indent=2, sort_keys=True)
    (folder / CONFIG).write_text(text + "\n")


def _theirs(adapter: AdapterWeights, key: Key, tensor: torch.Tensor, model: ModelConfig) -> torch.Tensor:
    if key.kind == "factor":
        rows = {part.module for layer in adapted_layers(model, adapter.cfg) if layer.row for part in layer.adapted}
        return tensor[None].contiguous() if key.module in rows else tensor[:, None].contiguous()
    if tensor.ndim == 3:
        return flattened(key.kind, tensor)
    start = adapter.tensors.get(Key(key.module, "start_a" if key.kind == "a" else "start_b"))
    if start is not None and key.kind == "a":
        return torch.cat([tensor, start])
    return torch.cat([tensor, -start], 1) if start is not None else tensor.contiguous()


def _config(model: ModelConfig, adapter: AdapterWeights, base: str) -> dict[str, Any]:
    every = {key.module for key in adapter.tensors}
    experts = expert_names(every)
    modules = sorted(module for module in every if not is_expert(module))
    # Names alone would also choose the shared experts of a mixture, which have no adapters.
    targets = modules if model.moe is not None else sorted({module.rpartition(".")[2] for module in modules})
    found: dict[str, Any] = {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": ["score"] if model.head == "scalar" else None,
        "target_modules": targets,
        "task_type": "SEQ_CLS" if model.head == "scalar" else "CAUSAL_LM",
    }
    if experts:
        found["target_parameters"] = [f"mlp.experts.{name}" for name in experts]
    cfg = adapter.cfg
    if isinstance(cfg, LoraConfig):
        twice = 2 if cfg.init == "pissa" else 1
        alpha = cfg.alpha * (math.sqrt(twice) if cfg.rank_stabilized else twice)
        about = {"peft_type": "LORA", "r": twice * cfg.rank, "lora_alpha": int(alpha) if alpha == int(alpha) else alpha}
        about |= {
            "use_rslora": cfg.rank_stabilized,
            "use_dora": cfg.dora,
            "lora_dropout": cfg.dropout,
            "init_lora_weights": True,
        }
        return found | about
    del found["bias"]
    rows = {part.name for layer in adapted_layers(model, cfg) if layer.row for part in layer.adapted}
    return found | {"peft_type": "IA3", "feedforward_modules": sorted(rows), "init_ia3_weights": True}


def read_config(folder: Path) -> tuple[AdapterConfig, dict[str, Any]]:
    """What an adapter is, without its targets, and adapter_config.json as it is.

    Raises:
        ValueError: it cannot be read, or is of a kind that is not here.
    """
    try:
        about = json.loads((folder / CONFIG).read_text())
        kind = about["peft_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} holds no adapter in peft's format: {CONFIG}: {error}") from error
    if kind == "IA3":
        return Ia3Config(), about
    if kind in KINDS:
        return virtual_config(folder, about), about
    if kind != "LORA":
        read = ", ".join(("LORA", "IA3", *KINDS))
        raise ValueError(f"{folder} holds an adapter of kind {kind}; read are {read}")
    unread = {key: about.get(key) for key in ("rank_pattern", "alpha_pattern", "layer_replication")}
    unread |= {key: about.get(key) for key in ("lora_bias", "fan_in_fan_out", "trainable_token_indices", "use_qalora")}
    unread["bias"] = about.get("bias") if about.get("bias") != "none" else None
    init = about.get("init_lora_weights")
    if isinstance(init, str) and init.startswith(("pissa", "olora", "corda", "loftq")):
        unread["init_lora_weights"] = (
            f"{init}, which changed the base; save it with path_initial_model_for_weight_conversion"
        )
    told = [f"{key}={value}" for key, value in unread.items() if value]
    if told:
        raise ValueError(f"{folder} uses what is not read here: {', '.join(told)}")
    cfg = LoraConfig(
        rank=int(about["r"]),
        alpha=float(about["lora_alpha"]),
        rank_stabilized=bool(about.get("use_rslora")),
        dora=bool(about.get("use_dora")),
    )
    return cfg, about


def read_peft(folder: Path, model: ModelConfig) -> AdapterWeights:
    """An adapter that `peft` wrote, for `model`; its shapes are compared when it is merged or trained.

    Raises:
        ValueError: it cannot be read, is of a kind that is not here, or was made for another model.
    """
    cfg, about = read_config(folder)
    experts = targeted(about.get("target_parameters") or ())
    if not (folder / WEIGHTS).is_file():
        raise ValueError(f"{folder} has no {WEIGHTS}; adapters in other files are not read")
    if isinstance(cfg, PromptConfig | PrefixConfig):
        return AdapterWeights(cfg, *read_virtual(folder, model, cfg))
    kinds: dict[str, Kind] = {suffix: kind for kind, suffix in SUFFIX.items()}
    tensors: dict[Key, torch.Tensor] = {}
    others: dict[str, torch.Tensor] = {}
    for name, stored in read_header(folder / WEIGHTS).items():
        suffix = next((each for each in kinds if name.endswith(f".{each}")), None)
        module = unwrapped(name.removeprefix(PREFIX).removesuffix(f".{suffix}"), experts)
        if suffix is not None:
            value = stored.read().float()
            if is_expert(module):
                value = stacked(kinds[suffix], value, getattr(cfg, "rank", 1))
            tensors[Key(module, kinds[suffix])] = value.flatten() if kinds[suffix] == "factor" else value
        elif name == f"{PREFIX}score.weight":
            others["score.weight"] = stored.read().float()
        else:
            raise ValueError(f"{folder / WEIGHTS} holds {name}, for which there is no place")
    names = sorted({Part(key.module, 0).name for key in tensors})
    cfg = type(cfg)(**{**vars(cfg), "targets": tuple(names)})
    expected = {key for param in parameters(adapted_layers(model, cfg), cfg) for key in param.keys}
    wrong = sorted(f"{key.module} ({key.kind})" for key in expected ^ tensors.keys())
    if wrong or not tensors:
        reason = (
            f"{len(wrong)} tensors are missing or have no place, first {', '.join(wrong[:3])}" if wrong else "is empty"
        )
        raise ValueError(f"the adapter in {folder} is not one of this model with the same layers everywhere: {reason}")
    return AdapterWeights(cfg, tensors, others)
