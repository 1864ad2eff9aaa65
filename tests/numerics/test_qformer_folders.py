"""Folders of a Q-Former's first stage: transformers' own, a BERT's to start from, and the next stage's start."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import models
from convert.composed import composed, found_in, new_tensors
from convert.from_hf import open_hf
from convert.opened import Opened
from convert.source import Source
from convert.to_hf import export
from data.batch import collate
from models.config import ModelConfig
from models.init import InitSource
from models.vision.config import QFormerConfig, TowerConfig
from parallel.materialise import TensorSource, materialise
from parallel.sharding import SINGLE
from tests.qformer_cases import TINY, documents, model
from trainer.losses.matching import similarities
from trainer.parts import modules_of


def filled(cfg: ModelConfig, source: TensorSource) -> Any:
    ours: Any = models.build(cfg)
    materialise(ours, source, SINGLE.cut, torch.device("cpu"))
    return ours


def source_of(opened: Opened) -> Source:
    source = Source(opened, opened.cfg, 5)
    source.check()
    return source


@pytest.fixture(scope="module")
def stage1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as a folder."""
    weights = ((name, param.detach()) for name, param in model().named_parameters())
    return export(tmp_path_factory.mktemp("stage1") / "folder", TINY, weights)


def test_transformers_reads_what_is_written_and_the_other_way_round(stage1: Path, tmp_path: Path) -> None:
    """Its own folder has no head over words and no temperature: they are fresh, and everything else the same bits."""
    loaded: Any = hf.Blip2ForImageTextRetrieval.from_pretrained(stage1, output_loading_info=True)
    theirs, told = loaded
    assert not told["missing_keys"] and {key.split(".")[0] for key in told["unexpected_keys"]} == {"cls", "logit_scale"}
    theirs.save_pretrained(tmp_path / "theirs")
    opened = open_hf(tmp_path / "theirs")
    assert dataclasses.replace(opened.cfg, vision=None) == dataclasses.replace(TINY, vision=None)
    assert opened.cfg.vision is not None and TINY.vision is not None
    assert opened.cfg.vision.connector == TINY.vision.connector
    back, ours = dict(filled(opened.cfg, source_of(opened)).named_parameters()), dict(model().named_parameters())
    fresh = {name for name in ours if not torch.equal(ours[name], back[name])}
    assert {name.rpartition(".")[0] for name in fresh} <= {"text.head", "text.head.dense", "text.head.norm"}
    whole = dict(filled(TINY, source_of(open_hf(stage1))).named_parameters())
    assert all(torch.equal(ours[name], whole[name]) for name in ours)


def test_a_bert_reads_texts_as_before_and_pictures_begin_fresh(tmp_path: Path) -> None:
    """Texts alone give transformers' BertModel's rows, whose segments' rows are zero; one word is new."""
    config = hf.BertConfig(vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
                           intermediate_size=32, max_position_embeddings=16, layer_norm_eps=1e-6)  # fmt: skip
    torch.manual_seed(0)
    bert: Any = hf.BertForMaskedLM(config).eval()
    with torch.no_grad():
        for param in bert.parameters():
            param.add_(torch.randn_like(param) * 0.2)
        bert.bert.embeddings.token_type_embeddings.weight.zero_()
    bert.save_pretrained(tmp_path)
    start = Source(composed(TINY, {"connector": str(tmp_path), "decoder": str(tmp_path)}, 5), TINY, 5)
    start.check()
    ours, fresh = filled(TINY, start), filled(TINY, InitSource(TINY, 5))
    batch = collate(documents(0))
    batch = dataclasses.replace(batch, tokens_T=batch.tokens_T.clamp(max=59))
    lengths = (batch.cu_seqlens[1:] - batch.cu_seqlens[:-1]).tolist()
    first = batch.cu_seqlens[:-1].long()
    with torch.no_grad():
        texts = [bert.bert(input_ids=text[None])[0][0, 0] for text in batch.tokens_T.split(lengths)]
        wanted = torch.nn.functional.normalize(ours.text.text_proj(torch.stack(texts)), dim=-1)
        torch.testing.assert_close(ours(**batch.inputs).text_NP, wanted, atol=1e-5, rtol=1e-5)
        rows = torch.randn(5, 16)
        logits = bert.cls(rows)
        mine = ours.text.head.logits(ours.text.head.norm(torch.nn.functional.gelu(ours.text.head.dense(rows))))
        torch.testing.assert_close(mine[:, :60], logits, atol=1e-5, rtol=1e-5)
    assert len(first) == len(texts)
    body, other = ours.connector.body, fresh.connector.body
    assert torch.equal(body.layers[0].mlp.up.weight, bert.bert.encoder.layer[0].intermediate.dense.weight)
    assert torch.equal(body.layers[0].mlp.up.weight, ours.text.layers[0].mlp.up.weight)
    assert torch.equal(body.queries, other.queries) and torch.equal(
        body.layers[0].cross.q.weight, other.layers[0].cross.q.weight
    )
    told = modules_of(new_tensors(TINY, "connector", str(tmp_path)))
    assert told == "connector.body.queries, connector.body.layers.*.cross.q, connector.body.layers.*.cross.kv, " \
        "connector.body.layers.*.cross.out, connector.body.layers.*.cross_norm"  # fmt: skip
    wide = dataclasses.replace(TINY, num_heads=2)
    with pytest.raises(ValueError, match=r"num_attention_heads is 4 against model.num_heads=2"):
        found_in(wide, "decoder", str(tmp_path))


