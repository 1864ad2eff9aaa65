"""Models that see from Hugging Face folders give the logits and gradients of transformers; fp32, 1e-5.

Qwen2-VL, Qwen2.5-VL, InternVL, BLIP-2. LLaVA is in `test_llava`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from transformers import AutoImageProcessor

import models
from convert.from_hf import open_hf, weight_rules
from convert.hf_folder_files import write_config
from convert.same_model import differing
from convert.source import Source
from convert.to_hf import export
from data.pictures.geometry import plan
from data.pictures.loader import features_of
from data.pictures.positions import rotary_positions
from data.pictures.types import PictureConfig, Pictures
from models.decoder import Decoder
from parallel.materialise import materialise
from parallel.sharding import SINGLE
from tests.pool import Pool
from tests.seeing_cases import turned, turned_in_pool
from trainer.pictures import picture_config

PATCH, TOKEN = 7, 500
TEXT: dict[str, Any] = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
TEXT |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SPECIAL: dict[str, Any] = {"video_token_id": 501, "vision_start_token_id": 502, "vision_end_token_id": 503}
MROPE: dict[str, Any] = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}}
YARN: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
YARN = {"rope_parameters": MROPE["rope_parameters"] | YARN}


def qwen2_vl() -> Any:
    vision: dict[str, Any] = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": PATCH}
    cfg = hf.Qwen2VLConfig(text_config=TEXT | MROPE, vision_config=vision, image_token_id=TOKEN, **SPECIAL)
    return hf.Qwen2VLForConditionalGeneration(cfg)


def qwen2_5_vl(tied: bool = False, rope: dict[str, Any] = MROPE) -> Any:
    vision: dict[str, Any] = {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 40,
        "out_hidden_size": 64,
        "num_heads": 2,
    }
    vision |= {"patch_size": PATCH, "window_size": 4 * PATCH, "fullatt_block_indexes": [1]}
    told: dict[str, Any] = {"image_token_id": TOKEN, "tie_word_embeddings": tied} | SPECIAL
    cfg = hf.Qwen2_5_VLConfig(text_config=TEXT | rope, vision_config=vision, **told)
    return hf.Qwen2_5_VLForConditionalGeneration(cfg)


TILES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TILES |= {"image_size": 4 * PATCH, "patch_size": PATCH}


def internvl(text: Any, tied: bool = False, layer: int = -1, **extra: Any) -> Any:
    vision = hf.InternVLVisionConfig(**TILES, **extra)
    told: dict[str, Any] = {"image_token_id": TOKEN, "tie_word_embeddings": tied, "vision_feature_layer": layer}
    cfg = hf.InternVLConfig(vision_config=vision, text_config=text(**TEXT, tie_word_embeddings=tied), **told)
    return hf.InternVLForConditionalGeneration(cfg)


def blip2(text: Any, bias: bool) -> Any:
    qformer = hf.Blip2QFormerConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48)
    vision = hf.Blip2VisionConfig(**TILES, qkv_bias=bias)
    told: dict[str, Any] = {"num_query_tokens": 3, "image_token_index": TOKEN}
    cfg = hf.Blip2Config(vision_config=vision, qformer_config=qformer, text_config=text(**TEXT), **told)
    return hf.Blip2ForConditionalGeneration(cfg)


CASES: dict[str, Any] = {
    "internvl": lambda: internvl(hf.Qwen2Config),
    "internvl as of 6b, tied": lambda: internvl(
        hf.LlamaConfig, True, use_qk_norm=True, norm_type="rms_norm", attention_bias=True, use_mean_pooling=False
    ),
    "internvl, last but one": lambda: internvl(hf.Qwen3Config, layer=-2),
    "blip2": lambda: blip2(hf.LlamaConfig, True),
    "blip2 and qwen2": lambda: blip2(hf.Qwen2Config, False),
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen2_5_vl, tied, yarn": lambda: qwen2_5_vl(True, YARN),
}


def random(model: Any) -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn_like(param) * 0.05)
    return model.eval()


def opened(folder: Path) -> Decoder:
    """Our model with the weights of a folder."""
    found = open_hf(folder)
    source = Source(found, found.cfg, 0)
    source.check()
    ours = models.build(found.cfg)
    materialise(ours, source, SINGLE.cut, torch.device("cpu"))
    return ours


def exported(ours: Decoder, folder: Path, kind: Any) -> dict[str, torch.Tensor]:
    """What transformers loads of our model, written with and without the first folder's config.json."""
    out, cfg = folder / "out", ours.cfg
    export(out, cfg, ours.named_parameters())
    written = open_hf(out).cfg
    assert not differing(written, cfg) and written.vision == cfg.vision
    theirs = AutoImageProcessor.from_pretrained(out, use_fast=False)
    assert cfg.vision and list(theirs.image_mean) == list(cfg.vision.images.mean)
    loaded, info = kind.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    kept = folder / "kept"
    kept.mkdir()
    write_config(kept, cfg, torch.float32, folder)
    assert json.loads((kept / "config.json").read_text()) == json.loads((folder / "config.json").read_text())
    images = replace(cfg.vision.images, mean=(0.1, 0.2, 0.3))
    write_config(kept, replace(cfg, vision=replace(cfg.vision, images=images)), torch.float32, folder)
    assert models.config_from_hf_folder(kept).vision == replace(cfg.vision, images=images)
    return loaded.state_dict()


