"""scripts/inspect_model.py with pictures: what words look at, drawn and in numbers; and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration

from convert.from_hf import whole_shapes
from convert.to_hf import export
from data.pictures.geometry import plan
from data.pictures.patches import patches_of
from models import ModelConfig
from models.init import InitSource
from scripts import inspect_looks, inspect_model, inspect_pictures
from scripts.inspect_heat import painted
from scripts.params import load_model
from tests.unit.convert.test_loom_files import write_run
from tests.unit.scripts.test_inspect_model import tokenizer  # noqa: F401
from trainer.pictures import picture_config

ASKED = ("ab<image>cad", "ab <image>g<image> ba ")
TEMPLATE = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}{% if add_generation_prompt %}&{% endif %}"


def sized(name: str) -> ModelConfig:
    return dataclasses.replace(load_model(name, []), vocab_size=20, max_seq_len=64, init_std=0.3)


def folder_of(name: str, folder: Path, reader: Path) -> Path:
    cfg, source = sized(name), InitSource(sized(name), 3)
    return export(folder, cfg, ((each, source.tensor(each)) for each in whole_shapes(cfg)), reader)


@pytest.fixture
def here(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: F811
    """A folder with pictures, as the current one; drawings that others test are left out."""
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0)
    for name, size in {"a": (40, 50), "b": (70, 30), "c": (28, 28)}.items():
        Image.fromarray(draw.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(f"{name}.png")
    Path("cut.png").write_bytes(Path("a.png").read_bytes()[:900])
    Path("reader").symlink_to(tokenizer)
    monkeypatch.setattr(inspect_model, "sections", lambda *_: [])
    monkeypatch.setattr(inspect_looks, "png", lambda *_: b"")
    return tmp_path


def words(model: Path, *more: str) -> list[str]:
    texts = [word for text in ASKED for word in ("--text", text)]
    images = [word for name in "abc" for word in ("--image", f"{name}.png")]
    return ["--model", str(model), *texts, *images, "--out", "a.html", "--png", ".", *more]


def test_words_their_pictures_and_the_numbers_of_transformers(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspect_looks, "png", inspect_pictures.png)
    model = folder_of("tiny_llava", here / "hf", here / "reader")
    assert inspect_model.main(words(model, "--word", "a", "--heads", "1,3")) == 0
    found = json.loads(Path("a.json").read_text())
    assert [each["tokens"] for each in found["pictures"]] == [[2, 18], [24, 40], [41, 57]]
    assert [(each["name"], each["width"], each["height"]) for each in found["pictures"]] == [
        ("a.png", 40, 50), ("b.png", 70, 30), ("c.png", 28, 28),
    ]  # fmt: skip
    looks = [(each["says"], each["places"], each["picture"]) for each in found["looks"]]
    second = [(says, [place], i) for says, place in ((True, 58), (False, 59)) for i in (1, 2)]
    assert looks == [(True, [18], 0), (False, [19], 0), *second]

    theirs = LlavaForConditionalGeneration.from_pretrained(model, attn_implementation="eager")
    theirs.config.image_token_id = found["tokens"][2]["id"]
    cfg = picture_config(sized("tiny_llava"))
    assert cfg is not None
    tokens = torch.tensor([[each["id"] for each in found["tokens"]][: found["borders"][1]]])
    image = Image.open("a.png")
    patches = patches_of(image, plan(*image.size, cfg), cfg).view(4, 4, 3, 7, 7)
    pixels = patches.permute(2, 0, 3, 1, 4).reshape(1, 3, 28, 28)
    with torch.no_grad():
        said = theirs(input_ids=tokens, pixel_values=pixels, output_attentions=True)
    for number, place in ((0, 18), (1, 19)):
        for layer, weights in zip(found["looks"][number]["layers"], said.attentions, strict=True):
            wanted = weights[0][[1, 3], place, 2:18]
            np.testing.assert_allclose(layer["spots"], wanted.mean(0), rtol=0, atol=1e-5)
            each = [head["weight"] for head in layer["heads"]]
            np.testing.assert_allclose(each, wanted.sum(1), rtol=0, atol=1e-5)
            assert layer["weight"] == pytest.approx(wanted.sum(1).mean().item(), abs=1e-5)
    page = Path("a.html").read_text()
    assert page.count("data:image/png;base64,") == 2 * len(looks) and 'src="http' not in page
    assert all(Path(f"look_{i}{kind}.png").is_file() for i in range(len(looks)) for kind in ("", "_heads"))
    assert "What words look at in the pictures" in page and "at &#x27;a&#x27;, b.png" in page


@pytest.mark.parametrize("name", ["tiny_perceiver", "tiny_qwen2_vl", "tiny_internvl"])
def test_runs_and_all_kinds_of_connectors(here: Path, name: str) -> None:
    """Without words the last token of each text looks; marks are not needed; the weight on a picture is that on its
    spots."""
    cfg = dataclasses.replace(sized(name), vocab_size=24, max_seq_len=128)
    write_run(here / "run", cfg)
    own = ["--model", "run", "--tokenizer", "reader", "--text", "abc", "--out", "a.html", "--no-gradients"]
    assert inspect_model.main([*own, "--image", "a.png", "--image", "b.png"]) == 0
    found = json.loads(Path("a.json").read_text())
    assert [each["picture"] for each in found["looks"]] == [0, 1]
    assert found["tokens"][-3]["text"] == "a" and found["looks"][0]["places"] == [len(found["tokens"]) - 1]
    for look in found["looks"]:
        regions = found["pictures"][look["picture"]]["regions"]
        for layer in look["layers"]:
            assert len(layer["spots"]) == len(regions) and sum(layer["spots"]) == pytest.approx(
                layer["weight"], rel=1e-4
            )
    assert ("learnt queries" in Path("a.html").read_text()) == (name == "tiny_perceiver")


def test_pictures_that_are_read_apart_are_told(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(here / "run", dataclasses.replace(sized("tiny_flamingo"), vocab_size=24, max_seq_len=128))
    own = ["--model", "run", "--tokenizer", "reader", "--text", "abc", "--out", "a.html", "--image", "a.png"]
    assert inspect_model.main(own) == 0
    found = json.loads(Path("a.json").read_text())
    assert "looks" not in found and [each["text"] for each in found["tokens"]].count("<image>") == 1
    assert inspect_model.main([*own, "--word", "b"]) == 2
    assert "in layers of their own (model.vision.cross)" in capsys.readouterr().err


def test_questions_and_answers_by_the_chat_template(here: Path) -> None:
    model = folder_of("tiny_llava", here / "hf", here / "reader")
    (model / "chat_template.jinja").write_text(TEMPLATE)
    asked = ["--model", str(model), "--image", "a.png", "--text", "a<image>", "--chat", "--out", "a.html"]
    assert inspect_model.main(asked) == 0
    found = json.loads(Path("a.json").read_text())
    assert "".join(each["text"] for each in found["tokens"]) == "<a" + 16 * "<image>" + ">&"
    assert inspect_model.main([*asked, "--answer", "bag", "--word", "bag"]) == 0
    found = json.loads(Path("a.json").read_text())
    assert [each["places"] for each in found["looks"]] == [[19, 20, 21], [20, 21, 22]]


def test_weights_are_spread_over_their_regions() -> None:
    regions = np.array([[0, 0, 2, 2], [2, 0, 4, 2], [-4, 0, 4, 4], [np.nan] * 4])
    got = painted(np.array([1.0, 2.0, 8.0, 5.0]), regions, (4, 4), (2, 2))
    np.testing.assert_allclose(got, [[2, 3], [1, 1]])  # half of the third lies outside
    fine = painted(np.array([1.0, 2.0, 8.0, 5.0]), regions, (4, 4), (8, 8))
    np.testing.assert_allclose(fine.reshape(2, 4, 2, 4).sum((1, 3)), got)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--text", "a", "--image", "none.png"], "--image: picture ./none.png: the file cannot be opened"),
        (["--text", "a", "--image", "cut.png"], "the picture is cut off"),
        (["--text", "a<image><image>", "--image", "a.png"], "2 places for pictures (<image>), and 1 are given"),
        (["--text", "a<image>"], "1 places for pictures (<image>), and 0 are given"),
        (["--text", "a", "--text", "b", "--image", "a.png"], "say with <image> where each picture stands"),
        (["--text", "a", "--image", "a.png", "--image", "b.png", "--image", "c.png", "--image", "a.png"], "66 tokens"),
        (
            ["--text", "a", "--image", "a.png", "--word", "x"],
            "--word x: it does not stand in the text behind a picture",
        ),
        (["--text", "a" * 14, "--image", "a.png", "--word", "a"], "these stand 14 times"),
        (["--text", "a", "--word", "a"], "--word is about pictures"),
        (["--text", "a", "--image", "a.png", "--chat"], "has no chat template"),
        (["--text", "a", "--answer", "b"], "--answer belongs to --chat"),
        (["--text", "a", "--image", "a.png", "--model", "blind"], "the model sees no pictures"),
    ],
)
def test_mistakes_are_told_in_a_sentence(here: Path, capsys: Any, more: list[str], says: str) -> None:
    name = "tiny_llama" if "blind" in more else "tiny_llava"
    folder_of(name, here / ("blind" if "blind" in more else "hf"), here / "reader")
    asked = [*more, "--out", "a.html"] if "--model" in more else ["--model", "hf", *more, "--out", "a.html"]
    assert inspect_model.main(asked) == 2
    err = capsys.readouterr().err
    assert says in err and "Traceback" not in err and err.count("\n") == 1 and not Path("a.html").exists()
