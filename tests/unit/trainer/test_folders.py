"""What a run may start from: each kind found and read once, and in words why one cannot be used."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from convert import hf_to_mega
from convert.from_hf import whole_shapes
from convert.to_hf import export
from models import ModelConfig
from models.init import InitSource
from tests.unit.convert.test_from_hf import VARIANTS
from tests.unit.convert.test_loom_files import changed, write_run
from tests.unit.data.conftest import make_tokenizer
from trainer import folders

QWEN = VARIANTS["qwen2"]
CHECKPOINT = {"hf": "model.safetensors", "torch": "mp_rank_00_000/model_optim_rng.pt",
              "safetensors": "mp_rank_01_001/model_optim_rng.safetensors", "torch_dist": "__0_0.distcp"}  # fmt: skip


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One model as a Hugging Face folder with a tokenizer, in Megatron's formats at tp 2 x pp 2, and as a run."""
    root = tmp_path_factory.mktemp("kinds")
    source = InitSource(QWEN, 0)
    found = {"hf": export(root / "hf", QWEN, ((name, source.tensor(name)) for name in whole_shapes(QWEN)))}
    make_tokenizer().save_pretrained(found["hf"])
    for form in ("torch", "safetensors", "torch_dist"):
        found[form] = root / form
        words = ["--hf", str(found["hf"]), "--out", str(found[form]), "--format", form, "--tp", "2", "--pp", "2"]
        hf_to_mega.run([*words, "--workers", "1"])
    write_run(root / "run", QWEN, 2, tokenizer=str(found["hf"]), chat_template=str(root / "own.jinja"))
    return found | {"loom": root / "run"}


def said(init_from: Path) -> str:
    problem = folders.folder_problem(str(init_from))
    assert problem is not None and problem.key == "init_from" and problem.value == str(init_from)
    return f"{problem.reason}\n{problem.way_out}"


def sizes(cfg: ModelConfig) -> ModelConfig:
    """Without how weights are drawn, which a Megatron checkpoint may not say."""
    return dataclasses.replace(cfg, init_std=0.02)


def test_every_kind_says_its_model_and_where_its_tokenizer_is(kinds) -> None:
    for kind, path in kinds.items():
        assert folders.folder_problem(str(path)) is None
        assert sizes(folders.model_in(str(path))) == sizes(QWEN), kind
        assert folders.other_model(str(path), QWEN) is None
        files = Path(folders.tokenizer_in(str(path)) or "")
        assert (files / "tokenizer.json").read_bytes() == (kinds["hf"] / "tokenizer.json").read_bytes(), kind
        template = folders.template_in(str(path))
        assert template == (str(path.parent / "own.jinja") if kind == "loom" else None)
        assert folders.tokenizer_problem(None, str(path)) is None


def test_another_model_is_told_with_both_sizes(kinds) -> None:
    for kind, path in kinds.items():
        problem = folders.other_model(str(path), dataclasses.replace(QWEN, num_layers=7))
        assert problem is not None
        assert "another model: model.num_layers is 7 against 2 in the folder" in problem.reason
        assert ("config.json" in problem.reason) == (kind == "hf") and "model=hf" in problem.way_out


def test_a_checkpoint_is_opened_once_until_a_newer_one_is_there(tmp_path: Path) -> None:
    write_run(tmp_path, VARIANTS["llama"], step=3)
    first = folders.opened(str(tmp_path))
    assert folders.opened(str(tmp_path)) is first and folders.opened(str(first.path)).path == first.path
    newer = write_run(tmp_path, VARIANTS["llama"], step=4)
    assert folders.opened(str(tmp_path)).path == newer
    folders.forget()
    assert folders.opened(str(tmp_path)) is not first


def test_a_hugging_face_folder_is_judged_without_what_other_kinds_need(kinds) -> None:
    """Half a second of torch's distributed checkpoints on every rank, for nothing."""
    check = (
        "import sys; from trainer import config, door, folders; "
        f"assert folders.folder_problem({str(kinds['hf'])!r}) is None; folders.opened({str(kinds['hf'])!r}); "
        f"assert folders.tokenizer_problem(None, {str(kinds['hf'])!r}) is None; "
        "heavy = [m for m in ('torch.distributed.checkpoint', 'transformers', 'deepspeed') if m in sys.modules]; "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", check], check=True, cwd=Path(__file__).resolve().parents[3])


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_nothing_known_is_told_with_what_was_looked_for(tmp_path: Path, kinds) -> None:
    (tmp_path / "empty").mkdir()
    assert "no config.json, and neither a Megatron checkpoint nor one of a run" in said(tmp_path / "empty")
    (tmp_path / "begun" / "checkpoints" / "step_0000001.building").mkdir(parents=True)
    assert "a run without a complete checkpoint" in said(tmp_path / "begun")
    shutil.copytree(kinds["torch"], tmp_path / "cut")
    shutil.rmtree(next((tmp_path / "cut").glob("*/mp_rank_01_001")))
    assert "1 of 4 files are missing for tp=2, pp=2" in said(tmp_path / "cut")


@pytest.mark.parametrize("kind", ["torch", "safetensors", "torch_dist"])
def test_a_damaged_megatron_checkpoint_is_told(tmp_path: Path, kinds, kind: str) -> None:
    folder = tmp_path / kind
    shutil.copytree(kinds[kind], folder)
    file = next(folder.glob(f"*/{CHECKPOINT[kind]}"))
    os.truncate(file, file.stat().st_size // 2)
    assert file.name in said(folder)


def test_a_run_of_another_version_is_told(tmp_path: Path) -> None:
    folder = changed(write_run(tmp_path, VARIANTS["llama"]), format=99)
    assert "format 99" in said(tmp_path) and "format 99" in said(folder)


def test_a_checkpoint_whose_tokenizer_is_gone_asks_for_one(tmp_path: Path) -> None:
    write_run(tmp_path, VARIANTS["llama"], tokenizer=str(tmp_path / "gone"))
    problem = folders.tokenizer_problem(None, str(tmp_path))
    assert problem is not None and problem.key == "init_from" and "data.tokenizer=FOLDER" in problem.way_out
    problem = folders.tokenizer_problem(None, str(tmp_path), "init_parts.decoder")
    assert problem is not None and problem.key == "init_parts.decoder"
    problem = folders.tokenizer_problem(None, None)
    assert problem is not None and "without init_from or init_parts.decoder" in problem.reason
    assert folders.tokenizer_problem(str(tmp_path / "gone"), str(tmp_path)) is None, "the data section tells that"
