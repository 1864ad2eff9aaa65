"""Virtual tokens as a whole, and in the format of the `peft` package: one flat tensor `prompt_embeddings`.

Prompt tuning has it as [P, D]. Prefix tuning has it as [P, L x 2 x G x K]: keys and values of each layer in turn. Keys
are kept as a cache has them, normed and rotated, by `peft` and by us.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from convert.stored import read_header
from models.adapters.names import Key
from models.adapters.virtual import EMBEDDINGS, virtual_shapes
from models.adapters.virtual_config import PrefixConfig, PromptConfig, VirtualConfig
from models.config import ModelConfig

if TYPE_CHECKING:  # it asks this file what to do with virtual tokens
    from convert.adapters import AdapterWeights

CONFIG, WEIGHTS, FLAT = "adapter_config.json", "adapter_model.safetensors", "prompt_embeddings"
KINDS: dict[str, type[VirtualConfig]] = {"PROMPT_TUNING": PromptConfig, "PREFIX_TUNING": PrefixConfig}
HEAD = "base_model.score.weight"
"""How `peft` names the scalar head beside virtual tokens, whose base model is not wrapped."""


def is_virtual(cfg: object) -> bool:
    """Whether an adapter is one of virtual tokens, which no weights can hold."""
    return isinstance(cfg, PromptConfig | PrefixConfig)


def virtual_keys(model: ModelConfig, cfg: VirtualConfig) -> dict[str, Key]:
    """The key of each of our parameters of virtual tokens."""
    return {name: Key(name, "virtual") for name in virtual_shapes(model, cfg)}


def not_merged(cfg: VirtualConfig) -> ValueError:
    """What to raise where full weights are asked for."""
    return ValueError(
        f"adapter.name={cfg.name} trains {cfg.tokens} virtual tokens, which stand before every document and are no "
        "part of any weight: they cannot be folded in. Keep them beside their base: "
        "python convert/export_adapter.py RUN OUT writes them for peft, scripts/infer.py and scripts/chat.py take the "
        f"run, and a new one starts from them with init_from=BASE adapter={cfg.name} adapter.start=OUT"
    )


def flat(model: ModelConfig, cfg: VirtualConfig, tensors: Mapping[Key, torch.Tensor]) -> torch.Tensor:
    """Virtual tokens as `peft` has them, fp32 [P, …]."""
    if isinstance(cfg, PromptConfig):
        return tensors[Key(EMBEDDINGS, "virtual")].float().contiguous()
    return torch.cat([tensors[Key(name, "virtual")].float().t() for name in _by_layer(model)], 1).contiguous()


def by_our_names(model: ModelConfig, cfg: VirtualConfig, whole: torch.Tensor) -> dict[Key, torch.Tensor]:
    """The inverse of `flat`."""
    if isinstance(cfg, PromptConfig):
        return {Key(EMBEDDINGS, "virtual"): whole}
    parts = whole.chunk(2 * model.num_layers, 1)
    return {Key(name, "virtual"): x.t().contiguous() for name, x in zip(_by_layer(model), parts, strict=True)}


def _by_layer(model: ModelConfig) -> list[str]:
    kinds = ("keys", "values")
    return [f"layers.{layer}.attn.prefix.{kind}" for layer in range(model.num_layers) for kind in kinds]


def _columns(model: ModelConfig, cfg: VirtualConfig) -> int:
    if isinstance(cfg, PromptConfig):
        return model.hidden_size
    return 2 * model.num_layers * model.num_kv_heads * model.head_dim


def write_virtual(folder: Path, model: ModelConfig, adapter: AdapterWeights, base: str) -> None:
    """Write virtual tokens of `model` as `peft` does; `base` names the model they belong to."""
    cfg = adapter.cfg
    assert isinstance(cfg, PromptConfig | PrefixConfig)
    folder.mkdir(parents=True, exist_ok=True)
    written = {FLAT: flat(model, cfg, adapter.tensors)}
    if "score.weight" in adapter.others:
        written[HEAD] = adapter.others["score.weight"].contiguous()
    save_file(written, folder / WEIGHTS, metadata={"format": "pt"})
    prompt = isinstance(cfg, PromptConfig)
    heads = (
        (model.num_heads, model.hidden_size) if prompt else (model.num_kv_heads, model.num_kv_heads * model.head_dim)
    )
    about: dict[str, Any] = {
        "base_model_name_or_path": base,
        "inference_mode": True,
        "modules_to_save": ["score"] if model.head == "scalar" else None,
        "num_attention_heads": heads[0],
        "num_layers": model.num_layers,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": cfg.tokens,
        "peft_type": next(kind for kind, made in KINDS.items() if isinstance(cfg, made)),
        "task_type": "SEQ_CLS" if model.head == "scalar" else "CAUSAL_LM",
        "token_dim": heads[1],
    }
    # The text that embeddings began with is not told: `peft` would ask for its tokenizer, and loads what was learnt.
    about |= (
        {"prompt_tuning_init": "RANDOM"} if prompt else {"encoder_hidden_size": heads[1], "prefix_projection": False}
    )
    (folder / CONFIG).write_text(json.dumps(about, indent=2, sort_keys=True) + "\n")


def virtual_config(folder: Path, about: Mapping[str, Any]) -> VirtualConfig:
    """What adapter_config.json says of virtual tokens.

    Raises:
        ValueError: they are of a kind that is not here.
    """
    if about.get("num_transformer_submodules") not in (None, 1):
        raise ValueError(
            f"{folder} holds virtual tokens of an encoder and a decoder; read are those of a decoder alone"
        )
    try:
        return KINDS[about["peft_type"]](tokens=int(about["num_virtual_tokens"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder} holds no adapter in peft's format: {CONFIG}: {error}") from error


def read_virtual(
    folder: Path, model: ModelConfig, cfg: VirtualConfig
) -> tuple[dict[Key, torch.Tensor], dict[str, torch.Tensor]]:
    """Virtual tokens that `peft` wrote, also those that it made with an MLP, and what was trained beside them.

    Raises:
        ValueError: they cannot be read, or were made for another model.
    """
    stored = read_header(folder / WEIGHTS)
    for name in stored:
        if name not in (FLAT, HEAD):
            raise ValueError(f"{folder / WEIGHTS} holds {name}, for which there is no place")
    if FLAT not in stored:
        raise ValueError(f"{folder / WEIGHTS} holds no {FLAT}")
    whole, wanted = stored[FLAT].read().float(), (cfg.tokens, _columns(model, cfg))
    if tuple(whole.shape) != wanted:
        raise ValueError(
            f"the adapter in {folder} does not belong to the model: {FLAT} has shape {list(whole.shape)}, and "
            f"{cfg.tokens} virtual tokens of the model are {list(wanted)}"
        )
    others = {"score.weight": stored[HEAD].read().float()} if HEAD in stored else {}
    return by_our_names(model, cfg, whole), others
