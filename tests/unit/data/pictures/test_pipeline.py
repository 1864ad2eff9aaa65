"""Pictures through the whole pipeline: rows -> cache -> pieces -> micro-batches, against pictures prepared by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data import pipeline
from data.batch import IGNORED
from data.config import DataConfig, SourceConfig
from data.gate import GateError
from data.peers import Peers
from data.pictures.geometry import plan
from data.pictures.patches import patches_of

TOKENS = 16
"""Of a picture in the default settings: 28 x 28 pixels, patches of 7."""


@pytest.fixture
def build(tmp_path: Path, tokenizer_folder: str, config):
    def build(rows: list[dict[str, Any]], pictures: Any = None, **changes: Any) -> pipeline.TrainingData:
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        given = {"seq_len": 96, "micro_batch_rows": 1, "global_batch_rows": 1, **changes}
        cfg = DataConfig(
            sources=(SourceConfig(str(file)),), cache_dir=str(tmp_path / "cache"), tokenizer=tokenizer_folder, **given
        )
        seen = config() if pictures is None else pictures
        alone = {"tokenizer_folder": None, "seed": 0, "peers": Peers.alone(), "max_seq_len": 4096}
        return pipeline.build(cfg, loss_on="all", pictures=seen or None, **alone)

    return build


@pytest.fixture
def files(tmp_path: Path, picture) -> list[Image.Image]:
    """a.png, b.png and c.png beside the rows."""
    made = [picture(28, 28, seed) for seed in range(3)]
    for name, image in zip("abc", made, strict=True):
        image.save(tmp_path / f"{name}.png")
    return made


def batch(data: pipeline.TrainingData) -> Any:
    rows = [row for position in range(data.rows_per_epoch) for row in data.global_batch(position, 1)]
    return data.micro_batch_of(data.order.pieces, rows)


def shown(image: Image.Image, cfg: Any) -> torch.Tensor:
    return patches_of(image, plan(*image.size, cfg), cfg)


def test_features_stand_where_the_text_says_and_nothing_of_a_picture_is_learnt(build, files, config) -> None:
    data = build([{"text": "one<image>two<image>", "images": ["a.png", "b.png"]}, {"text": "no picture here at all"}])
    got = batch(data)
    cfg, token = config(), data.max_token_id
    assert torch.equal(got.pictures.patches_PX, torch.cat([shown(image, cfg) for image in files[:2]]))
    assert got.pictures.grids == ((4, 4), (4, 4)) and got.pictures.order_F.tolist() == list(range(2 * TOKENS))
    assert torch.equal(got.pictures.slots_F, (got.tokens_T == token).nonzero()[:, 0])
    assert not (got.targets_T == token).any() and (got.targets_T != IGNORED).sum() == got.num_targets
    assert data.report.channels[0].pictures == 2


def test_several_documents_keep_their_own_pictures(build, files, config) -> None:
    rows = [
        {"text": f"{name} <image> and so on" + " x" * 9 * i, "image": f"{name}.png"} for i, name in enumerate("abc")
    ]
    got, cfg = batch(build(rows)), config()
    tiles = got.pictures.patches_PX.unflatten(0, (3, TOKENS))
    first = [int(got.tokens_T[int(got.cu_seqlens[n])]) for n in range(3)]
    assert len(set(first)) == 3  # a, b, c in the order of the micro-batch
    known = {bytes(shown(image, cfg).numpy().tobytes()): name for name, image in zip("abc", files, strict=True)}
    order = [known[tile.numpy().tobytes()] for tile in tiles]
    assert order == ["c", "b", "a"]  # longest first
    assert got.pictures.order_F.tolist() == list(range(3 * TOKENS))


def test_bytes_in_the_row_are_the_same_as_a_file(build, files, tmp_path: Path) -> None:
    import base64

    address = "data:image/png;base64," + base64.b64encode((tmp_path / "a.png").read_bytes()).decode()
    one, other = (batch(build([{"text": "t <image>", "image": image}])) for image in ("a.png", address))
    assert torch.equal(one.pictures.patches_PX, other.pictures.patches_PX)


def test_no_cut_goes_through_a_picture(build, files) -> None:
    """A text of three pictures in rows of 24 tokens, 16 of which are a picture's: each is whole, nothing is lost."""
    text = "abcdefgh<image>ijkl<image>" + "m" * 9 + "<image>n"
    data = build([{"text": text, "images": ["a.png", "b.png", "c.png"]}], seq_len=24)
    pieces = data.order.pieces
    assert pieces.length_P.max() <= 24 and sum(pieces.patches_P) == 3 * TOKENS
    starts = [*pieces.start_P.tolist(), int(pieces.start_P[-1] + pieces.length_P[-1])]
    assert starts[0] == 0 and np.array_equal(np.diff(starts), pieces.length_P)
    got = batch(data)
    assert len(got.pictures.slots_F) == 3 * TOKENS and len(got.pictures.grids) == 3
    targets = sum(int(n) for n in pieces.targets_P)
    assert targets == got.num_targets


