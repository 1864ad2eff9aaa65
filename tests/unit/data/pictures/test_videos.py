"""Videos through the whole pipeline: rows -> cache -> pieces -> micro-batches, against frames prepared by hand."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from data import pipeline
from data.config import DataConfig, SourceConfig
from data.peers import Peers
from data.pictures.geometry import plan
from data.pictures.looking import look_at
from data.pictures.patches import patches_of
from data.pictures.positions import rotary_positions
from data.rows import RowError

NATIVE: dict[str, Any] = {"mode": "native", "tile": None, "frames": 2, "block": 2, "rotary": True, "token": "<|i|>"}
NATIVE |= {"video_token": "<|v|>", "begin": "<b>", "end": "<e>", "tokens_per_second": 3}
NATIVE |= {"min_pixels": 196, "max_pixels": 784, "video_min_pixels": 392, "video_max_pixels": 800}
TOKENS = 4
"""Of a picture of 28 x 28 pixels and of two frames of that size."""


@pytest.fixture
def build(tmp_path: Path, tokenizer_folder: str):
    def build(rows: list[dict[str, Any]], pictures: Any, **changes: Any) -> pipeline.TrainingData:
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        given = {"seq_len": 160, "micro_batch_rows": 1, "global_batch_rows": 1, "video_frames": 5, **changes}
        cfg = DataConfig(
            sources=(SourceConfig(str(file)),), cache_dir=str(tmp_path / "cache"), tokenizer=tokenizer_folder, **given
        )
        alone = {"tokenizer_folder": None, "seed": 0, "peers": Peers.alone(), "max_seq_len": 4096}
        return pipeline.build(cfg, loss_on="all", pictures=pictures, **alone)

    return build


@pytest.fixture
def frames(tmp_path: Path, picture) -> list[Image.Image]:
    """11 frames as a.gif, and in the folder `a`; a picture p.png."""
    made = [picture(28, 28, seed).quantize(64).convert("RGB") for seed in range(11)]
    (tmp_path / "a").mkdir()
    for number, frame in enumerate(made):
        frame.save(tmp_path / "a" / f"frame{number}.png")
    made[0].save(tmp_path / "a.webp", save_all=True, append_images=made[1:], duration=200, lossless=True)
    picture(28, 28, 99).save(tmp_path / "p.png")
    return made


def batch(data: pipeline.TrainingData) -> Any:
    rows = [row for position in range(data.rows_per_epoch) for row in data.global_batch(position, 1)]
    return data.micro_batch_of(data.order.pieces, rows)


def taken(frames: list[Image.Image], count: int) -> list[Image.Image]:
    return [frames[int(number * 11 / count)] for number in range(count)]


def test_a_video_is_pairs_of_frames_among_the_pictures_of_a_native_model(build, frames, picture, config) -> None:
    cfg = config(**NATIVE)
    row = {"text": "of <image> and <video> which?", "images": ["p.png"], "videos": ["a.webp"]}
    data = build([row], cfg)
    got, video = batch(data), cfg.of_video
    still, moving = plan(28, 28, cfg), plan(28, 28, video, frames=5)
    assert got.pictures.grids == ((4, 4),) * 4 and (still.tokens, moving.tokens) == (TOKENS, 3 * TOKENS)
    patches = [patches_of(picture(28, 28, 99), still, cfg), patches_of(taken(frames, 5), moving, video)]
    assert torch.equal(got.pictures.patches_PX, torch.cat(patches))
    ids = got.tokens_T[got.pictures.slots_F].tolist()
    assert ids == [data.max_token_id - 1] * TOKENS + [data.max_token_id] * 3 * TOKENS
    assert got.pictures.order_F.tolist() == list(range(4 * TOKENS)) and not (got.targets_T >= min(ids)).any()
    starts = [int(got.pictures.slots_F[at]) for at in (0, TOKENS)]
    pace = 3 * 2 * 0.2 * 11 / 5  # positions a second, frames a step, seconds from frame to taken frame
    shapes = [(starts[0], (1, 2, 2)), (starts[1], (3, 2, 2))]
    expected = rotary_positions(len(got.tokens_T), shapes, [1, pace])
    assert torch.equal(got.rotary_3T, torch.from_numpy(expected)) and int(expected[0, starts[1] + 4 * 2]) > 5
    channel = data.report.channels[0]
    assert (channel.pictures, channel.videos) == (1, 1) and "videos" in str(data.report)


def ways(folder: Path) -> list[Any]:
    names = [f"a/frame{number}.png" for number in range(11)]
    encoded = [base64.b64encode((folder / name).read_bytes()).decode() for name in names]
    part: dict[str, Any] = {"type": "video", "video": [f"file://{folder / name}" for name in names], "sample_fps": 5}
    asked = {"role": "user", "content": [part, {"type": "text", "text": "?"}]}
    return [
        {"text": "<video>?", "videos": [{"frames": names, "fps": 5}]},
        {"text": "<video>?", "video": {"frames": "a", "fps": 5}},
        {"text": "<video>?", "video": {"path": "a", "fps": 5}},
        {"text": "<video>?", "videos": [{"frames": [f"data:image/png;base64,{text}" for text in encoded], "fps": 5}]},
        {"messages": [asked, {"role": "assistant", "content": "yes"}]},
    ]


def test_every_way_to_name_a_video_shows_the_same(build, frames, tmp_path: Path, config) -> None:
    cfg = config(**NATIVE)
    wanted = batch(build([{"text": "<video>?", "video": "a.webp"}], cfg)).pictures
    for row in ways(tmp_path):
        got = batch(build([row], cfg))
        assert torch.equal(got.pictures.patches_PX, wanted.patches_PX), row
        times = got.rotary_3T[0, got.pictures.slots_F]
        assert (times - times[0]).tolist() == [0] * 4 + [2] * 4 + [5] * 4  # 2.64 positions a step
    unknown = batch(build([{"text": "<video>?", "video": [f"a/frame{n}.png" for n in range(11)]}], cfg))
    times = unknown.rotary_3T[0, unknown.pictures.slots_F]
    assert (times - times[0]).tolist() == [0] * 4 + [3] * 4 + [6] * 4  # nobody says: two frames a second


@pytest.mark.parametrize("mode", ["fixed", "anyres", "tiles"])
def test_elsewhere_each_frame_is_a_picture_of_one_tile(build, frames, tmp_path: Path, config, mode: str) -> None:
    shown: dict[str, Any] = {"tile": 28, "block": 2, "grids": ((28, 56),), "newline": mode == "anyres"}
    cfg = config(mode=mode, begin="<b>", end="<e>", **shown)
    one = config(fit="squash" if mode == "anyres" else "crop", **shown | {"newline": False})
    patches = torch.cat([patches_of(frame, plan(28, 28, one), one) for frame in taken(frames, 5)])
    for video in ("a.webp", "a"):
        data = build([{"text": "<video> and <image>", "image": "p.png", "video": video}], cfg)
        got = batch(data)
        assert torch.equal(got.pictures.patches_PX[: len(patches)], patches)
        slots = got.pictures.slots_F.tolist()
        gap = slots[4] - slots[3]
        assert gap > 1 and slots[:20] == [slots[0] + (4 + gap - 1) * (n // 4) + n % 4 for n in range(20)]
        assert (data.report.channels[0].pictures, data.report.channels[0].videos) == (1, 1)


@pytest.mark.parametrize("mode", ["native", "fixed"])
def test_no_cut_goes_through_a_video(build, frames, config, mode: str) -> None:
    cfg = config(**NATIVE) if mode == "native" else config(block=2)
    tokens = 12 + 6 if mode == "native" else 20
    row = {"text": "abcdefgh<video>ijkl<video>" + "m" * 9, "videos": ["a.webp", "a"]}
    data = build([row], cfg, seq_len=tokens + 3)
    pieces = data.order.pieces
    assert pieces.length_P.max() <= tokens + 3
    assert sum(n > 0 for n in pieces.patches_P.tolist()) == 2
    report = build([row, {"text": "fine"}], cfg, seq_len=tokens - 1).report
    (bad,) = {(bad.line, bad.reason) for bad in report.bad_rows()}
    assert bad == (1, f"a video alone takes {tokens} tokens, more than data.seq_len={tokens - 1}")


BAD: list[tuple[dict[str, Any], str]] = [
    ({"video": "none.gif"}, "none.gif: the file cannot be opened: no such file or directory"),
    ({"video": "film.mp4"}, "film.mp4: it is a film, which nothing here decodes; take its frames out (ffmpeg -i"),
    ({"video": "half.webp"}, "half.webp: the picture is"),
    ({"video": "empty"}, "empty: the folder holds no frames"),
    ({"video": {"frames": []}}, "a video has an empty list of frames"),
    ({"video": ["p.png", "wide.png"]}, "the frames have different sizes: 28 x 28 and 56 x 28 pixels"),
    ({"video": ["p.png", "none.png"]}, "of 2 frames from"),
    ({"video": {"frames": "a", "fps": 0}}, "the fps of a video is 0, not a number above 0"),
    ({"video": "https://a/b.gif"}, "the video https://a/b.gif is on the network"),
    ({"video": "many.gif"}, "the video is too large: "),
    ({"video": "a", "text": "<video> <video>"}, "the text has 2 places for videos, but the row has 1 videos"),
    ({"videos": ["a", "a"], "image": "p.png"}, "the text has 1 places for videos, but the row has 2 videos"),
]


@pytest.mark.parametrize("mode", ["native", "fixed"])
def test_what_cannot_be_seen_is_a_bad_row(build, frames, picture, tmp_path: Path, config, mode: str) -> None:
    (tmp_path / "film.mp4").write_bytes(b"\0\0\0\x20ftypisom" + bytes(50))
    (tmp_path / "half.webp").write_bytes((tmp_path / "a.webp").read_bytes()[:9000])
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("none")
    picture(56, 28).save(tmp_path / "wide.png")
    stills = [picture(28, 28, seed) for seed in range(2)] * 40
    stills[0].save(tmp_path / "many.gif", save_all=True, append_images=stills[1:])
    rows = [{"text": "<video>"} | row for row, _ in BAD] + [{"text": "fine"}]
    cfg = config(**NATIVE) if mode == "native" else config()
    report = build(rows, cfg, max_bad_fraction=0.99, max_picture_pixels=50_000).report
    found = list(report.bad_rows())
    assert [bad.line for bad in found] == list(range(1, len(BAD) + 1))
    for bad, (_, reason) in zip(found, BAD, strict=True):
        assert reason in bad.reason and "\n" not in bad.reason


def test_a_video_that_changed_since_is_told(build, frames, picture, tmp_path: Path, config) -> None:
    data = build([{"text": "<video>", "video": "a.webp"}], config(**NATIVE))
    again = "it was well when its row was tokenised: remove the token cache"
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:3], duration=200, lossless=True)
    with pytest.raises(ValueError, match=rf"the video .*a\.webp: it had 5 frames or more and has 3; {again}"):
        batch(data)
    wide = [picture(56, 28, seed) for seed in range(5)]
    wide[0].save(tmp_path / "a.webp", save_all=True, append_images=wide[1:], duration=200, lossless=True)
    with pytest.raises(ValueError, match=rf"it was 28 x 28 pixels and is 56 x 28; {again}"):
        batch(data)


def test_both_answers_of_a_pair_show_the_video(frames, tmp_path: Path, config) -> None:
    """And each has its own number of places, in one order."""
    cfg = config(block=2, video_frames=3)
    ask = {"role": "user", "content": "<image> then <video>"}
    said = [{"role": "assistant", "content": text} for text in ("good", "bad")]
    shown = {"image": "p.png", "video": "a"}
    row, seen, _ = look_at({"chosen": [ask, said[0]], "rejected": [ask, said[1]]} | shown, str(tmp_path), cfg, 10**6)
    assert [each.frames for each in seen] == [0, 3, 3, 3] and [each.frame for each in seen] == [0, 0, 1, 2]
    wanted = "<image> then <image><image><image>"
    assert [row[name][0]["content"] for name in ("chosen", "rejected")] == [wanted] * 2
    other = {"role": "user", "content": "<video> then <image>"}
    with pytest.raises(RowError, match="chosen and rejected show pictures and videos in different order"):
        look_at({"chosen": [ask, said[0]], "rejected": [other, said[1]]} | shown, str(tmp_path), cfg, 10**6)
    html = {"text": "<video> is a tag of HTML, <image> is none"}
    assert look_at(html, "", cfg, 10**6)[0] is html
