"""The conversion commands in a user's hands: the real SmolLM2, kills, wrong inputs, and what --verify sees."""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from convert.boxes import Pieces
from convert.checking import compare_checksums, verify
from convert.conversion import How, Target, convert
from convert.from_hf import open_hf
from convert.megatron import names
from convert.megatron.layout import Layout
from convert.opening import open_weights
from convert.output import building_folder
from convert.rebuilding import check_rebuilt
from models.config import ModelConfig
from models.rules import Segment
from tests.convert_cases import COMMANDS, ROOT, SMOLLM2, command, rows_unequal, tiny, unequal

TINY = ("llama", "qwen2", "qwen3", "mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3")
FORMATS = ("torch", "safetensors", "torch_dist")
LAYOUTS = [(tp, pp, FORMATS[(i + tp) % 3]) for tp in (1, 3) for i, pp in enumerate((1, 2, 3, 5))]


@pytest.mark.parametrize(("tp", "pp", "form"), LAYOUTS)
def test_smollm2_lies_exactly_in_every_layout(tmp_path: Path, tp: int, pp: int, form: str) -> None:
    """9 query heads, 3 key/value heads, tied embeddings."""
    source, layout = open_hf(SMOLLM2), Layout(tp, pp)
    convert(source, Target(tmp_path / "mega", form, layout), How(workers=2))  # pyright: ignore[reportArgumentType]
    written = open_weights(tmp_path / "mega")
    assert written.layout is not None
    assert (written.format, written.cfg, written.layout.tp, written.layout.pp) == (form, source.cfg, tp, pp)
    assert written.files == tmp_path / "mega" / "huggingface"
    compare_checksums(source.tensors, written.tensors, source.tensors.metas, 2)
    assert "equal" in check_rebuilt(source.tensors, written, source.tensors.metas)
    shutil.rmtree(tmp_path)


