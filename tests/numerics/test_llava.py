"""LLaVA and LLaVA-NeXT from Hugging Face folders give the logits and gradients of transformers; fp32, 1e-5."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import models
from convert.from_hf import open_hf, weight_rules
from convert.source import Source
from data.pictures.geometry import plan
from data.pictures.loader import features_of
from data.pictures.types import PictureConfig, Pictures, Plan
from parallel.materialise import materialise
from parallel.sharding import SINGLE
from trainer.pictures import picture_config

IMAGE, PATCH = 28, 7
VISION: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
VISION |= {"image_size": IMAGE, "patch_size": PATCH}
TEXT: dict[str, Any] = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
TOKEN = 500


def clip() -> Any:
    return hf.CLIPVisionConfig(**VISION)


def siglip() -> Any:
    return hf.SiglipVisionConfig(**VISION, vision_use_head=False)


def random(model: Any) -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn_like(param) * 0.05)
    return model.eval()


CASES: dict[str, Any] = {
    "clip": (hf.LlavaForConditionalGeneration, hf.LlavaConfig, clip, hf.LlamaConfig, {}),
    "clip, class kept": (
        hf.LlavaForConditionalGeneration, hf.LlavaConfig, clip, hf.LlamaConfig,
        {"vision_feature_select_strategy": "full", "vision_feature_layer": -1},
    ),
    "siglip and qwen2": (
        hf.LlavaForConditionalGeneration, hf.LlavaConfig, siglip, hf.Qwen2Config,
        {"vision_feature_select_strategy": "full", "vision_feature_layer": -1},
    ),
    "next": (
        hf.LlavaNextForConditionalGeneration, hf.LlavaNextConfig, clip, hf.LlamaConfig,
        {"image_grid_pinpoints": [[28, 56], [56, 28], [56, 56]]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_are_transformers(case: str, tmp_path: Path) -> None:
    kind, config, tower, text, extra = CASES[case]
    theirs = random(kind(config(vision_config=tower(), text_config=text(**TEXT), image_token_index=TOKEN, **extra)))
    theirs.save_pretrained(tmp_path)
    opened = open_hf(tmp_path)
    source = Source(opened, opened.cfg, 0)
    source.check()
    ours = models.build(opened.cfg)
    materialise(ours, source, SINGLE.cut, torch.device("cpu"))

    cfg = picture_config(opened.cfg)
    assert cfg is not None
    sizes = [(40, 50), (80, 24)]  # width, height
    plans = [plan(*size, cfg) for size in sizes]
    tiles = [torch.randn(len(each.grids), 3, IMAGE, IMAGE) for each in plans]
    tokens = torch.randint(0, TOKEN, (20 + sum(each.tokens for each in plans),))
    first, second = (each.tokens for each in plans)
    tokens[4 : 4 + first] = tokens[9 + first : 9 + first + second] = TOKEN
    pictures = _pictures(tiles, plans, cfg, [4, 9 + first])
    length = len(tokens)
    logits = ours(tokens, torch.arange(length), torch.tensor([0, length]), output="head", pictures=pictures)

    if kind is hf.LlavaForConditionalGeneration:
        given = {"pixel_values": torch.cat(tiles)}
    else:
        most = max(len(each) for each in tiles)
        padded = [torch.cat([each, each.new_zeros(most - len(each), *each.shape[1:])]) for each in tiles]
        given = {"pixel_values": torch.stack(padded), "image_sizes": torch.tensor([(h, w) for w, h in sizes])}
    wanted = theirs(input_ids=tokens[None], **given).logits[0]
    torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())

    for each in (logits, wanted):
        each.logsumexp(-1).square().sum().backward()
    rules = weight_rules(opened.cfg)[0]
    state = {name.replace(".vision_model.", "."): param.grad for name, param in theirs.named_parameters()}
    canonical = models.family_of(opened.cfg).canonical  # pyright: ignore[reportAttributeAccessIssue]
    grads = {canonical(name): torch.zeros(()) if grad is None else grad for name, grad in state.items()}
    seen = 0
    for name, param in ours.named_parameters():
        if not param.requires_grad:
            continue  # never run: kept for the checkpoint's sake
        told = rules[name].to_ours({hf_name: grads[hf_name] for hf_name in rules[name].sources})
        assert param.grad is not None
        torch.testing.assert_close(param.grad, told, rtol=1e-5, atol=1e-5 * told.abs().max().item() + 1e-7, msg=name)
        seen += 1
    assert seen > 40


def _pictures(tiles: list[torch.Tensor], plans: list[Plan], cfg: PictureConfig, starts: list[int]) -> Pictures:
    """The tiles of each picture cut into patches by hand, its tokens from a start on."""
    made = []
    for mine, each in zip(tiles, plans, strict=True):
        cut = mine.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).permute(0, 2, 3, 1, 4, 5)
        patches = cut.reshape(-1, 3 * PATCH * PATCH)
        made.append(Pictures(patches, each.grids, torch.arange(each.tokens), torch.from_numpy(each.order_F)))
    return Pictures.join(made, starts, [features_of(each, cfg) for each in plans])
