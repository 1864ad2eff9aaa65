"""A BERT's folder as what a Q-Former's first stage starts from.

Both share attention layers, norms, words and places. The queries' feed-forwards begin as copies of the texts'; the
queries themselves, what they read features with and the heads of the stage are fresh, and so is a head over words where
the folder has none. BERT's rows that tell segments apart are left out, as in BLIP-2 (Li et al. 2023, section 3.1).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from convert.boxes import Tensors
from convert.from_hf import Folder
from convert.hf_files import read_folder
from models.config import ModelConfig
from models.rules import Concat, Rename, Rule
from models.vision.qformer_rules import both

SIZES = {
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
}
"""Ours and theirs, which have to be the same."""
HEAD = "cls.predictions."


def config_of(folder: str | Path) -> dict[str, Any] | None:
    """The config.json of a folder, if it is a BERT's."""
    try:
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return config if isinstance(config, dict) and config.get("model_type") == "bert" else None


def open_bert(model: ModelConfig, folder: str) -> tuple[Tensors, dict[str, Rule]]:
    """Its tensors, without the prefix of a model with a head, and which parameter of ours each of them makes.

    Raises:
        ValueError: it is of other sizes, or has another activation.
    """
    config = config_of(folder)
    assert config is not None
    differ = [
        f"{theirs} is {config.get(theirs)} against model.{ours}={getattr(model, ours)}"
        for ours, theirs in SIZES.items()
        if config.get(theirs) != getattr(model, ours)
    ]
    if config.get("hidden_act", "gelu") != "gelu":
        differ.append(f"hidden_act is {config['hidden_act']} and can be gelu only")
    if differ:
        raise ValueError(f"{folder} holds another BERT: {', '.join(differ)}")
    stored = {name.removeprefix("bert."): tensor for name, tensor in read_folder(folder).items()}
    rules = {rule.ours: rule for rule in bert_rules(model)}
    held = {ours: rule for ours, rule in rules.items() if HEAD not in rule.sources[0] or rule.sources[0] in stored}
    return Folder(stored), held


def bert_rules(cfg: ModelConfig) -> Iterator[Rule]:
    """Where the parameters lie that a BERT has."""
    yield Rename("text.words.weight", "embeddings.word_embeddings.weight")
    yield Rename("text.positions.weight", "embeddings.position_embeddings.weight")
    yield from both("connector.body.norm", "embeddings.LayerNorm")
    for i in range(cfg.num_layers):
        own, theirs = f"connector.body.layers.{i}.", f"encoder.layer.{i}."
        inner = f"{theirs}attention.self."
        yield from both(f"{own}attn.q", f"{inner}query")
        for kind in ("weight", "bias"):
            parts = (f"{inner}key.{kind}", f"{inner}value.{kind}")
            yield Concat(f"{own}attn.kv.{kind}", parts, (cfg.hidden_size,) * 2)
        yield from both(f"{own}attn.out", f"{theirs}attention.output.dense")
        yield from both(f"{own}attn_norm", f"{theirs}attention.output.LayerNorm")
        for side in (own, f"text.layers.{i}."):
            yield from both(f"{side}mlp.up", f"{theirs}intermediate.dense")
            yield from both(f"{side}mlp.down", f"{theirs}output.dense")
            yield from both(f"{side}mlp_norm", f"{theirs}output.LayerNorm")
    yield from both("text.head.dense", f"{HEAD}transform.dense")
    yield from both("text.head.norm", f"{HEAD}transform.LayerNorm")
    yield Rename("text.head.bias", f"{HEAD}bias")
