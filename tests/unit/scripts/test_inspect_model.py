"""scripts/inspect_model.py: the page and the numbers, equal from every kind of checkpoint; mistakes are told calmly."""

import base64
import dataclasses
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from convert import hf_to_mega
from convert.from_hf import whole_shapes
from convert.to_hf import export
from models import ModelConfig
from models.init import InitSource
from scripts import inspect_model
from scripts.inspect_model import choose
from scripts.inspect_pictures import label
from scripts.params import load_model
from tests.unit.convert.test_loom_files import write_run

SIGNS = "#<>abcdefgh &$"
TEXT = ("abc de <b>&", "hag $")
MODELS = ("tiny_llama", "tiny_qwen3_moe", "tiny_deepseek_v3")


def sized(name: str) -> ModelConfig:
    return dataclasses.replace(load_model(name, []), vocab_size=20, max_seq_len=64, init_std=0.3)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    """One token for each sign."""
    folder = tmp_path_factory.mktemp("tokenizer")
    backend = Tokenizer(models.WordLevel({sign: i for i, sign in enumerate(SIGNS)}, unk_token="#"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")  # type: ignore[assignment]
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="#", eos_token="#").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer) -> dict[str, Path]:
    """The tiny models with the weights of seed 3, as Hugging Face folders with the tokenizer."""
    found = {}
    for name in MODELS:
        cfg, source = sized(name), InitSource(sized(name), 3)
        weights = ((each, source.tensor(each)) for each in whole_shapes(cfg))
        found[name] = export(tmp_path_factory.mktemp(name) / "hf", cfg, weights, tokenizer)
    return found


def words(folder: Path, out: Path, *more: str) -> list[str]:
    texts = [word for text in TEXT for word in ("--text", text)]
    return ["--model", str(folder), *texts, "--out", str(out), *more]


class Seen(HTMLParser):
    """What a browser would load and show."""

    def __init__(self) -> None:
        super().__init__()
        self.images: list[str] = []
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        if tag == "img":
            self.images.append(dict(attrs)["src"] or "")
        elif tag not in ("meta",):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize("model", MODELS)
def test_the_page_holds_all_and_the_numbers_are_the_models(tmp_path, folders, model):
    out, pictures = tmp_path / "new" / "look.html", tmp_path / "pictures"
    assert inspect_model.main(words(folders[model], out, "--png", str(pictures))) == 0
    seen = Seen()
    seen.feed(out.read_text(encoding="utf-8"))
    assert seen.open == [] and 'src="http' not in out.read_text()
    shown = [base64.b64decode(image.removeprefix("data:image/png;base64,")) for image in seen.images]
    assert all(picture.startswith(b"\x89PNG") for picture in shown)
    assert sorted(shown) == sorted(path.read_bytes() for path in pictures.glob("*.png"))
    cfg = sized(model)
    names = {path.stem for path in pictures.glob("*.png")}
    assert names >= {
        "profile",
        "cosine",
        "norm",
        "gradient",
        "heads",
        *(f"attention_{i}" for i in range(cfg.num_layers)),
    }
    assert ("experts" in names) == (cfg.moe is not None)
    assert "abc de <b>&" in seen.text and "What the heads look at" in seen.text

    numbers = json.loads(out.with_suffix(".json").read_text())
    theirs = AutoModelForCausalLM.from_pretrained(folders[model], dtype=torch.float32)
    reader = AutoTokenizer.from_pretrained(folders[model])
    losses, tops = [], []
    for text in TEXT:
        ids = reader(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = theirs(ids).logits[0]
        losses += torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="none").tolist()
        tops += logits.argmax(1).tolist()
    assert numbers["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    last = numbers["layers"][-1]
    assert [top[0]["id"] for top in last["lens"]["top"]] == tops
    assert last["lens"]["loss"] == pytest.approx(numbers["loss"], rel=1e-5)
    assert [token["text"] for token in numbers["tokens"]] == list("".join(TEXT)) and numbers["borders"] == [0, 11, 16]
    assert [layer["layer"] for layer in numbers["layers"]] == list(range(cfg.num_layers))
    assert all(len(layer["heads"]) == cfg.num_heads for layer in numbers["layers"])
    assert all(layer["gradient"]["weights"]["attention"] > 0 for layer in numbers["layers"])
    assert set(numbers["gradients_outside_layers"]) == {"embed.weight", "norm.weight", "head.weight"}


@pytest.mark.parametrize("model", MODELS)
def test_every_kind_of_checkpoint_gives_the_same_numbers(tmp_path, folders, tokenizer, model, monkeypatch):
    monkeypatch.setattr(inspect_model, "sections", lambda *_: [])  # pictures cost the time and are tested above
    ep = 2 if sized(model).moe else 1
    given = {"hf": (folders[model], [])}
    for form, layout in (("torch", (2, 2)), ("torch_dist", (1, 2)), ("safetensors", (2, 1))):
        made = tmp_path / form
        layout_words = ["--tp", str(layout[0]), "--pp", str(layout[1]), "--ep", str(ep), "--workers", "1"]
        if layout[1] == 2:
            layout_words += ["--pp-layout", f"{sized(model).num_layers - 1},1"]
        hf_to_mega.run(["--hf", str(folders[model]), "--out", str(made), "--format", form, *layout_words])
        given[form] = (made, [])
    write_run(tmp_path / "run", sized(model), tp=2, ep=ep)
    given["loom"] = (tmp_path / "run", ["--tokenizer", str(tokenizer)])
    found = {}
    for kind, (folder, more) in given.items():
        out = tmp_path / f"{kind}.html"
        assert inspect_model.main(words(folder, out, *more)) == 0, kind
        found[kind] = json.loads(out.with_suffix(".json").read_text())
        found[kind].pop("model")
    assert all(numbers == found["hf"] for numbers in found.values())


def test_some_layers_and_heads_and_no_gradients(tmp_path, folders):
    out, more = tmp_path / "a.html", ["--layers", "1", "--heads", "0,2-3", "--topk", "2", "--no-gradients"]
    assert inspect_model.main(words(folders["tiny_llama"], out, "--png", str(tmp_path), *more)) == 0
    numbers = json.loads(out.with_suffix(".json").read_text())
    (layer,) = numbers["layers"]
    assert layer["layer"] == 1 and [head["head"] for head in layer["heads"]] == [0, 2, 3]
    assert len(layer["lens"]["top"][0]) == 2 and "gradient" not in layer
    maps = {path.stem for path in tmp_path.glob("attention_1_*.png")}
    assert maps == {"attention_1_0", "attention_1_2", "attention_1_3"}  # few maps are all drawn large


def test_one_token_is_a_text_too(tmp_path, folders):
    out = tmp_path / "a.html"
    assert inspect_model.main(["--model", str(folders["tiny_llama"]), "--text", "a", "--out", str(out)]) == 0
    assert json.loads(out.with_suffix(".json").read_text())["loss"] is None


def test_a_broken_layer_is_named_and_does_not_stop_the_report(tmp_path, folders, capsys):
    folder = tmp_path / "broken"
    folder.mkdir()
    for path in folders["tiny_llama"].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 0] = math.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    out = tmp_path / "a.html"
    assert inspect_model.main(words(folder, out, "--heads", "0")) == 0
    assert "Layer 1 is the first" in capsys.readouterr().err and "Layer 1 is the first" in out.read_text()
    layers = json.loads(out.with_suffix(".json").read_text())["layers"]
    assert [layer["not_finite"] for layer in layers[:2]] == [0, 16] and layers[1]["norm"]["mean"] is None


