"""The adapter of a run: what cannot work, and where its weights come from."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert.adapters import check_shapes, config_of, fingerprint
from convert.loom_files import Checkpoint
from convert.peft_files import is_peft, read_config, read_peft
from models.adapters.config import ALL_LINEAR, BitfitConfig, Ia3Config, LoraConfig
from models.adapters.source import AdapterSource
from models.adapters.targets import sample
from models.adapters.virtual_config import PrefixConfig, PromptConfig
from models.config import ModelConfig
from parallel.materialise import TensorSource
from parallel.nf4 import BLOCK, available
from trainer import folders, virtual_adapters
from trainer.problems import Problem, nearest

if TYPE_CHECKING:  # it asks this file for its problems
    from trainer.config import RunConfig


def problems(cfg: RunConfig) -> list[Problem]:
    """Every reason why the adapter cannot be trained on this model in this layout."""
    adapter = cfg.adapter
    if adapter is None or cfg.model.size_problems() or cfg.model.compares:  # of a pair `pair_rules` tells
        return []
    if isinstance(adapter, BitfitConfig):
        return list(_without_biases(cfg.model))
    if isinstance(adapter, PromptConfig | PrefixConfig):
        return virtual_adapters.problems(cfg, adapter)
    found = list(_targets(cfg.model, adapter.targets, cfg.stage.name))
    found += _of_experts(adapter)
    if found or adapter.problems():
        return found
    if isinstance(adapter, LoraConfig):
        found += _rank(cfg.model, adapter)
        found += _four_bits(cfg, adapter) if adapter.base == "nf4" else ()
    return found + _start(cfg) if adapter.start is not None else found


def ignored(cfg: RunConfig) -> list[str]:
    """What is odd about it; one sentence each."""
    if cfg.adapter is None or cfg.init_from is not None:
        return []
    return [
        f"adapter.name={cfg.adapter.name} is trained beside fresh random weights, which stay as they are: "
        "init_from=FOLDER names a model to adapt"
    ]


def _without_biases(model: ModelConfig) -> Iterator[Problem]:
    if not (model.qkv_bias or model.attention_out_bias or model.mlp_bias):
        reason = f"trains biases, and this {model.family} model has none"
        yield Problem("adapter.name", "bitfit", reason, "adapter=lora")


def _targets(model: ModelConfig, targets: tuple[str, ...], stage: str) -> Iterator[Problem]:
    known = list(dict.fromkeys(part.name for layer in sample(model) for part in layer.parts))
    for i, name in enumerate(targets):
        key = f"adapter.targets[{i}]"
        if stage in ("ppo", "grpo") and name in (ALL_LINEAR, "kv_b_proj") and model.mla is not None:
            reason = "texts are written with kv_b_proj taken into the query, where an adapter of it has no place"
            yield Problem(key, name, reason, f"'adapter.targets=[{','.join(n for n in known if n != 'kv_b_proj')}]'")
        if name in (ALL_LINEAR, *known):
            continue
        close = nearest(name, [ALL_LINEAR, *known])
        way = f"did you mean {close[0]}?" if close else f"any of {ALL_LINEAR}, {', '.join(known)}"
        reason = "the model has no linear layer of this name"
        if model.moe is not None and name in _OF_EXPERTS:
            reason, way = "of experts it is kept as a part of another parameter", _OF_EXPERTS[name]
        elif model.moe is not None and name == "gate":
            reason = "routers take no adapter"
        yield Problem(key, name, reason, way)


_OF_EXPERTS = {
    **dict.fromkeys(("gate_proj", "up_proj", "w1", "w3", "gate_up_proj"), "experts.gate_up_proj"),
    **dict.fromkeys(("down_proj", "w2", "experts"), "experts.down_proj"),
}
"""What users may call a part of an expert, and what it is called here."""


def _of_experts(adapter: LoraConfig | Ia3Config) -> Iterator[Problem]:
    """What is not offered for experts."""
    named = [name for name in adapter.targets if name.startswith("experts.")]
    if not named:
        return
    way = f"adapter.targets without {' and '.join(named)}"
    if isinstance(adapter, Ia3Config):
        yield Problem("adapter.targets", list(adapter.targets), "ia3 has no factors for experts", way)
    elif adapter.dora:
        reason = "measures rows of linear layers, and experts are stacked"
        yield Problem("adapter.dora", True, reason, f"adapter.dora=false, or {way}")
    elif adapter.dropout:
        yield Problem("adapter.dropout", adapter.dropout, "experts' adapters have none", f"adapter.dropout=0, or {way}")
    elif adapter.init == "pissa":
        reason = "takes linear layers apart, and experts are stacked"
        yield Problem("adapter.init", "pissa", reason, f"adapter.init=zero, or {way}")


def _rank(model: ModelConfig, adapter: LoraConfig) -> list[Problem]:
    chosen = [
        (min(layer.inputs, part.outputs), part.name)
        for layer in sample(model)
        for part in layer.parts
        if part.chosen_by(adapter.targets)
    ]
    least, name = min(chosen)
    if adapter.rank <= least:
        return []
    reason = f"is more than the {least} that {name} has: an adapter of this rank is as large as the layer"
    return [Problem("adapter.rank", adapter.rank, reason, f"adapter.rank={max(1, least // 4)}")]


def _four_bits(cfg: RunConfig, adapter: LoraConfig) -> Iterator[Problem]:
    key, value, way = "adapter.base", "nf4", "adapter.base=fp32"
    if not available():
        yield Problem(key, value, "needs the package bitsandbytes", f"pip install bitsandbytes, or {way}")
    if cfg.engine.zero == 3:
        reason = "engine.zero=3 shards weights, and those in 4 bits are whole on every process"
        yield Problem(key, value, reason, f"engine.zero=2 or {way}")
    for layer in sample(cfg.model):
        inputs = layer.inputs // cfg.parallel.tp if layer.row else layer.inputs
        if inputs % BLOCK:
            name, share = layer.parts[0].name, f" on each of {cfg.parallel.tp} ranks" if inputs < layer.inputs else ""
            reason = f"packs {BLOCK} inputs together, and {name} has {inputs}{share}"
            yield Problem(key, value, reason, way)
            return


def _start(cfg: RunConfig) -> list[Problem]:
    adapter = cfg.adapter
    assert isinstance(adapter, LoraConfig | Ia3Config) and adapter.start is not None
    key, folder = "adapter.start", Path(adapter.start)
    if not is_peft(folder):
        reason = "holds no adapter_config.json" if folder.is_dir() else "there is no such folder"
        way = folders.nearby(folder) or "a folder with adapter_config.json and adapter_model.safetensors"
        return [Problem(key, adapter.start, reason, way)]
    try:
        theirs, _ = read_config(folder)
        weights = read_peft(folder, cfg.model)
        check_shapes(weights, cfg.model, folder)
    except ValueError as error:
        return [Problem(key, adapter.start, str(error), "adapter.start=null, or another adapter")]
    assert isinstance(weights.cfg, LoraConfig | Ia3Config)
    if theirs.name != adapter.name:
        return [Problem(key, adapter.start, f"is an adapter of kind {theirs.name}", f"adapter={theirs.name}")]
    own, given = vars(adapter), vars(weights.cfg)
    differ = [name for name in own if name not in ("start", "targets", "base", "dropout") and own[name] != given[name]]
    parts = [part for layer in sample(cfg.model) for part in layer.parts]
    wanted = {part.name for part in parts if part.chosen_by(adapter.targets)}
    found = [Problem(f"adapter.{n}", own[n], f"is {given[n]} in {folder}", f"adapter.{n}={given[n]}") for n in differ]
    if wanted != set(weights.cfg.targets):
        listed = f"[{','.join(weights.cfg.targets)}]"
        reason = f"the adapter in {folder} is on {', '.join(weights.cfg.targets)}"
        found.append(Problem("adapter.targets", list(adapter.targets), reason, f"'adapter.targets={listed}'"))
    return found


def weights(cfg: RunConfig, base: TensorSource, saved: Checkpoint | None) -> TensorSource:
    """The weights of a run with an adapter: the base's; the adapter's from a checkpoint, `adapter.start` or fresh."""
    assert cfg.adapter is not None
    record(cfg)
    if isinstance(cfg.adapter, PromptConfig | PrefixConfig):
        return virtual_adapters.weights(cfg, cfg.adapter, base, saved)
    start = start_of(cfg)
    begun = read_peft(Path(start), cfg.model).tensors if start is not None and saved is None else None
    return AdapterSource(base, cfg.model, cfg.adapter, cfg.run.seed, saved, begun)


def start_of(cfg: RunConfig) -> str | None:
    """The folder of the adapter that the run starts from."""
    return getattr(cfg.adapter, "start", None)


def record(cfg: RunConfig) -> dict[str, Any] | None:
    """What a checkpoint keeps to find its base again: where it is, and what it is told by; of an adapter that the run
    started from the latter."""
    if cfg.adapter is None:
        return None
    about: dict[str, Any] = {"config": dataclasses.asdict(cfg.adapter), "base": None, "seed": cfg.run.seed}
    if cfg.init_from is not None:
        about |= {"base": str(Path(cfg.init_from).absolute()), "fingerprint": _fingerprint(cfg.init_from)}
    start = start_of(cfg)
    if start is not None:
        about["start"] = _start_fingerprint(start)
    return about


@functools.lru_cache(maxsize=2)
def _fingerprint(init_from: str) -> str:
    """Taken once, at the start: the folder may be gone when the run is saved."""
    return fingerprint(folders.opened(init_from))


@functools.lru_cache(maxsize=2)
def _start_fingerprint(start: str) -> str:
    """As `_fingerprint`, of the whole adapter."""
    digest = hashlib.sha256()
    for path in sorted(Path(start).glob("adapter_model.*")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def other_adapter(cfg: RunConfig, saved: dict[str, Any] | None) -> str | None:
    """Why a run cannot go on from a checkpoint with this record; None where it can."""
    if saved is None and cfg.adapter is None:
        return None
    if saved is None or cfg.adapter is None:
        has, wants = ("an adapter", "all weights") if saved is not None else ("all weights", "an adapter")
        return f"it holds {has}, and this run trains {wants}"
    if not isinstance(config_of(saved["config"]), type(cfg.adapter)):
        return f"adapter.name: {saved['config']['name']} -> {cfg.adapter.name}"
    theirs, ours = vars(config_of(saved["config"])), vars(cfg.adapter)
    differ = [
        f"adapter.{key}: {theirs[key]} -> {ours[key]}" for key in ours if key != "start" and theirs[key] != ours[key]
    ]
    if differ:
        return "; ".join(differ)
    if (saved["base"] is None) != (cfg.init_from is None):
        return f"init_from: {saved['base']} -> {cfg.init_from}"
    if cfg.init_from is not None and _fingerprint(cfg.init_from) != saved["fingerprint"]:
        return f"the weights in init_from={cfg.init_from} are not those it was trained beside ({saved['base']})"
    return _other_start(cfg, saved)


def _other_start(cfg: RunConfig, saved: dict[str, Any]) -> str | None:
    """Where the start of the run is its reference: why that is not the start any more."""
    asked = getattr(cfg.stage, "needs_reference", False) and getattr(cfg.stage, "reference", None) is None
    start, theirs = start_of(cfg), saved["config"].get("start")
    if not asked or (start is None and theirs is None):
        return None
    if start is None or theirs is None:
        return f"adapter.start: {theirs} -> {start}, and what the run starts from is the reference"
    if saved.get("start") not in (None, _start_fingerprint(start)):
        return f"adapter.start={start} is not the adapter it started from ({theirs}), which is the reference"
    return None
