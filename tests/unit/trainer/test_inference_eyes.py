"""What is asked with pictures is what training shows: the same tokens, patches and positions."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data import pipeline
from data.cache_files import BadRow
from data.chat import template_renderer
from data.config import DataConfig, SourceConfig
from data.formats import RowError
from data.peers import Peers
from models import Decoder
from models.generation import Generator
from models.generation.dialogue import Dialogue
from parallel.sharding import SINGLE
from tests import tp_cases
from tests.sight_cases import MODELS
from tests.unit.data.conftest import make_tokenizer
from trainer.evaluation import questions, tasks
from trainer.evaluation.completions import TaskEncoder
from trainer.evaluation.rows import RowFile
from trainer.inference.conversation import Conversation
from trainer.inference.eyes import BLIND, Eyes
from trainer.inference.prompts import Asking, Prompter
from trainer.pictures import picture_config

ASKED: list[dict[str, Any]] = [
    {"role": "user", "content": "Of <image> and <image> which?"},
    {"role": "assistant", "content": "The first."},
    {"role": "user", "content": "Why?"},
]
ANSWERED = [*ASKED, {"role": "assistant", "content": "It is."}]
IMAGES = ["a.png", "b.png"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    draw = np.random.default_rng(0)
    for name, shape in (("a", (40, 50, 3)), ("b", (60, 30, 3))):
        Image.fromarray(draw.integers(0, 256, shape, dtype=np.uint8)).save(tmp_path / f"{name}.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:900])
    (tmp_path / "rows.jsonl").write_text(json.dumps({"images": IMAGES, "messages": ANSWERED}) + "\n")
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return tmp_path


@pytest.mark.parametrize("moving", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_prompt_is_what_training_shows_before_the_answer(name: str, moving: bool, folder: Path) -> None:
    model, tokenizer = replace(MODELS[name], vocab_size=4096), make_tokenizer()
    rows, shown, asked = (SourceConfig(str(folder / "rows.jsonl")),), {"images": IMAGES}, ASKED
    if moving:
        shown |= {"videos": [{"frames": ["a.png"] * 3, "fps": 4}]}
        asked = [ASKED[0] | {"content": "Of <image>, <video> and <image> which?"}, *ASKED[1:]]
        (folder / "rows.jsonl").write_text(json.dumps(shown | {"messages": [*asked, ANSWERED[-1]]}))
    sizes: dict[str, Any] = {"seq_len": 2048, "micro_batch_rows": 1, "global_batch_rows": 1}
    places: dict[str, Any] = {"tokenizer": str(folder / "tokenizer"), "cache_dir": str(folder / "cache")}
    cfg = DataConfig(sources=rows, **sizes, **places)
    alone: dict[str, Any] = {"tokenizer_folder": None, "seed": 0, "peers": Peers.alone(), "max_seq_len": 2048}
    data = pipeline.build(cfg, loss_on="assistant", pictures=picture_config(model), **alone)
    batch = data.micro_batch_of(data.order.pieces, data.global_batch(0, 1))

    eyes, render = Eyes.of(model, tokenizer), template_renderer(tokenizer, None, "here")
    asking = Asking({}, False, True, eyes, str(folder))
    request = Prompter(tokenizer, render, eyes).request(asking.asked(shown | {"messages": asked}, 1))
    length = len(request.prompt)
    assert list(request.prompt) == batch.tokens_T[:length].tolist()
    sight, pictures = request.sight, batch.pictures
    assert sight is not None and pictures is not None and sight.pictures.grids == pictures.grids
    for field in ("patches_PX", "slots_F", "order_F"):
        assert torch.equal(getattr(sight.pictures, field), getattr(pictures, field))
    assert (sight.rotary_3L is None) == (batch.rotary_3T is None)
    if sight.rotary_3L is not None and batch.rotary_3T is not None:
        assert torch.equal(sight.rotary_3L, batch.rotary_3T[:, :length])

    (task,) = tasks.read(RowFile(str(folder / "rows.jsonl"), option="--tasks"), eyes)
    assert isinstance(task, tasks.Task) and task.answers == ("It is.",)
    assert moving or task.described()["pictures"] == [str(folder / image) for image in IMAGES]
    tokens, shown = TaskEncoder(tokenizer, render, False, eyes).shown(task)
    assert tokens == list(request.prompt) and shown is not None and shown.identity() == sight.identity()


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"image": "none.png", "prompt": "a"}, "none.png: the file cannot be opened"),
        ({"image": "cut.png", "prompt": "a"}, "cut.png: the picture is cut off"),
        ({"image": "rows.jsonl", "prompt": "a"}, "rows.jsonl: the file is not a picture"),
        ({"image": "a.png", "prompt": "<image> or <image>"}, "2 places for pictures (<image>), but there are 1"),
        ({"prompt": "<image>"}, "1 places for pictures (<image>), but there are 0"),
    ],
)
def test_pictures_that_cannot_be_used_are_told(row: dict[str, Any], reason: str, folder: Path) -> None:
    tokenizer = make_tokenizer()
    eyes = Eyes.of(replace(MODELS["llava"], vocab_size=4096), tokenizer)
    with pytest.raises(RowError) as told:
        Prompter(tokenizer, None, eyes).request(Asking({}, False, True, eyes, str(folder)).asked(row, 1))
    assert reason in str(told.value)


def test_a_model_that_sees_none_says_so(folder: Path) -> None:
    with pytest.raises(RowError, match="sees none"):
        Asking({}, False, True, BLIND, str(folder)).asked({"image": "a.png", "prompt": "a"}, 1)
    (bad,) = tasks.read(RowFile(str(folder / "rows.jsonl"), option="--tasks"))
    assert isinstance(bad, BadRow) and "sees none" in bad.reason
    choosing = {"question": "a", "image": "a.png", "choices": ["b", "c"], "answer": 0}
    (folder / "choices.jsonl").write_text(json.dumps(choosing))
    (bad,) = questions.read(RowFile(str(folder / "choices.jsonl")))
    assert isinstance(bad, BadRow) and "does not show" in bad.reason
    with pytest.raises(ValueError, match="stands for pictures"):
        Eyes.of(MODELS["llava"], make_tokenizer())


def test_a_conversation_keeps_its_pictures(folder: Path) -> None:
    tokenizer: Any = make_tokenizer()
    cfg = replace(MODELS["qwen2_vl"], vocab_size=len(tokenizer) + 1)
    model = tp_cases.model_of(cfg, SINGLE)
    assert isinstance(model, Decoder)
    eyes, render = Eyes.of(cfg, tokenizer), template_renderer(tokenizer, None, "here")
    generator = Generator(model, tokenizer)
    talk = Conversation(Dialogue(generator), render, {"max_new_tokens": 4}, eyes=eyes)

    def alone() -> str | None:
        shown = {name: [path for turn in talk.turns for path in turn.get(name, ())] for name in ("images", "videos")}
        said = [{"role": turn["role"], "content": turn["content"]} for turn in talk.turns[:-1]]
        asking = Asking({"max_new_tokens": 4}, False, True, eyes)
        request = Prompter(tokenizer, render, eyes).request(asking.asked(shown | {"messages": said}, 1))
        return generator.generate([request])[0].text

    asked = [("a", "What?", "<image>\nWhat?"), ("b", "<image>?", "<image>?"), ("", "So?", "So?")]
    for name, question, written in asked:
        if name:
            talk.show(str(folder / f"{name}.png"))
        answer = "".join(talk.answer(question))
        assert talk.turns[-2]["content"] == written and not talk.images
        assert answer == talk.turns[-1]["content"] == alone()
    (folder / "frames").mkdir()
    for number in range(3):
        (folder / "frames" / f"{number}.png").write_bytes((folder / "a.png").read_bytes())
    talk.show(str(folder / "frames"), video=True)
    answer = "".join(talk.answer("Moves it?"))
    assert talk.turns[-2]["content"] == "<video>\nMoves it?" and answer == alone() and not talk.videos
    assert talk.undo().startswith("<video>") and talk.videos == [str(folder / "frames")]
    talk.videos.clear()
    talk.undo()
    assert talk.undo() == "<image>?" and talk.images == [str(folder / "b.png")]
    with pytest.raises(ValueError, match="cannot be opened"):
        talk.show(str(folder / "none.png"))
    with pytest.raises(ValueError, match="sees none"):
        Conversation(talk.dialogue, render).show(str(folder / "a.png"))
