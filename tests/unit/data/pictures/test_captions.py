"""Pictures with captions: rows of every form -> pairs, marks of several tokenizers, bad rows, what is held out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from data import pipeline
from data.captions import ends_of
from data.config import DataConfig, SourceConfig
from data.peers import Peers
from data.pictures.geometry import plan
from data.pictures.patches import patches_of

ROWS: list[dict[str, Any]] = [
    {"image": "a.png", "caption": " a cat "},
    {"images": ["b.png"], "text": "two dogs"},
    {"image": "c.png", "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "ox"}]},
]


@pytest.fixture
def files(tmp_path: Path, picture: Any) -> dict[str, Any]:
    made = {name: picture(28, 28, seed) for seed, name in enumerate("abc")}
    for name, image in made.items():
        image.save(tmp_path / f"{name}.png")
    return made


@pytest.fixture
def build(tmp_path: Path, tokenizer_folder: str, config: Any):
    def build(*files: list[dict[str, Any]], **changes: Any) -> pipeline.TrainingData:
        for number, rows in enumerate(files):
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (tmp_path / f"rows{number}.jsonl").write_text(text)
        sources = tuple(SourceConfig(str(tmp_path / f"rows{n}.jsonl"), channel="all") for n in range(len(files)))
        given = {"seq_len": 16, "micro_batch_rows": 1, "global_batch_rows": 2, "packing": "none", **changes}
        given = {"tokenizer": tokenizer_folder, **given}
        cfg = DataConfig(sources=sources, cache_dir=str(tmp_path / "cache"), **given)
        alone = {"tokenizer_folder": None, "seed": 0, "peers": Peers.alone(), "max_seq_len": 64}
        return pipeline.build(cfg, loss_on="all", kind="captions", pictures=config(per_tile=0), **alone)

    return build


def pairs(data: pipeline.TrainingData, tokenizer: Any) -> dict[bytes, str]:
    """Patches -> caption with its marks, of one micro-batch of everything."""
    order = data.order
    rows = [row for position in range(data.rows_per_epoch) for row in data.global_batch(position, 1)]
    batch = data.micro_batch_of(order.pieces, rows)
    assert batch.pictures is not None and not len(batch.pictures.slots_F) and not len(batch.pictures.order_F)
    tiles = batch.pictures.patches_PX.split([h * w for h, w in batch.pictures.grids])
    texts = np.split(batch.tokens_T.numpy(), batch.cu_seqlens[1:-1].numpy())
    assert batch.num_targets == len(batch.tokens_T) - len(texts)  # all but the first of each
    found = {tile.numpy().tobytes(): tokenizer.decode(text) for tile, text in zip(tiles, texts, strict=True)}
    assert len(found) == len(tiles) == len(texts)
    return found


def shown(image: Any, cfg: Any) -> bytes:
    width, height = image.size
    patches_PX: torch.Tensor = patches_of(image, plan(width, height, cfg), cfg)
    return patches_PX.numpy().tobytes()


def test_every_form_of_a_row_is_a_picture_and_its_caption(build, files, tokenizer, config) -> None:
    data = build(ROWS[:1], ROWS[1:2], ROWS[2:])
    wanted = {"a": "a cat<|im_end|>", "b": "two dogs<|im_end|>", "c": "ox<|im_end|>"}
    assert pairs(data, tokenizer) == {shown(files[name], config()): text for name, text in wanted.items()}
    assert data.max_token_id < len(tokenizer), "no token is added for pictures that have no place in the text"
    assert "pictures" in str(data.report) and data.report.channels[0].samples == 3


def test_a_long_caption_keeps_its_last_token(build, files, tokenizer, config) -> None:
    data = build([{"image": "a.png", "caption": "abcdefghij"}], seq_len=6)
    assert pairs(data, tokenizer) == {shown(files["a"], config()): "abcde<|im_end|>"}
    assert data.report.channels[0].truncated_rows == 1


def test_marks_are_those_of_the_tokenizers_own_rule(build, files, tokenizer, tmp_path, config) -> None:
    """[CLS] and [SEP] of a tokenizer without beginning or end of text, as BERT's."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.add_special_tokens(["[CLS]", "[SEP]"])
    ids = {name: backend.token_to_id(name) for name in ("[CLS]", "[SEP]")}
    backend.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="[CLS] $A [SEP]", special_tokens=list(ids.items())
    )
    bert = PreTrainedTokenizerFast(tokenizer_object=backend, cls_token="[CLS]", sep_token="[SEP]")
    bert.save_pretrained(tmp_path / "bert")
    assert ends_of(bert) == ((ids["[CLS]"],), (ids["[SEP]"],))
    data = build(ROWS[:1], tokenizer=str(tmp_path / "bert"))
    assert pairs(data, bert) == {shown(files["a"], config()): "[CLS]a cat[SEP]"}


def test_all_captions_of_a_picture_are_held_out_together(build, files) -> None:
    rows = [{"image": f"{name}.png", "caption": f"{word} of {name}"} for name in "abc" for word in ("one", "more")]
    for fraction in (0.2, 0.5, 0.8):
        data = build(rows, eval_fraction=fraction, max_bad_fraction=0.0) if fraction < 0.8 else build(rows)
        sides = {int(n) // 2 for n in data.order.pieces.sample_P}, {int(n) // 2 for n in data.held_out.sample_P}
        assert not sides[0] & sides[1] and sides[0] | sides[1] == {0, 1, 2}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"caption": "a cat"}, "the row has no picture, and a caption tells of one"),
        ({"images": ["a.png", "b.png"], "caption": "a cat"}, "the row has 2 pictures, and a caption tells of one"),
        ({"image": "a.png", "caption": " "}, "the caption is empty"),
        ({"image": "a.png", "caption": ["a cat"]}, "field caption is a list, not a string"),
        ({"image": "a.png"}, "field caption is missing"),
        ({"image": "missing.png", "caption": "a cat"}, "missing.png"),
    ],
)
def test_bad_rows_have_a_reason(build, files, row: dict, reason: str) -> None:
    data = build([ROWS[0], row, ROWS[0]], max_bad_fraction=0.5)
    (bad,) = data.report.bad_rows()
    assert bad.line == 2 and reason in bad.reason


def test_two_answers_are_no_caption_and_other_rows_are_told(build, files) -> None:
    said = [{"role": "user", "content": "<image>"}, *[{"role": "assistant", "content": "x"}] * 2]
    with pytest.raises(ValueError, match="one message of the assistant, and the row has 2"):
        build([{"image": "a.png", "messages": said}])
    with pytest.raises(ValueError, match=r"holds preference pairs.*learns from pictures with captions"):
        build([{"prompt": "p", "chosen": "c", "rejected": "r"}])


def test_what_fills_up_has_no_picture(build, files) -> None:
    data = build(ROWS[:1])
    empty = data.micro_batch_of(data.order.pieces, [])
    assert empty.pictures is None and empty.num_targets == 0
