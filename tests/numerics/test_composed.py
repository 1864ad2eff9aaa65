"""A model put together from a CLIP or SigLIP and a Llama: transformers' LLaVA with the same parts gives its logits."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import models
from convert.adapters import Fresh
from convert.composed import composed, new_words
from convert.opening import open_weights
from convert.source import Source
from data.pictures.types import Pictures
from models.config import ModelConfig
from models.vision.config import ImageConfig, ProjectorConfig, TowerConfig, VisionConfig
from parallel.materialise import materialise
from parallel.sharding import SINGLE

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
}
WORDS, IMAGE = 60, 62


def moved(model: Any) -> Any:
    """Norms and biases away from 1 and 0."""
    for param in model.parameters():
        param.data.add_(torch.randn_like(param) * 0.05)
    return model.eval()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=WORDS, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=False,
    )  # fmt: skip
    model, folder = moved(transformers.LlamaForCausalLM(config)), tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder)
    return model, folder


def tower(kind: str, folder: Path) -> tuple[Any, Any]:
    """transformers' tower, kept in a folder as it comes: beside a text encoder, or alone."""
    torch.manual_seed(1)
    if kind == "siglip":
        config = transformers.SiglipVisionConfig(**SIZES, vision_use_head=False)
        model = moved(transformers.SiglipVisionModel(config))
        model.save_pretrained(folder)
        return model, config
    config = transformers.CLIPVisionConfig(**SIZES)
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    both = moved(transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=config.to_dict())))
    alone = transformers.CLIPVisionModel(config)
    state = {name: value for name, value in both.state_dict().items() if name.startswith("vision_model.")}
    prefix = "" if any(name.startswith("vision_model.") for name in alone.state_dict()) else "vision_model."
    alone.load_state_dict({name.removeprefix(prefix): value for name, value in state.items()})
    (both if kind == "clip" else alone).save_pretrained(folder)
    return alone.eval(), config


def model_of(llama: Path, kind: str) -> ModelConfig:
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_layers": 3, "num_heads": 4}
    sizes |= {"patch_size": 7, "image_size": 28, "feature_layer": -2}
    own = (
        TowerConfig("siglip", norm_eps=1e-6, activation="gelu_tanh", **sizes)
        if kind == "siglip"
        else TowerConfig("clip", activation="quick_gelu", **sizes)
    )
    vision = VisionConfig("llava", own, ProjectorConfig("mlp"), ImageConfig(token_id=IMAGE))
    return dataclasses.replace(open_weights(llama).cfg, vocab_size=64, vision=vision)


@pytest.mark.parametrize("kind", ["clip", "clip_vision", "siglip"])
def test_the_parts_together_are_transformers_llava(kind: str, llama: tuple[Any, Path], tmp_path: Path) -> None:
    language, folder = llama
    sees, config = tower(kind, tmp_path)
    cfg = model_of(folder, kind)
    source = Source(composed(cfg, {"vision": str(tmp_path), "decoder": str(folder)}, 3), cfg, 3)
    source.check()
    assert new_words(cfg, str(folder)) == 64 - WORDS

    text = language.config.to_dict() | {"vocab_size": 64}
    select = {"vision_feature_layer": -2, "vision_feature_select_strategy": "full" if kind == "siglip" else "default"}
    theirs = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(vision_config=config, text_config=text, image_token_index=IMAGE, **select)
    ).eval()
    theirs.model.vision_tower.load_state_dict(sees.state_dict())
    fresh, state = Fresh(cfg, 3), language.state_dict()
    for name, hf in (("model.embed_tokens.weight", "embed.weight"), ("lm_head.weight", "head.weight")):
        state[name] = torch.cat([state[name], source.tensor(hf)[WORDS:]])
        assert source.tensor(hf)[WORDS:].std() > 0.01
    inner = {name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")}
    theirs.model.language_model.load_state_dict(inner)
    theirs.lm_head.weight.data.copy_(state["lm_head.weight"])
    for part in ("linear_1", "linear_2"):
        linear, name = getattr(theirs.model.multi_modal_projector, part), f"multi_modal_projector.{part}"
        linear.weight.data.copy_(fresh.rows(f"{name}.weight", 0, linear.weight.shape[0]))
        linear.bias.data.copy_(fresh.rows(f"{name}.bias", 0, linear.bias.shape[0]))

    ours = models.build(cfg)
    materialise(ours, source, SINGLE.cut, torch.device("cpu"))
    images, ids = torch.randn(2, 3, 28, 28), torch.randint(0, WORDS, (1, 50))
    ids[0, 3:19] = ids[0, 25:41] = IMAGE
    patches = images.unfold(2, 7, 7).unfold(3, 7, 7).permute(0, 2, 3, 1, 4, 5).reshape(32, -1)
    shown = Pictures(patches, ((4, 4), (4, 4)), (ids[0] == IMAGE).nonzero()[:, 0], torch.arange(32))
    with torch.no_grad():
        wanted = theirs(input_ids=ids, pixel_values=images).logits[0]
        found = ours(ids[0], torch.arange(50), torch.tensor([0, 50]), output="head", pictures=shown)
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_other_parts_are_refused(llama: tuple[Any, Path], tmp_path: Path) -> None:
    _, folder = llama
    tower("clip", tmp_path)
    cfg = model_of(folder, "clip")
    assert cfg.vision is not None
    more = dataclasses.replace(cfg, vision=dataclasses.replace(
        cfg.vision, tower=dataclasses.replace(cfg.vision.tower, num_heads=2)))  # fmt: skip
    with pytest.raises(ValueError, match="another vision: num_heads is 2 against 4 in the folder"):
        composed(more, {"vision": str(tmp_path)}, 0)
    with pytest.raises(ValueError, match="holds a model that sees nothing, and so no connector"):
        composed(cfg, {"connector": str(folder)}, 0)
    with pytest.raises(ValueError, match="another decoder: num_layers is 3 against 2"):
        composed(dataclasses.replace(cfg, num_layers=3), {"decoder": str(folder)}, 0)
    with pytest.raises(ValueError, match=r"embed_tokens.weight is \[60, 48\], and the model's \[50, 48\]"):
        composed(dataclasses.replace(cfg, vocab_size=50), {"decoder": str(folder)}, 0)
