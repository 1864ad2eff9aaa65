"""CLIPModel and SiglipModel of transformers: their logits and gradients, their folders in and out, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

import models
from convert.from_hf import open_hf, weight_rules
from convert.hf_folder_files import write_config
from convert.same_model import differing
from convert.source import Source
from convert.to_hf import export
from parallel.materialise import materialise
from parallel.sharding import SINGLE
from scripts.params import load_model
from tests.dual_cases import LENGTHS, pictures_of, pixels, seeds, similarities, texts

EYES: dict[str, Any] = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
EYES |= {"patch_size": 7, "image_size": 28}
TEXT: dict[str, Any] = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
TEXT |= {"num_attention_heads": 4, "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 511}
CASES = {"clip": 511, "clip, gelu": 511, "siglip": 1}


def theirs_of(name: str) -> Any:
    """transformers' model, norms and biases away from 1 and 0."""
    torch.manual_seed(0)
    if name == "siglip":
        cfg = hf.SiglipConfig(text_config=TEXT | {"projection_size": 48}, vision_config=EYES)
        model: Any = hf.SiglipModel(cfg)
    else:
        act = {"hidden_act": "gelu"} if "gelu" in name else {}
        model = hf.CLIPModel(hf.CLIPConfig(text_config=TEXT | act, vision_config=EYES | act, projection_dim=32))
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn_like(param) * 0.05)
    return model.eval()


@pytest.mark.parametrize("name", CASES)
def test_logits_gradients_and_folders_are_transformers_own(name: str, tmp_path: Path) -> None:
    theirs = theirs_of(name)
    theirs.save_pretrained(tmp_path)
    opened = open_hf(tmp_path)
    ours, source = models.build(opened.cfg), Source(opened, opened.cfg, 0)
    source.check()
    materialise(ours, source, SINGLE.cut, torch.device("cpu"))
    packed, pictures = texts(last=CASES[name]), pixels(len(LENGTHS))
    filled = torch.ones(len(LENGTHS), 16, dtype=torch.int64)
    for row, text in zip(filled, packed["tokens_T"].split(LENGTHS), strict=True):
        row[: len(text)] = text
    expected = theirs(input_ids=filled, pixel_values=pictures).logits_per_image
    found = similarities(ours(**packed, pictures=pictures_of(pictures)))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    (expected * seeds()).sum().backward()
    (found * seeds()).sum().backward()
    rules = weight_rules(opened.cfg)[0]
    grads = {hf: grad for key, param in ours.named_parameters() for hf, grad in rules[key].to_hf(param.grad).items()}
    wanted = dict(theirs.named_parameters())
    assert grads.keys() == wanted.keys()
    for key, param in wanted.items():
        most = max(1.0, param.grad.abs().max().item())
        torch.testing.assert_close(grads[key], param.grad, rtol=0, atol=1e-5 * most, msg=key)
    _written(ours, opened, theirs, tmp_path)


def _written(ours: Any, opened: Any, theirs: Any, folder: Path) -> None:
    """The model's own tensors, and the folder's rows, become the folder's bits again; transformers loads them."""
    cfg = opened.cfg
    export(folder / "model", cfg, ours.named_parameters())
    export(folder / "rows", cfg, opened.tensors)
    original = load_file(folder / "model.safetensors")
    for into in ("model", "rows"):
        again = load_file(folder / into / "model.safetensors")
        assert again.keys() == original.keys()
        assert all(
            again[key].shape == value.shape and torch.equal(again[key], value) for key, value in original.items()
        )
    written = models.config_from_hf_folder(folder / "model")
    assert not differing(written, cfg) and written == cfg and not models.problems(cfg)
    _, info = type(theirs).from_pretrained(folder / "model", output_loading_info=True)
    assert not any(info.values()), info
    prepared = hf.AutoImageProcessor.from_pretrained(folder / "model", use_fast=False)
    assert cfg.vision is not None and list(prepared.image_mean) == list(cfg.vision.images.mean)
    kept = folder / "kept"
    kept.mkdir()
    write_config(kept, cfg, torch.float32, folder)
    assert json.loads((kept / "config.json").read_text()) == json.loads((folder / "config.json").read_text())


def test_the_end_of_a_text_is_that_of_the_tokenizer(tmp_path: Path) -> None:
    """transformers looks for it by the id in text_config; SigLIP's filling stays the model's."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "other", "eos_token_id": 7, "pad_token_id": 3}))
    for name in ("tiny_clip", "tiny_siglip"):
        into = tmp_path / name
        into.mkdir()
        write_config(into, load_model(name, []), torch.float32, tmp_path)
        told = json.loads((into / "config.json").read_text())
        assert told["text_config"]["eos_token_id"] == 7 and "eos_token_id" not in told
        assert told["text_config"]["pad_token_id"] == (3 if name == "tiny_clip" else 1)
        assert not (into / "generation_config.json").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"text_config": TEXT | {"projection_size": 48, "hidden_act": "relu"}}, "one for both"),
        ({"vision_config": EYES | {"vision_use_head": False}}, "nothing to compare"),
        ({"text_config": TEXT | {"projection_size": 32}}, "width 32 with pictures of width 48"),
    ],
)
def test_what_a_folder_may_not_ask_for(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    text = TEXT | {"projection_size": 48}
    config = {"model_type": "siglip", "text_config": text, "vision_config": EYES} | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=words):
        models.config_from_hf_folder(tmp_path)


def test_older_configs_say_their_sections_twice() -> None:
    """`text_config_dict` counts where both are there, as in transformers; `fit` follows preprocessor_config.json."""
    config = {"model_type": "clip", "projection_dim": 32, "text_config": {}, "text_config_dict": TEXT}
    config |= {"vision_config": EYES, "preprocessor_config": {"do_center_crop": False, "image_mean": [0.5] * 3}}
    found = models.FAMILIES["clip"].from_hf_config(config)
    known: Any = hf.CLIPConfig(**{key: value for key, value in config.items() if key != "preprocessor_config"})
    assert found.vocab_size == known.text_config.vocab_size == 512
    assert found.vision is not None and found.vision.images.fit == "squash" and found.vision.images.mean == (0.5,) * 3