def test_a_long_text_is_shown_in_blocks(tmp_path, folders):
    out, file = tmp_path / "a.html", tmp_path / "text.txt"
    file.write_text("abcdefgh" * 8)
    more = [
        "--model",
        str(folders["tiny_llama"]),
        "--text-file",
        str(file),
        "--layers",
        "0",
        "--heads",
        "0",
        "--out",
        str(out),
    ]
    assert inspect_model.main(more) == 0
    assert "The first 48 of 64 tokens" in out.read_text()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--text", " "], "the text is empty"),
        (["--text", "a" * 65], "the text has 65 tokens and the model's context is 64"),
        (["--text-file", "none.txt"], "there is no such file"),
        (["--text-file", "latin.txt"], "not UTF-8"),
        (["--text", "a", "--layers", "2"], "there is no layer 2; the model has the layers 0 to 1"),
        (["--text", "a", "--layers", "x"], "'x' is no number"),
        (["--text", "a", "--layers", "1-0"], "write 0-1"),
        (["--text", "a", "--heads", "0-99"], "there is no head 99"),
        (["--text", "a", "--topk", "0"], "--topk 0: give 1 to 20"),
        (["--text", "a", "--topk", "21"], "--topk 21"),
        (["--text", "a", "--out", "a.pdf"], "one .html file"),
        (["--text", "a", "--out", "folder.html"], "is a folder"),
        (["--text", "a", "--out", "latin.txt/a.html"], "cannot be written"),
        (["--text", "a", "--png", "latin.txt"], "cannot be written"),
        (["--text", "a", "--model", "nowhere"], "is not there"),
        (["--text", "a", "--tokenizer", "folder.html"], "holds no tokenizer"),
        (["--text", "a", "--tokenizer", "large"], "has 21 tokens and the model only 20"),
        (["--text", "a", "--model", "bare"], "has no tokenizer; name the folder of one with --tokenizer"),
    ],
)
def test_mistakes_are_told_in_a_sentence(tmp_path, folders, tokenizer, monkeypatch, capsys, more, message):
    monkeypatch.chdir(tmp_path)
    Path("latin.txt").write_bytes(b"caf\xe9")
    Path("folder.html").mkdir()
    large = AutoTokenizer.from_pretrained(tokenizer)
    large.add_tokens([f"<{i}>" for i in range(21 - len(SIGNS))])
    large.save_pretrained("large")
    export(Path("bare"), sized("tiny_llama"), ((n, InitSource(sized("tiny_llama"), 3).tensor(n))
                                               for n in whole_shapes(sized("tiny_llama"))))  # fmt: skip
    defaults = {"--model": str(folders["tiny_llama"]), "--out": "a.html"}
    asked = [word for key, value in defaults.items() if key not in more for word in (key, value)]
    assert inspect_model.main([*asked, *more]) == 2
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err and not Path("a.html").exists()


def test_too_little_memory_is_told_before_anything_is_read(tmp_path, folders, monkeypatch, capsys):
    monkeypatch.setattr(inspect_model, "memory_needed", lambda *_: 10**18)
    assert inspect_model.main(words(folders["tiny_llama"], tmp_path / "a.html")) == 2
    assert re.search(r"16 tokens need about 1e\+09 GB of memory, and \S+ are free", capsys.readouterr().err)


def test_text_is_asked_for(tmp_path, folders):
    with pytest.raises(SystemExit) as left:
        inspect_model.main(["--model", str(folders["tiny_llama"]), "--out", str(tmp_path / "a.html")])
    assert left.value.code == 2


def test_choices_are_sorted_and_once():
    assert choose("3,0-1, 1", 4, "layer") == [0, 1, 3] and choose("all", 2, "head") == [0, 1]


def test_labels_can_be_drawn():
    assert label(" a\n") == "·a↵" and label("$x$") == r"\$x\$" and label("漢") == "□" and len(label("x" * 30)) == 14
