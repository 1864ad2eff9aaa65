"""Hugging Face folders of pairs of encoders as starts and ends of runs, and what such models are refused for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from convert.opening import open_weights
from convert.source import Source
from convert.to_hf import export
from models import build
from models.init import InitSource
from scripts import check_parity, evaluate, inspect_model
from scripts.export_hf import export_run
from scripts.params import load_model
from tests import cases
from trainer.inference.loading import open_text_model

EYES: dict[str, Any] = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
EYES |= {"patch_size": 7, "image_size": 28}
TEXT: dict[str, Any] = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
TEXT |= {"num_attention_heads": 4, "max_position_embeddings": 32, "projection_size": 48, "bos_token_id": 0}
TEXT |= {"eos_token_id": 1}


@pytest.fixture(scope="module")
def rows(world: Any) -> Path:
    """Eight pictures of noise with captions."""
    folder, random = world.folder / "pair_rows", np.random.default_rng(1)
    folder.mkdir()
    told = [{"image": f"{n}.png", "caption": f"number {n}"} for n in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in told))
    for n in range(8):
        Image.fromarray(random.integers(0, 256, (28, 28, 3), dtype=np.uint8)).save(folder / f"{n}.png")
    return folder / "rows.jsonl"


def fresh(name: str, folder: Path) -> Path:
    """A Hugging Face folder of a tiny model with fresh weights."""
    cfg = load_model(name, [])
    source = InitSource(cfg, 7)
    return export(folder, cfg, ((name, source.tensor(name)) for name, _ in build(cfg).named_parameters()))


def test_a_folder_is_trained_and_becomes_one_again(pool: Any, world: Any, rows: Path, tmp_path: Path) -> None:
    """A SigLIP of transformers, two steps over two ranks, loaded by transformers: the run's own weights."""
    torch.manual_seed(0)
    theirs = transformers.SiglipModel(transformers.SiglipConfig(text_config=TEXT, vision_config=EYES))
    theirs.save_pretrained(tmp_path / "theirs")
    given = world.overrides(run__name="siglip", run__steps=2, data__sources=f"[{{path: {rows}, channel: shown}}]")
    start = ["model=hf", f"init_from={tmp_path}/theirs", "stage=clip", "stage.loss=sigmoid", "data.seq_len=32"]
    pool(2).run(cases.run_config, [*given, *start, "engine=zero3", "engine.recompute=full"])
    run = world.folder / "runs" / "siglip"
    export_run(run, tmp_path / "out", torch.float32, False, None)
    kind: Any = transformers.SiglipModel
    loaded, info = kind.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    opened, before = open_weights(run), theirs.state_dict()
    source = Source(opened, opened.cfg)
    for ours, hf in (("head.weight", "text_model.head.weight"), ("temperature.bias", "logit_bias")):
        trained = source.tensor(ours)
        assert torch.equal(trained, loaded.state_dict()[hf]) and not torch.equal(trained, before[hf]), ours


def test_a_locked_tower(pool: Any, world: Any, rows: Path, tmp_path: Path) -> None:
    """LiT (Zhai et al. 2022): the tower of a CLIP folder, a fresh text encoder, and the tower stays as it is."""
    folder = fresh("tiny_clip", tmp_path / "clip")
    given = world.overrides(run__name="locked", run__steps=1, data__sources=f"[{{path: {rows}, channel: shown}}]")
    start = ["model=tiny_clip", "stage=clip", f"init_parts.vision={folder}", "optim.parts.vision.train=false"]
    pool(1).run(cases.run_config, [*given, *start])
    runs = [open_weights(folder), open_weights(world.folder / "runs" / "locked")]
    first, last = (Source(each, each.cfg) for each in runs)
    assert torch.equal(first.tensor("vision.layers.1.qkv.weight"), last.tensor("vision.layers.1.qkv.weight"))
    assert not torch.equal(first.tensor("embed.weight"), last.tensor("embed.weight"))
    export_run(world.folder / "runs" / "locked", tmp_path / "out", torch.float32, False, None)
    loaded: Any = transformers.CLIPModel.from_pretrained(tmp_path / "out")
    assert loaded.logit_scale.shape == () and loaded.logit_scale == last.tensor("temperature.scale")


def test_what_needs_a_decoder_says_so(tmp_path: Path) -> None:
    folder = str(fresh("tiny_siglip", tmp_path / "siglip"))
    page = ["--model", folder, "--out", str(tmp_path / "page.html")]
    asked = tmp_path / "asked.jsonl"
    asked.write_text(json.dumps({"question": "what", "choices": ["a", "b"], "answer": 0}) + "\n")
    for use in (
        lambda: open_text_model(folder),
        lambda: check_parity.load_ours(folder, "sdpa"),
        lambda: evaluate.main(["--model", folder, "--tasks", str(asked)]),
        lambda: inspect_model.inspect(inspect_model.parse([*page, "--text", "a"])),
    ):
        with pytest.raises(ValueError, match="pair of encoders"):
            use()
