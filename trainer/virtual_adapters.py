"""Virtual tokens of a run (prompt and prefix tuning): what cannot work, and what they begin with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from convert.loom_files import Checkpoint
from convert.peft_files import is_peft, read_config, read_peft
from data.tokenizer import load_tokenizer
from models.adapters.virtual import VirtualSource
from models.adapters.virtual_config import PrefixConfig, PromptConfig, VirtualConfig
from parallel.materialise import TensorSource
from trainer import folders
from trainer.problems import Problem

if TYPE_CHECKING:  # it asks this file for its problems
    from trainer.config import RunConfig


def problems(cfg: RunConfig, adapter: VirtualConfig) -> list[Problem]:
    """Every reason why these virtual tokens cannot be trained in this run."""
    if adapter.problems():
        return []
    found = [*_length(cfg, adapter), *_layout(cfg, adapter), *_model(cfg, adapter)]
    if adapter.start is not None and not found:
        found += _start(cfg, adapter, adapter.start)
    return found


def _length(cfg: RunConfig, adapter: VirtualConfig) -> Iterator[Problem]:
    wanted, most = cfg.data.seq_len, cfg.model.max_seq_len
    if wanted <= most < wanted + adapter.tokens:
        reason = (
            f"stand before every document, and with those of data.seq_len={wanted} the positions reach beyond "
            f"model.max_seq_len={most}"
        )
        ways = [f"data.seq_len={most - adapter.tokens}"] * (adapter.tokens < most)
        ways += [f"adapter.tokens={most - wanted}"] * (wanted < most)
        yield Problem("adapter.tokens", adapter.tokens, reason, " or ".join(ways) or "adapter.tokens=20")


def _layout(cfg: RunConfig, adapter: VirtualConfig) -> Iterator[Problem]:
    if cfg.parallel.cp > 1:
        reason = f"adapter.name={adapter.name} puts tokens before every document, which context parallel cuts"
        yield Problem("parallel.cp", cfg.parallel.cp, reason, "parallel.cp=1, or adapter=lora")
    if cfg.engine.attention == "flash_attn" and isinstance(adapter, PrefixConfig):
        reason = "its kernel knows no keys that all documents share, as those of adapter.name=prefix"
        yield Problem("engine.attention", "flash_attn", reason, "engine.attention=sdpa, or adapter=prompt")


def _model(cfg: RunConfig, adapter: VirtualConfig) -> Iterator[Problem]:
    key, name = "adapter.name", adapter.name
    if isinstance(adapter, PrefixConfig) and cfg.model.mla is not None:
        reason = "gives each layer keys and values, and latent attention (model.mla) keeps none"
        yield Problem(key, name, reason, "adapter=prompt or adapter=lora")
    if isinstance(adapter, PromptConfig) and cfg.model.moe is not None:
        reason = "puts tokens before every document, and the routers of model.moe would count and balance them too"
        yield Problem(key, name, reason, "adapter=prefix or adapter=lora" if cfg.model.mla is None else "adapter=lora")
    if isinstance(adapter, PromptConfig) and getattr(cfg.model, "vision", None) is not None:
        reason = "puts tokens before every document, and pictures are found by where their tokens stand"
        yield Problem(key, name, reason, "adapter=prefix or adapter=lora")


def _start(cfg: RunConfig, adapter: VirtualConfig, start: str) -> list[Problem]:
    key, folder = "adapter.start", Path(start)
    if not is_peft(folder):
        reason = "holds no adapter_config.json" if folder.is_dir() else "there is no such folder"
        way = folders.nearby(folder) or "a folder with adapter_config.json and adapter_model.safetensors"
        return [Problem(key, start, reason, way)]
    try:
        theirs, _ = read_config(folder)
        if theirs.name == adapter.name:
            read_peft(folder, cfg.model)
    except ValueError as error:
        return [Problem(key, start, str(error), "adapter.start=null, or another adapter")]
    if not isinstance(theirs, type(adapter)):
        return [Problem(key, start, f"is an adapter of kind {theirs.name}", f"adapter={theirs.name}")]
    if theirs.tokens != adapter.tokens:
        reason = f"is {theirs.tokens} in {folder}"
        return [Problem("adapter.tokens", adapter.tokens, reason, f"adapter.tokens={theirs.tokens}")]
    return []


def weights(cfg: RunConfig, adapter: VirtualConfig, base: TensorSource, saved: Checkpoint | None) -> VirtualSource:
    """The weights of a run with virtual tokens: the base's; theirs from a checkpoint, `adapter.start` or fresh.

    Raises:
        ValueError: `adapter.init_text` has no tokens the model knows.
    """
    if saved is not None:
        return VirtualSource(base, cfg.model, adapter, cfg.run.seed, saved)
    if adapter.start is not None:
        begun = {key.module: tensor for key, tensor in read_peft(Path(adapter.start), cfg.model).tensors.items()}
        return VirtualSource(base, cfg.model, adapter, cfg.run.seed, start=begun)
    return VirtualSource(base, cfg.model, adapter, cfg.run.seed, words=_words(cfg, adapter))


def _words(cfg: RunConfig, adapter: VirtualConfig) -> list[int]:
    if not isinstance(adapter, PromptConfig) or adapter.init_text is None:
        return []
    assert cfg.data.tokenizer is not None, "a run without a tokenizer is refused before the start"
    tokenizer = load_tokenizer(cfg.data.tokenizer, "data.tokenizer")
    words = tokenizer(adapter.init_text, add_special_tokens=False)["input_ids"]
    if not words or max(words) >= cfg.model.vocab_size:
        reason = "has no tokens" if not words else f"has token {max(words)}, and the model {cfg.model.vocab_size}"
        raise ValueError(
            f"adapter.init_text={adapter.init_text!r} {reason}; give another text, or adapter.tokens_init=vocab"
        )
    return words


def told(cfg: RunConfig) -> list[str]:
    """How the text that prompt tuning begins with fits; at most one sentence."""
    adapter = cfg.adapter
    if not isinstance(adapter, PromptConfig) or adapter.init_text is None or adapter.start is not None:
        return []
    count = len(_words(cfg, adapter))
    if count == adapter.tokens:
        return []
    how = "its end is cut off" if count > adapter.tokens else "it is repeated"
    return [f"adapter.init_text has {count} tokens and adapter.tokens={adapter.tokens}: {how}"]