def test_an_answer_is_shortened_before_a_picture_and_a_picture_too_long_for_a_row_is_counted(build, files) -> None:
    plain = {"prompt": "all", "completion": " is well"}
    rows = [{"prompt": "abcdefghij", "completion": "kl<image>", "image": "a.png"}, plain]
    data = build(rows, seq_len=20)
    assert data.report.channels[0].truncated_rows == 1 and max(data.order.pieces.patches_P) == 0
    report = build([{"text": "<image>", "image": "a.png"}, {"text": "fine"}], seq_len=12).report
    assert report.channels[0].large_pictures == 1
    assert "1 with a picture or video longer than data.seq_len=12" in str(report)
    (bad,) = report.bad_rows()
    assert bad.line == 1 and bad.reason == "a picture alone takes 16 tokens, more than data.seq_len=12"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "<image>", "image": "missing.png"}, "missing.png"),
        (
            {"text": "<image> <image>", "image": "a.png"},
            "the text has 2 places for pictures, but the row has 1 pictures",
        ),
        ({"text": "an <image> that nobody named"}, "the text has 1 places for pictures, but the row has 0 pictures"),
        ({"text": "<image>", "image": "half.png"}, "half.png"),
    ],
)
def test_a_row_that_cannot_be_seen_is_bad(build, files, tmp_path: Path, row: dict, reason: str) -> None:
    (tmp_path / "half.png").write_bytes((tmp_path / "a.png").read_bytes()[:900])
    data = build([row, {"text": "fine"}], max_bad_fraction=0.5)
    (bad,) = data.report.bad_rows()
    assert bad.line == 1 and reason in bad.reason


def test_a_model_that_sees_nothing_refuses_pictures(build, files) -> None:
    with pytest.raises(GateError, match="the row has pictures, but this run sees none"):
        build([{"text": "<image>", "image": "a.png"}], pictures=False)


def test_a_picture_that_changed_since_is_told(build, files, picture, tmp_path: Path) -> None:
    data = build([{"text": "<image>", "image": "a.png"}])
    picture(14, 28).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png: it was 28 x 28 pixels and is 14 x 28; .* remove the token cache"):
        batch(data)


def test_same_text_with_other_pictures_is_another_sample(build, files) -> None:
    """What is held out is chosen by content: of questions about pictures the picture is a part."""
    data = build([{"text": "What is it? <image>", "image": f"{name}.png"} for name in "abc"])
    assert len(set(data.caches[0].samples["hash"].tolist())) == 3


def test_rows_with_pictures_weigh_more(build, files, config) -> None:
    from dataclasses import replace

    data = build([{"text": "t <image>", "image": "a.png"}], pictures=replace(config(), patch_cost=2.0))
    plain = build([{"text": "t <image>", "image": "a.png"}])
    (row,), (light,) = data.global_batch(0, 1), plain.global_batch(0, 1)
    assert row.cost == light.cost + 2.0 * TOKENS
