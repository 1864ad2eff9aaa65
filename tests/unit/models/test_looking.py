"""What words take from pictures, against transformers' attention; what learnt queries read, against softmax."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf

from data.pictures.types import Pictures
from models import Decoder
from models.inspection import Inspection
from models.vision.config import ResamplerConfig
from models.vision.connectors import cross, resampler
from parallel.sharding import SINGLE
from scripts.params import load_model
from tests import tp_cases
from tests.numerics import test_llava, test_seeing
from tests.numerics.test_seeing import Seen, document, internvl, opened, qwen2_5_vl, random
from trainer.pictures import picture_config

close = partial(torch.testing.assert_close, rtol=0, atol=1e-5)
SIZES = [[(40, 50), (80, 24)], [], [(28, 60)]]


def llava(case: str) -> Any:
    kind, config, tower, text, extra = test_llava.CASES[case]
    return kind(config(vision_config=tower(), text_config=text(**test_llava.TEXT), image_token_index=500, **extra))


CASES: dict[str, Any] = {
    "llava": lambda: llava("clip"),
    "llava, class kept": lambda: llava("clip, class kept"),
    "internvl": lambda: internvl(hf.Qwen2Config),
    "blip2": lambda: test_seeing.blip2(hf.LlamaConfig, True),
    "qwen2_5_vl": qwen2_5_vl,
}


def packed(ours: Decoder, docs: list[Seen], gradients: bool = False) -> Inspection:
    borders = np.cumsum([0, *(len(doc.tokens) for doc in docs)]).tolist()
    seen = [(doc, at) for doc, at in zip(docs, borders, strict=False) if doc.pictures is not None]
    made = [doc.pictures for doc, _ in seen if doc.pictures is not None]
    pictures = Pictures.join(made, [at for _, at in seen], [doc.features for doc, _ in seen])
    turned = [doc.rotary for doc in docs if doc.rotary is not None]
    tokens_T = torch.cat([doc.tokens for doc in docs])
    return Inspection.of(ours, tokens_T, borders, gradients, pictures, torch.cat(turned, 1) if turned else None)


@pytest.mark.parametrize("case", CASES)
def test_words_take_from_features_what_transformers_says(case: str, tmp_path: Path) -> None:
    theirs = random(CASES[case]())
    theirs.save_pretrained(tmp_path)
    theirs.set_attn_implementation("eager")
    ours = opened(tmp_path)
    cfg = picture_config(ours.cfg)
    assert cfg is not None
    docs = [document(cfg, sizes, seed) for seed, sizes in enumerate(SIZES)]
    inspection = packed(ours, docs, gradients=True)
    tokens, ends = inspection.recording.tokens_T, np.cumsum([0, *(len(doc.tokens) for doc in docs)])
    assert (tokens[1:][inspection.recording.targets_T[:-1] >= 0] != test_seeing.TOKEN).all()
    features = 0
    for doc, start in zip(docs, ends, strict=False):
        if doc.pictures is None:
            continue
        with torch.no_grad():
            said = theirs(**doc.theirs, output_attentions=True)
        places = [len(doc.tokens) - 3, len(doc.tokens) - 1]
        said = said.language_model_outputs if case == "blip2" else said
        for layer, weights in enumerate(said.attentions):
            wanted = weights[0][:, places][:, :, doc.pictures.slots_F].mean(1)
            if inspection.recording.reads_BQS is None:
                word = [start + place for place in places]
                found = inspection.look(layer, [[0], word])
                close(found[1, :, features : features + doc.features], wanted)
                assert not found[0].any() and found[1].count_nonzero() == wanted.numel()
            else:
                rows = torch.stack(list(inspection.attention(layer)))[:, start + places[0] : start + places[1] + 1 : 2]
                close(rows[:, :, start + doc.pictures.slots_F].mean(1), wanted)
        features += doc.features
    assert features
    whole = inspection.recording.gradients
    assert whole is not None and whole.weights["connector.body.proj.weight" if case == "blip2" else "embed.weight"] > 0


def test_rows_that_end_in_a_learnt_feature(tmp_path: Path) -> None:
    """LLaVA-NeXT: features of borders stand nowhere, what ends a row is no spot, and the rest is put back in place."""
    theirs = random(llava("next"))
    theirs.save_pretrained(tmp_path)
    ours = opened(tmp_path)
    cfg = picture_config(ours.cfg)
    assert cfg is not None
    doc = document(cfg, [(80, 24), (30, 60)], 1)
    inspection, last = packed(ours, [doc]), len(doc.tokens) - 1
    assert doc.pictures is not None
    taken = torch.stack(list(inspection.attention(1)))[:, last, doc.pictures.slots_F]
    found = inspection.look(1, [[last]])[0]
    wanted = torch.zeros(4, doc.features)
    for at, order in enumerate(doc.pictures.order_F.tolist()):
        if order >= 0:
            wanted[:, order] += taken[:, at]
    close(found, wanted)
    assert (doc.pictures.order_F < 0).any() and (wanted == 0).any()


def attended(kept: list[torch.Tensor], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tiles: int) -> torch.Tensor:
    """`models.vision.layers.attend` in steps, whose weights are kept."""
    rows_q, rows_k, rows_v = (x.unflatten(0, (tiles, -1)).transpose(1, 2) for x in (q, k, v))
    weights = (rows_q @ rows_k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
    kept.append(weights.detach())
    return (weights @ rows_v).transpose(1, 2).flatten(2).flatten(0, 1)


@pytest.mark.parametrize("name", ["qformer", "perceiver", "resampler"])
def test_what_learnt_queries_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = {
        "qformer": "tiny_blip2",
        "perceiver": "tiny_perceiver",
        "resampler": "tiny_perceiver",
    }[name]
    cfg = dataclasses.replace(load_model(made, []), init_std=0.2)
    if name == "resampler":
        assert cfg.vision is not None
        vision = dataclasses.replace(cfg.vision, connector=ResamplerConfig(side=2, num_heads=4))
        cfg = dataclasses.replace(cfg, vision=vision)
    ours = tp_cases.model_of(cfg, SINGLE)
    assert isinstance(ours, Decoder)
    kept: list[torch.Tensor] = []
    for module in (cross, resampler):
        monkeypatch.setattr(module, "attend", partial(attended, kept))
    prepared = picture_config(cfg)
    assert prepared is not None
    doc = document(prepared, [(40, 50), (20, 30)], 3)
    inspection, last = packed(ours, [doc]), len(doc.tokens) - 1
    reading = [weights.mean(1) for weights in kept if weights.shape[-1] >= 16]  # queries among themselves are 4
    assert len(reading) == {"qformer": 1, "perceiver": 2, "resampler": 1}[name]
    own = slice(1, 17) if name == "qformer" else slice(0, 16)  # behind the class token; before the latents
    reads = torch.stack(reading).mean(0)[..., own]
    reads = reads / reads.sum(-1, keepdim=True)
    assert inspection.recording.reads_BQS is not None and reads.shape == (2, 4, 16)
    close(inspection.recording.reads_BQS, reads)
    assert (reads.max(2).values > 1.2 * reads.min(2).values).all()
    taken = torch.stack(list(inspection.attention(0)))[:, last][:, inspection.recording.tokens_T == test_seeing.TOKEN]
    wanted = [(taken[:, 4 * i : 4 * i + 4, None] * reads[i]).sum(1) for i in range(2)]
    close(inspection.look(0, [[last]])[0], torch.cat(wanted, 1))


def test_a_model_without_eyes_is_shown_nothing() -> None:
    blind = tp_cases.model_of(load_model("tiny_llama", []), SINGLE)
    assert isinstance(blind, Decoder)
    shown = document(picture_config(load_model("tiny_llava", [])), [(28, 28)], 0)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="sees no pictures"):
        Inspection.of(blind, shown.tokens, pictures=shown.pictures)
    ours = tp_cases.model_of(load_model("tiny_llava", []), SINGLE)
    assert isinstance(ours, Decoder) and shown.pictures is not None
    slots = shown.pictures.slots_F
    only = dataclasses.replace(shown.pictures, slots_F=slots - slots[0])
    with pytest.raises(ValueError, match="no token comes next"):
        Inspection.of(ours, shown.tokens[slots], pictures=only)