@pytest.fixture(scope="module")
def there_and_back(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 through tp 3 x pp 5, tp 1 x pp 2 and back, each by its command, verified."""
    folder = tmp_path_factory.mktemp("smollm2")
    steps = (
        ("hf_to_mega", "--hf", SMOLLM2, "--out", folder / "a", "--tp", 3, "--pp", 5, "--verify"),
        ("reshard", "--in", folder / "a", "--out", folder / "b", "--pp", 2, "--format", "torch_dist"),
        ("mega_to_hf", "--mega", folder / "b", "--out", folder / "hf", "--max-shard-size", "200MB", "--verify"),
    )
    for name, *words in steps:
        assert command(name, *words) == 0
    return folder


def test_smollm2_comes_back_with_the_same_bytes(there_and_back: Path) -> None:
    back = there_and_back / "hf"
    assert unequal(SMOLLM2, back) == []
    assert len(list(back.glob("model-*.safetensors"))) == 3
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        assert (back / name).read_bytes() == (SMOLLM2 / name).read_bytes()
    assert json.loads((back / "config.json").read_text()) == json.loads((SMOLLM2 / "config.json").read_text())


def test_smollm2_says_the_same_after_as_before(there_and_back: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    said = []
    for folder in (SMOLLM2, there_and_back / "hf"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
        prompt = tokenizer("The capital of France is", return_tensors="pt")
        out = model.generate(**prompt, max_new_tokens=12, do_sample=False)
        said.append(tokenizer.decode(out[0]))
    assert said[0] == said[1] and "Paris" in said[0]


KILLED = """
import os, signal, sys, time
from convert import hf_to_mega
from convert.cli import told
from convert.output import Output

signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background begins with it ignored
finished, count = Output.finished, 0

def stop_in_the_middle(self, hf):
    global count
    finished(self, hf)
    count += 1
    if count == 120:
        self._sync()
    if count == 150:
        os.kill(os.getpid(), signal.{signal})
        time.sleep(3)  # no other tensor is finished meanwhile, however busy the machine

Output.finished = stop_in_the_middle
sys.exit(told(hf_to_mega.run, sys.argv[1:]))
"""


def start_and_stop(how: str, *words: object) -> subprocess.CompletedProcess[str]:
    """Run hf_to_mega and stop it after 150 of 272 tensors, 120 of which are noted."""
    line = [sys.executable, "-c", KILLED.format(signal=how), *map(str, words)]
    return subprocess.run(line, capture_output=True, text=True, timeout=300, cwd=ROOT)


def run_script(name: str, *words: object) -> subprocess.CompletedProcess[str]:
    """Run a command as a user does."""
    line = [sys.executable, f"convert/{name}.py", *map(str, words)]
    return subprocess.run(line, capture_output=True, text=True, timeout=300, cwd=ROOT)


def test_a_kill_in_the_middle_costs_little_and_leaves_no_half_output(tmp_path: Path) -> None:
    out = tmp_path / "mega"
    words = ("--hf", SMOLLM2, "--out", out, "--tp", 3, "--pp", 2)
    killed = start_and_stop("SIGKILL", *words)
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists() and building_folder(out).is_dir()
    other = run_script("hf_to_mega", "--hf", SMOLLM2, "--out", out, "--tp", 1)
    assert other.returncode == 2 and "Traceback" not in other.stderr
    assert "the layout was" in other.stderr and "--start-over" in other.stderr
    again = run_script("hf_to_mega", *words)
    assert again.returncode == 0, again.stderr
    assert "going on: 120 of 272 tensors" in again.stdout
    assert not building_folder(out).exists()
    assert rows_unequal(open_hf(SMOLLM2).tensors, open_weights(out).tensors) == []


def test_ctrl_c_says_how_to_go_on(tmp_path: Path) -> None:
    words = ("--hf", SMOLLM2, "--out", tmp_path / "mega")
    stopped = start_and_stop("SIGINT", *words)
    assert stopped.returncode == 130
    assert "Run the same command again" in stopped.stderr and "Traceback" not in stopped.stderr
    assert command("hf_to_mega", *words) == 0


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("small") / "hf"
    tiny("tiny_llama", folder)
    return folder


@pytest.fixture(scope="module")
def small_mega(small: Path) -> Path:
    """The same at tp 2, pp 2, the vocabulary padded."""
    out = small.parent / "mega"
    words = ("--hf", small, "--out", out, "--tp", 2, "--pp", 2, "--make-vocab-size-divisible-by", 192)
    assert command("hf_to_mega", *words) == 0
    return out


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def cut(file: Path, left: int = -1000) -> None:
    """Cut a file short."""
    file.write_bytes(file.read_bytes()[:left])


HF_FAULTS = {
    "truncated": (lambda hf: cut(hf / "model.safetensors"), "is truncated"),
    "no header": (lambda hf: cut(hf / "model.safetensors", 5), "is truncated"),
    "noise": (lambda hf: (hf / "model.safetensors").write_bytes(bytes(8) + b"noise"), "not a safetensors file"),
    "other JSON": (
        lambda hf: (hf / "model.safetensors").write_bytes(b"\x0b\0\0\0\0\0\0\0" + b'{"a":["b"]}'),
        "not a safetensors file",
    ),
    "missing index": (lambda hf: (hf / "model.safetensors").rename(hf / "model-00001-of-00002.safetensors"), "but no"),
    "no weights": (lambda hf: (hf / "model.safetensors").unlink(), "holds no weights"),
    "other family": (lambda hf: edit_config(hf, model_type="gpt2"), "model_type='gpt2'"),
    "other model": (lambda hf: edit_config(hf, num_hidden_layers=3), "tensors"),
    "no config": (lambda hf: (hf / "config.json").unlink(), "no config.json"),
    "broken config": (lambda hf: (hf / "config.json").write_text("{"), "not readable as JSON"),
    "nothing": (shutil.rmtree, "is not a folder"),
}


@pytest.mark.parametrize("fault", HF_FAULTS)
def test_damaged_folders_are_told_calmly(
    tmp_path: Path, small: Path, capsys: pytest.CaptureFixture[str], fault: str
) -> None:
    shutil.copytree(small, tmp_path / "hf")
    make, message = HF_FAULTS[fault]
    make(tmp_path / "hf")
    left = {path.name for path in tmp_path.iterdir()}
    assert command("hf_to_mega", "--hf", tmp_path / "hf", "--out", tmp_path / "out") == 2
    told = capsys.readouterr().err
    assert message in told and "Traceback" not in told
    assert {path.name for path in tmp_path.iterdir()} == left


MEGA_FAULTS = {
    "truncated": (lambda m: cut(m / "release" / "mp_rank_01_001" / "model_optim_rng.pt"), "mp_rank_01_001"),
    "a rank missing": (lambda m: shutil.rmtree(m / "release" / "mp_rank_00_001"), "mp_rank_00_001"),
    "a file missing": (lambda m: (m / "release" / "mp_rank_00_001" / "model_optim_rng.pt").unlink(), "mp_rank_00_001"),
    "code inside": (
        lambda m: torch.save({"args": Path, "model": {}}, m / "release" / "mp_rank_00_000" / "model_optim_rng.pt"),
        "run code",
    ),
    "no iteration": (lambda m: shutil.rmtree(m / "release"), "release"),
    "empty": (lambda m: (shutil.rmtree(m), m.mkdir()), "no checkpoint that is known here"),
    "nothing": (shutil.rmtree, "is not there"),
}


@pytest.mark.parametrize("name", ["mega_to_hf", "reshard"])
@pytest.mark.parametrize("fault", MEGA_FAULTS)
def test_damaged_checkpoints_are_told_calmly(
    tmp_path: Path, small_mega: Path, capsys: pytest.CaptureFixture[str], name: str, fault: str
) -> None:
    shutil.copytree(small_mega, tmp_path / "mega")
    make, message = MEGA_FAULTS[fault]
    make(tmp_path / "mega")
    left = {path.name for path in tmp_path.iterdir()}
    source = "--mega" if name == "mega_to_hf" else "--in"
    assert command(name, source, tmp_path / "mega", "--out", tmp_path / "out") == 2
    told = capsys.readouterr().err
    assert message in told and "Traceback" not in told
    assert {path.name for path in tmp_path.iterdir()} == left


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--tp", 3), "--tp 3"),
        (("--pp", 3), "--pp-layout"),
        (("--ep", 2), "no experts"),
        (("--vpp", 2), "--vpp 2"),
        (("--tp", 0), "not a whole number"),
        (("--tp", "two"), "not a whole number"),
        (("--pp-layout", "3;1"), "not a list of numbers"),
        (("--pp", 2, "--pp-layout", "3,3"), "adds up to"),
        (("--tp", 3, "--pp", 3, "--ep", 2), "--ep 2"),
        (("--format", "zarr"), "invalid choice"),
    ],
)
def test_layouts_that_do_not_fit_are_told_calmly(
    tmp_path: Path, small: Path, capsys: pytest.CaptureFixture[str], words: tuple[object, ...], message: str
) -> None:
    assert command("hf_to_mega", "--hf", small, "--out", tmp_path / "out", *words) == 2
    told = capsys.readouterr().err
    assert message in told and "Traceback" not in told
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_before_anything_is_written(
    tmp_path: Path, small: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**5))
    assert command("hf_to_mega", "--hf", small, "--out", tmp_path / "out") == 2
    assert "are needed" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_output_in_use_is_left_alone(tmp_path: Path, small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    assert command("hf_to_mega", "--hf", small, "--out", tmp_path / "out") == 2
    assert "not empty" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
    assert command("mega_to_hf", "--mega", small, "--out", tmp_path / "new") == 2
    assert "Hugging Face folder already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("family", "form"),
    [(family, FORMATS[i % 3]) for i, family in enumerate(TINY)]
    + [(family, "torch_dist") for family in ("qwen2_moe", "deepseek_v3")],
)
def test_every_family_passes_its_verification(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str, form: str
) -> None:
    cfg = tiny(f"tiny_{family}", tmp_path / "hf", torch.bfloat16 if form == "safetensors" else torch.float32)
    words = ["--tp", 2, "--pp", 2, *(["--ep", 2] if cfg.moe else []), "--make-vocab-size-divisible-by", 48]
    words += ["--pp-layout", f"{cfg.num_layers - 1},1"] if cfg.num_layers % 2 else []
    implementation = "local" if form == "torch_dist" else "transformer_engine"
    words += ["--transformer-impl", implementation, "--format", form, "--verify"]
    assert command("hf_to_mega", "--hf", tmp_path / "hf", "--out", tmp_path / "mega", *words) == 0
    told = capsys.readouterr().out
    assert all(f"ok  {word}" in told for word in ("names", "checksums", "rebuilt another way", "logits: transformers"))
    assert ("ok  copies" in told) == (form != "torch_dist")
    assert command("mega_to_hf", "--mega", tmp_path / "mega", "--out", tmp_path / "back", "--verify") == 0
    assert unequal(tmp_path / "hf", tmp_path / "back") == []


@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_dtypes_are_converted_but_a_correction_bias(tmp_path: Path, family: str) -> None:
    tiny(f"tiny_{family}", tmp_path / "hf")
    words = ("--tp", 2, "--dtype", "bf16", "--verify")
    assert command("hf_to_mega", "--hf", tmp_path / "hf", "--out", tmp_path / "mega", *words) == 0
    back = ("--mega", tmp_path / "mega", "--out", tmp_path / "back", "--dtype", "fp16", "--verify")
    assert command("mega_to_hf", *back) == 0
    given, found = open_hf(tmp_path / "hf").tensors, open_hf(tmp_path / "back").tensors
    for hf, meta in given.metas.items():
        value = given.rows(hf, 0, meta.shape[0])
        exact = hf.endswith("e_score_correction_bias")
        expected = value if exact else value.to(torch.bfloat16).to(torch.float16)
        assert torch.equal(found.rows(hf, 0, meta.shape[0]), expected) and found.metas[hf].dtype == expected.dtype


def test_files_of_the_model_come_from_elsewhere_where_the_checkpoint_has_none(
    tmp_path: Path, small: Path, small_mega: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in a checkpoint that Megatron wrote: nothing says which rows of the vocabulary are padding."""
    mega = shutil.copytree(small_mega, tmp_path / "mega")
    shutil.rmtree(mega / "huggingface")
    for file in mega.rglob("*.pt"):
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(file, weights_only=True)
        del content["args"].vocab_size
        torch.save(content, file)
    assert command("mega_to_hf", "--mega", mega, "--out", tmp_path / "padded") == 0
    assert "padding" in capsys.readouterr().err
    assert len(unequal(small, tmp_path / "padded")) == 2  # embedding and head are longer
    words = ("--mega", mega, "--out", tmp_path / "back", "--hf-files", small, "--verify")
    assert command("mega_to_hf", *words) == 0
    assert unequal(small, tmp_path / "back") == []
    edit_config(shutil.copytree(small, tmp_path / "other"), hidden_size=32)
    assert command("mega_to_hf", *words[:3], tmp_path / "no", "--hf-files", tmp_path / "other") == 2
    assert "is of another model" in capsys.readouterr().err


def written(folder: Path, **options: object) -> tuple[Path, Path]:
    """A tiny model, and the same as a Megatron checkpoint."""
    tiny("tiny_qwen2", folder / "hf")
    target = Target(folder / "mega", "torch", Layout(2, 2, vocab_multiple=1))
    convert(open_hf(folder / "hf"), target, How(workers=1))
    return folder / "hf", folder / "mega"


def test_verification_sees_one_changed_byte(tmp_path: Path) -> None:
    hf, mega = written(tmp_path)
    source, pieces = open_hf(hf), open_weights(mega).tensors
    assert isinstance(pieces, Pieces)
    name = "model.layers.1.self_attn.v_proj.weight"
    _, place = pieces.of(name)[-1]
    with place.file.open("r+b") as file:
        file.seek(place.stop - 1)
        last = file.read(1)
        file.seek(place.stop - 1)
        file.write(bytes([last[0] ^ 1]))
    with pytest.raises(ValueError, match=f"1 of .* tensors are not what the source has: {name}"):
        verify(source, mega, source.tensors.metas, 1)


def test_verification_sees_copies_that_differ(tmp_path: Path) -> None:
    hf, mega = written(tmp_path)
    source, pieces = open_hf(hf), open_weights(mega).tensors
    assert isinstance(pieces, Pieces)
    _, place = pieces.of("model.norm.weight")[-1]
    place.put(0, place.rows(0, 1) + 1)
    with pytest.raises(ValueError, match=r"copies of weights differ(.|\n)*model.norm.weight"):
        verify(source, mega, source.tensors.metas, 1)


def test_verification_sees_a_config_of_another_model(tmp_path: Path) -> None:
    hf, mega = written(tmp_path)
    edit_config(hf, rms_norm_eps=0.5)
    source = open_hf(hf)
    with pytest.raises(ValueError, match="differs from the source's in norm_eps"):
        verify(source, mega, source.tensors.metas, 1)


def test_verification_does_not_trust_the_plan_it_was_written_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With q, k, v in a wrong order on the way in and out, all checksums agree."""

    def ungrouped(cfg: ModelConfig, segments: tuple[Segment, ...]) -> tuple[Segment, ...]:
        return segments

    monkeypatch.setattr(names, "query_groups", ungrouped)
    hf, mega = written(tmp_path)
    source = open_hf(hf)
    compare_checksums(source.tensors, open_weights(mega).tensors, source.tensors.metas, 1)
    with pytest.raises(ValueError, match=r"q_proj.weight, put together by the definition"):
        verify(source, mega, source.tensors.metas, 1)


def test_a_verification_that_fails_keeps_the_output_from_its_name(
    tmp_path: Path, small: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--hf", small, "--out", tmp_path / "out", "--tp", 2, "--verify")
    with monkeypatch.context() as wrong:
        wrong.setattr(names, "query_groups", lambda cfg, segments: segments)
        assert command("hf_to_mega", *words) == 2
    told = capsys.readouterr().err
    assert "--verify failed" in told and "put together by the definition" in told
    assert not (tmp_path / "out").exists()
    assert command("hf_to_mega", *words) == 0, "nothing of the wrong output is gone on with"
    assert "going on" not in capsys.readouterr().out


def test_what_lies_in_the_wrong_place_is_named_with_the_way_out(
    tmp_path: Path, small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("hf_to_mega", "--hf", small, "--out", tmp_path / "mega", "--tp", 2) == 0
    assert command("hf_to_mega", "--hf", tmp_path / "mega", "--out", tmp_path / "again") == 2
    assert f"reshard.py --in {tmp_path / 'mega'}" in capsys.readouterr().err
    part = tmp_path / "mega" / "release" / "mp_rank_00"
    assert command("mega_to_hf", "--mega", part, "--out", tmp_path / "hf") == 2
    assert f"name the whole: {part.parent}" in capsys.readouterr().err


def test_help_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    for name in COMMANDS:
        assert command(name, "--help") == 0
        assert f"python convert/{name}.py --" in capsys.readouterr().out