def test_the_next_stage_takes_tower_and_queries_and_only_its_own_layer_is_fresh(stage1: Path) -> None:
    assert TINY.vision is not None and isinstance(TINY.vision.connector, QFormerConfig)
    vision = dataclasses.replace(
        TINY.vision, format="blip2", connector=dataclasses.replace(TINY.vision.connector, width=256)
    )
    decoder = ModelConfig("llama", 64, 24, 32, 2, 2, 2, 12, 64, vision=vision)
    start = Source(composed(decoder, {"vision": str(stage1), "connector": str(stage1)}, 5), decoder, 5)
    start.check()
    ours, before, batch = filled(decoder, start), model(), collate(documents(0))
    assert new_tensors(decoder, "connector", str(stage1)) == ["connector.body.proj.weight", "connector.body.proj.bias"]
    assert batch.pictures is not None
    with torch.no_grad():
        features = ours.vision(batch.pictures.patches_PX, batch.pictures.grids)
        rows = ours.connector.body.read(features, 8)
        said = torch.nn.functional.normalize(before.text.image_proj(rows).unflatten(0, (8, -1)), dim=-1)
        read = before(**batch.inputs)
    torch.testing.assert_close(
        similarities(said, read.text_NP), similarities(read.image_NQP, read.text_NP), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_another_tower_goes_out_and_comes_back_and_a_decoder_goes_on_from_it(tmp_path: Path, kind: Any) -> None:
    """Format loom: any tower under the same names; its features are read as its own kind gives them."""
    assert TINY.vision is not None
    tower = TowerConfig(kind, 16, 24, 2, 2, 4, 12, 1e-6, feature_layer=-2, keep_class=kind == "clip")
    assert isinstance(TINY.vision.connector, QFormerConfig)
    cfg = dataclasses.replace(TINY, vision=dataclasses.replace(TINY.vision, format="loom", tower=tower))
    assert cfg.vision is not None
    assert not models.problems(cfg)
    first = filled(cfg, InitSource(cfg, 3))
    folder = export(tmp_path / "out", cfg, ((name, param.detach()) for name, param in first.named_parameters()))
    opened = open_hf(folder)
    assert opened.cfg == cfg
    again = dict(filled(cfg, source_of(opened)).named_parameters())
    assert all(torch.equal(param, again[name]) for name, param in first.named_parameters())
    batch = collate(documents(0))
    assert batch.pictures is not None
    with torch.no_grad():
        told = first(**batch.inputs)
        features = first.vision(batch.pictures.patches_PX, batch.pictures.grids)
        assert len(features) == 8 * (9 + tower.keep_class)
        other = dataclasses.replace(batch.pictures, patches_PX=batch.pictures.patches_PX.flip(0))
        assert not torch.equal(told.image_NQP, first(**(batch.inputs | {"pictures": other})).image_NQP)
    vision = dataclasses.replace(cfg.vision, connector=dataclasses.replace(TINY.vision.connector, width=256))
    decoder = ModelConfig("llama", 64, 24, 32, 2, 2, 2, 12, 64, vision=vision)
    start = Source(composed(decoder, {"vision": str(folder), "connector": str(folder)}, 5), decoder, 5)
    start.check()
    ours = dict(filled(decoder, start).named_parameters())
    same = [name for name, param in first.named_parameters() if name in ours and torch.equal(param, ours[name])]
    assert {name for name in ours if name.split(".")[0] in ("vision", "connector")} - set(same) == {
        "connector.body.proj.weight",
        "connector.body.proj.bias",
    }
