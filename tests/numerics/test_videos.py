"""Qwen2-VL and Qwen2.5-VL give transformers' logits for a row with pictures and videos; fp32, 1e-5.

Tokens, patches and positions are made by the data room; transformers gets the patches and grids and finds the positions
itself. (Its video processor needs torchvision, which is no dependency; the patches of frames are compared with those of
its image processors in tests/unit/data/pictures.)
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data.pictures.loader import gathered
from data.pictures.looking import look_at
from data.pictures.seen import patches_of_all, plan_of, rotary_of
from tests.numerics.test_seeing import SPECIAL, TOKEN, opened, qwen2_5_vl, qwen2_vl, random
from trainer.pictures import picture_config

ROW: dict[str, Any] = {
    "text": "abc<video>de<image>f<video>ghijk",
    "image": "still.png",
    "videos": [{"frames": "wide", "fps": 8}, {"frames": [f"high/{n}.png" for n in range(4)], "fps": 2.5}],
}
"""5 frames that are 3 steps in time, wider than they are long; 4 frames, 2 steps."""
AROUND = {"\2": SPECIAL["vision_start_token_id"], "\3": SPECIAL["vision_end_token_id"]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    draw = np.random.default_rng(0)
    for name, count, size in (("wide", 5, (112, 50)), ("high", 4, (40, 90)), ("still", 1, (60, 70))):
        (tmp_path / name).mkdir()
        for number in range(count):
            pixels = draw.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{number}.png")
    (tmp_path / "still" / "0.png").rename(tmp_path / "still.png")
    return tmp_path


@pytest.mark.parametrize("make", [qwen2_vl, qwen2_5_vl])
def test_logits_of_a_row_with_videos_are_transformers(make: Any, folder: Path) -> None:
    theirs = random(make())
    theirs.save_pretrained(folder / "model")
    limits = {"size": {"shortest_edge": 784, "longest_edge": 6000}}
    (folder / "model" / "video_preprocessor_config.json").write_text(json.dumps(limits))
    ours = opened(folder / "model")
    cfg = picture_config(ours.cfg)
    assert cfg is not None and cfg.tokens == ("<|image_pad|>", "<|video_pad|>")
    assert (cfg.tokens_per_second is None) == (make is qwen2_vl)

    row, seen, _ = look_at(ROW, str(folder), cfg, 10**6)
    plans = [plan_of(each, cfg) for each in seen]
    assert [each.frames for each in seen] == [5, 0, 4] and [len(each.grids) for each in plans] == [3, 1, 2]
    tokens: list[int] = []
    starts: list[int] = []
    rest = row["text"].replace("<|vision_start|>", "\2").replace("<|vision_end|>", "\3")
    for sign in rest.replace("<|video_pad|>", "\1").replace("<|image_pad|>", "\0"):
        if sign in "\0\1":
            starts.append(len(tokens))
            tokens += [TOKEN if sign == "\0" else SPECIAL["video_token_id"]] * plans[len(starts) - 1].tokens
        else:
            tokens.append(AROUND.get(sign, ord(sign)))
    patches = patches_of_all(seen, plans, cfg, 10**6)
    pictures, _ = gathered(plans, patches, starts, cfg)
    rotary = torch.from_numpy(rotary_of(len(tokens), starts, seen, plans, cfg))
    ids = torch.tensor(tokens)
    length = torch.tensor([0, len(tokens)])
    told: dict[str, Any] = {"pictures": pictures, "rotary_3T": rotary, "output": "head"}
    logits = ours(ids, torch.arange(len(tokens)), length, **told)

    grids = [[len(each.grids), *each.grids[0]] for each in plans]
    more: dict[str, Any] = {} if make is qwen2_vl else {"second_per_grid_ts": torch.tensor([2 / 8, 2 / 2.5])}
    types = (ids == TOKEN).int() + 2 * (ids == SPECIAL["video_token_id"]).int()
    wanted = theirs(
        input_ids=ids[None],
        pixel_values=patches[1],
        image_grid_thw=torch.tensor(grids[1:2]),
        pixel_values_videos=torch.cat([patches[0], patches[2]]),
        video_grid_thw=torch.tensor([grids[0], grids[2]]),
        mm_token_type_ids=types[None],
        **more,
    ).logits[0]
    torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())
    flat = ours(ids, torch.arange(len(tokens)), length, **told | {"rotary_3T": None})
    assert (flat - logits).abs().max() > 1e-3
