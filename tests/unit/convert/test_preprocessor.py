"""Exported folders of models that see, opened by transformers' own processors: a picture is as many tokens as here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from convert.from_hf import whole_shapes
from convert.to_hf import export
from data.pictures.geometry import plan
from data.tokenizer import add_special
from models import config_from_hf_folder
from scripts.params import load_model
from tests.unit.data.conftest import make_tokenizer
from trainer.pictures import picture_config


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llava", []),
        ("llava", ["vision.tower.keep_class=true"]),
        ("llava", ["vision.tower.kind=siglip", "vision.images.fit=squash"]),
        ("llava_next", []),
        ("blip2", []),
    ],
)
def test_processors_count_the_tokens_of_a_picture_alike(name: str, change: list[str], tmp_path: Path) -> None:
    cfg = load_model(f"tiny_{name}", change)
    pictures, tokenizer = picture_config(cfg), make_tokenizer()
    assert pictures is not None
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    add_special(tokenizer, pictures.token)
    wanted = tokenizer.convert_tokens_to_ids(pictures.token)
    tensors = [(each, torch.zeros(shape)) for each, shape in whole_shapes(cfg).items()]
    export(tmp_path / "out", cfg, tensors, tmp_path / "tokenizer")

    vision = config_from_hf_folder(tmp_path / "out").vision
    assert vision is not None and vision.images.token_id == wanted
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8))
    text = "a b" if name == "blip2" else f"a {pictures.token} b"  # that one puts the picture first by itself
    ids = processor(images=image, text=text)["input_ids"]
    ids = ids[0] if isinstance(ids[0], list) else ids
    assert sum(each == wanted for each in ids) == plan(90, 60, pictures).tokens