@dataclass(frozen=True)
class Seen:
    """A document with pictures for either: ours, and what transformers is called with."""

    tokens: torch.Tensor
    pictures: Pictures | None
    features: int
    rotary: torch.Tensor | None
    theirs: dict[str, Any]


def document(cfg: PictureConfig, sizes: list[tuple[int, int]], seed: int) -> Seen:
    """Text with pictures of these widths and heights in between, of random pixels."""
    torch.manual_seed(seed)
    plans = [plan(*size, cfg) for size in sizes]
    tokens, starts = [torch.randint(3, TOKEN, (4,))], []
    for each in plans:
        starts.append(sum(len(part) for part in tokens))
        tokens += [torch.full((each.tokens,), TOKEN), torch.randint(3, TOKEN, (5,))]
    patches = [torch.randn(sum(a * b for a, b in p.grids), 3 * cfg.frames * cfg.patch**2) for p in plans]
    made = [
        Pictures(of, each.grids, torch.arange(each.tokens), torch.from_numpy(each.order_F))
        for of, each in zip(patches, plans, strict=True)
    ]
    features = [features_of(each, cfg) for each in plans]
    all_T = torch.cat(tokens)
    rotary, theirs = None, {"input_ids": all_T[None]}
    if cfg.rotary:
        shapes = [(at, each.shape) for at, each in zip(starts, plans, strict=True)]
        rotary = torch.from_numpy(rotary_positions(len(all_T), shapes))
    if plans and cfg.mode == "native":
        grids = torch.tensor([(1, *each.grids[0]) for each in plans])
        theirs |= {"pixel_values": torch.cat(patches), "image_grid_thw": grids}
        theirs |= {"mm_token_type_ids": (all_T[None] == TOKEN).int()}
    elif plans:
        side = cfg.tile // cfg.patch if cfg.tile else 0
        tiles = torch.cat(patches).view(-1, side, side, 3, cfg.patch, cfg.patch).permute(0, 3, 1, 4, 2, 5)
        theirs |= {"pixel_values": tiles.reshape(-1, 3, side * cfg.patch, side * cfg.patch)}
    joined = Pictures.join(made, starts, features) if plans else None
    return Seen(all_T, joined, sum(features), rotary, theirs)


def logits_of(ours: Decoder, docs: list[Seen]) -> torch.Tensor:
    """Logits of the documents, packed."""
    lengths = [len(doc.tokens) for doc in docs]
    borders = np.cumsum([0, *lengths])
    looking = [(doc, int(at)) for doc, at in zip(docs, borders, strict=False) if doc.pictures is not None]
    made = [doc.pictures for doc, _ in looking if doc.pictures is not None]
    pictures = Pictures.join(made, [at for _, at in looking], [doc.features for doc, _ in looking])
    turned = [doc.rotary for doc in docs if doc.rotary is not None]
    return ours(
        torch.cat([doc.tokens for doc in docs]),
        torch.cat([torch.arange(n) for n in lengths]),
        torch.tensor(borders),
        output="head",
        pictures=pictures,
        rotary_3T=torch.cat(turned, 1) if turned else None,
    )


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_are_transformers(case: str, tmp_path: Path) -> None:
    theirs = random(CASES[case]())
    theirs.save_pretrained(tmp_path)
    ours = opened(tmp_path)
    cfg = picture_config(ours.cfg)
    assert cfg is not None
    docs = [document(cfg, sizes, seed) for seed, sizes in enumerate([[(40, 90), (56, 24)], [], [(70, 70)]])]
    logits = logits_of(ours, docs)
    blind = getattr(theirs, "language_model", theirs)  # BLIP-2 as a whole takes nothing without a picture
    wanted = torch.cat([(theirs if doc.pictures else blind)(**doc.theirs).logits[0] for doc in docs])
    torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())

    again = exported(ours, tmp_path, type(theirs))
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(again[name], tensor), name

    for each in (logits, wanted):
        each.logsumexp(-1).square().sum().backward()
    rules, canonical = weight_rules(ours.cfg)[0], models.family_of(ours.cfg).canonical  # pyright: ignore
    grads = {canonical(name): param.grad for name, param in theirs.named_parameters()}
    seen = 0
    for name, param in ours.named_parameters():
        if not param.requires_grad:
            continue  # never run: kept for the checkpoint's sake
        told = rules[name].to_ours({hf_name: grads[hf_name] for hf_name in rules[name].sources})
        assert param.grad is not None
        torch.testing.assert_close(param.grad, told, rtol=1e-5, atol=1e-5 * told.abs().max().item() + 1e-7, msg=name)
        seen += 1
    assert seen > 40


def test_rows_and_columns_turn_alike_over_tp(pool: Callable[[int], Pool]) -> None:
    alone = turned()
    assert (alone - turned(flat=True)).abs().max() > 1e-3
    for cut in (False, True):
        for rank in pool(2).run(turned_in_pool, cut):
            torch.testing.assert_close(rank, alone, rtol=0, atol=1e-5)
