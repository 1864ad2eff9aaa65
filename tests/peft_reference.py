"""`peft` and transformers on the tiny models: what adapters must be equal to."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from convert.from_hf import whole_shapes
from convert.to_hf import export
from data.batch import MicroBatch
from models import ModelConfig, build
from models.adapters.config import LoraConfig
from models.adapters.targets import layers_of
from models.init import InitSource
from parallel.dropout import Dropout, token_keys
from parallel.sharding import SINGLE

SEED = 3


def base_folder(cfg: ModelConfig, folder: Path) -> Path:
    """The base that every test starts from, as a Hugging Face folder."""
    source = InitSource(cfg, seed=SEED)
    return export(folder, cfg, [(name, source.tensor(name)) for name in whole_shapes(cfg)])


def hf_model(folder: Path) -> Any:
    """The base in transformers, fp32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def adapted(base: Path, adapter: Path, train: bool = False) -> Any:
    """The base with an adapter that lies in a folder."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # peft only warns of tensors that are missing
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*")
        return PeftModel.from_pretrained(hf_model(base), str(adapter), is_trainable=train)


def random_adapter(base: Path, folder: Path, config: Any) -> Any:
    """An adapter made by peft, none of whose tensors is at its start, saved by peft in `folder`."""
    from peft import get_peft_model

    with torch.random.fork_rng():
        torch.manual_seed(11)  # peft draws A
        model = get_peft_model(hf_model(base), config)
    random = torch.Generator().manual_seed(11)
    for name, param in model.named_parameters():
        if param.requires_grad and "lora_A" not in name:
            spread = 0.1 * torch.randn(param.shape, generator=random)
            param.data = param.data * (1 + spread) if "magnitude" in name or "ia3" in name else 0.3 * spread
    model.save_pretrained(str(folder))
    return model


def losses_of(model: Any, batch: MicroBatch) -> torch.Tensor:
    """The sum of the token losses of packed documents, each run by itself."""
    total = torch.zeros(())
    borders = batch.cu_seqlens.tolist()
    for start, stop in pairwise(borders):
        logits = model(input_ids=batch.tokens_T[start:stop][None]).logits[0, start - stop :]  # not of virtual tokens
        total = total + torch.nn.functional.cross_entropy(
            logits.float(), batch.targets_T[start:stop], ignore_index=-100, reduction="sum"
        )
    return total


class SameDropout(torch.nn.Module):
    """In the place of peft's dropout of one layer: drops what ours drops."""

    def __init__(self, dropout: Dropout) -> None:
        super().__init__()
        self.dropout = dropout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = self.dropout.kept(x[0])
        return x if kept is None else kept.of(x)


def drop_as_ours(model: Any, cfg: ModelConfig, adapter: LoraConfig, seed: int) -> Callable[[int], None]:
    """Give peft's adapters our dropout; returns what tells it the step."""
    found: list[Dropout] = []
    for layer in layers_of(build(cfg), adapter.targets):
        for part in layer.adapted:
            dropout = Dropout(adapter.dropout, seed, layer.path, range(layer.inputs), True, SINGLE)
            model.get_submodule(f"base_model.model.{part.module}").lora_dropout["default"] = SameDropout(dropout)
            found.append(dropout)

    def enter(module: Any, given: Any, named: dict[str, Any]) -> None:
        ids = named["input_ids"][0]
        for dropout in found:
            dropout.key_T = token_keys(ids, torch.arange(len(ids)))

    def at(step: int) -> None:
        for dropout in found:
            dropout.step = step

    model.register_forward_pre_hook(enter, with_kwargs=True)
    model.train()
    return at


def train(
    model: Any,
    steps: Sequence[Sequence[MicroBatch]],
    lr: float,
    eps: float,
    at: Callable[[int], None] = lambda step: None,
) -> dict[str, Any]:
    """AdamW over the adapter alone: the loss of each step, the gradients of the first, the adapter afterwards."""
    params = {name: param for name, param in model.named_parameters() if param.requires_grad}
    optimizer = torch.optim.AdamW(params.values(), lr=lr, betas=(0.9, 0.95), eps=eps, weight_decay=0.0)
    out: dict[str, Any] = {"losses": []}
    for step, batches in enumerate(steps):
        at(step)
        count = sum(batch.num_targets for batch in batches)
        optimizer.zero_grad()
        loss = torch.stack([losses_of(model, batch) for batch in batches]).sum() / count
        loss.backward()
        out["losses"].append(float(loss.detach()))
        if "grads" not in out:
            out["grads"] = {name: param.grad.clone() for name, param in params.items() if param.grad is not None}
        optimizer.step()
    out["weights"] = {name: param.detach().clone() for name, param in params.items()}
    return out
