"""BLIP-2 as it is after the Q-Former's own first stage (Li et al. 2023, section 3.2): tower and Q-Former with its text
side, without a decoder. Hugging Face's Blip2ForImageTextRetrieval, which compares and matches; with another tower than
BLIP-2's own (`vision.format` loom) the same names, and a config.json of type `loom_vlm`.

Writing needs a head over the words that its folders do not have, and training a temperature: they are written beside,
under BERT's and CLIP's names, and fresh where a folder lacks them.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from models.blip2 import QFORMER, parts_of, sections_of
from models.config import ModelConfig, Problem
from models.hf_config import required
from models.llava import canonical, images_of
from models.rules import Rename, Rule, Scalar, Tie, Unused
from models.seeing import LOOM, always, vision_in, vision_out
from models.vision.config import QFormerConfig, VisionConfig
from models.vision.qformer_rules import both, qformer_rules
from models.vision.rules import tower_rules

__all__ = ["canonical", "from_hf_config", "may_lack", "problems", "rules", "to_hf_config"]

TEXT: dict[str, Any] = QFORMER | {"vocab_size": 30522, "max_position_embeddings": 512, "initializer_range": 0.02}
ARCHITECTURE = "Blip2ForImageTextRetrieval"
HEAD = "cls.predictions."


def is_pair(config: Mapping[str, Any]) -> bool:
    """Whether a config.json of type `blip-2` or `loom_vlm` is that of such a model."""
    return ARCHITECTURE in (config.get("architectures") or ())


def from_hf_config(config: Mapping[str, Any]) -> ModelConfig:
    """Our sizes from the content of a config.json."""
    if config["model_type"] == LOOM:
        vision = vision_in(config)
        text = TEXT | dict(required(config, "text_config"))
    else:
        tower, own = parts_of(config)
        vision = VisionConfig("blip2_itm", tower, own, images_of(config, mode="fixed", fit="squash"))
        text = TEXT | dict(config["qformer_config"])
    own = vision.connector
    assert isinstance(own, QFormerConfig)
    return ModelConfig(
        family="bert",
        vocab_size=text["vocab_size"],
        hidden_size=own.hidden_size,
        intermediate_size=own.intermediate_size,
        num_layers=own.num_layers,
        num_heads=own.num_heads,
        num_kv_heads=own.num_heads,
        head_dim=own.hidden_size // own.num_heads,
        max_seq_len=text["max_position_embeddings"],
        norm_eps=own.norm_eps,
        init_std=float(text["initializer_range"]),
        vision=vision,
    )


def to_hf_config(cfg: ModelConfig) -> dict[str, Any]:
    """The content of a config.json."""
    assert cfg.vision is not None
    text = {
        "vocab_size": cfg.vocab_size,
        "max_position_embeddings": cfg.max_seq_len,
        "initializer_range": cfg.init_std,
    }
    if cfg.vision.format == "loom":
        sections = {"text_config": {"model_type": "bert"} | text} | vision_out(cfg.vision)
        return {"model_type": LOOM, "architectures": [ARCHITECTURE]} | sections
    sections = sections_of(cfg.vision)
    sections["qformer_config"] |= {"use_qformer_text_input": True} | text
    return {"model_type": "blip-2", "architectures": [ARCHITECTURE]} | sections


def rules(cfg: ModelConfig) -> Iterator[Rule | Tie | Unused]:
    """Every tensor of the model."""
    assert cfg.vision is not None and isinstance(cfg.vision.connector, QFormerConfig)
    yield from tower_rules(cfg.vision.tower, "vision_model.")
    yield from qformer_rules(cfg.vision.connector)
    yield Rename("text.words.weight", "embeddings.word_embeddings.weight")
    yield Rename("text.positions.weight", "embeddings.position_embeddings.weight")
    for i in range(cfg.num_layers):
        own, theirs = f"text.layers.{i}.", f"qformer.encoder.layer.{i}."
        yield from both(f"{own}mlp.up", f"{theirs}intermediate.dense")
        yield from both(f"{own}mlp.down", f"{theirs}output.dense")
        yield from both(f"{own}mlp_norm", f"{theirs}output.LayerNorm")
    yield from both("text.match", "itm_head")
    yield from both("text.image_proj", "vision_projection")
    yield from both("text.text_proj", "text_projection")
    yield from both("text.head.dense", f"{HEAD}transform.dense")
    yield from both("text.head.norm", f"{HEAD}transform.LayerNorm")
    yield Rename("text.head.bias", f"{HEAD}bias")
    yield Tie("text.words.weight", f"{HEAD}decoder.weight")
    yield Scalar("text.temperature.scale", "logit_scale")


def may_lack(hf: str) -> bool:
    """Whether a folder need not have a tensor, which is fresh then."""
    return hf.startswith(HEAD) or hf == "logit_scale"


def problems(cfg: ModelConfig) -> list[Problem]:
    """Settings that its checkpoints cannot express, or the text side cannot be."""
    vision = cfg.vision
    assert vision is not None
    fixed: dict[str, Any] = {"connector.name": "qformer", "images.mode": "fixed"}
    if vision.format == "blip2_itm":
        fixed |= {"tower.kind": "blip2", "tower.feature_layer": -1, "tower.final_norm": True, "tower.keep_class": True}
    found = always(cfg, fixed)
    if not isinstance(vision.connector, QFormerConfig):
        return found
    shared = ("hidden_size", "intermediate_size", "num_layers", "num_heads", "norm_eps")
    for key in shared:
        ours, theirs = getattr(cfg, key), getattr(vision.connector, key)
        if ours != theirs:
            reason = f"is not model.vision.connector.{key}={theirs}, and texts and queries share their layers"
            found.append((key, ours, reason, f"model.{key}={theirs}"))
    if cfg.num_kv_heads != cfg.num_heads:
        way = f"model.num_kv_heads={cfg.num_heads}"
        found.append(("num_kv_heads", cfg.num_kv_heads, "every head has a key and a value of its own", way))
    if cfg.head_dim * cfg.num_heads != cfg.hidden_size:
        reason = f"hidden_size={cfg.hidden_size} is shared out over {cfg.num_heads} heads"
        found.append(("head_dim", cfg.head_dim, reason, f"model.head_dim={cfg.hidden_size // cfg.num_heads}"))
    return found
