"""Safetensors written here are read by the safetensors library and the other way round; broken files are named."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from convert.hf_files import INDEX, SINGLE, SafetensorsWriter, iter_tensors, plan_files, read_folder, read_header

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool]


@pytest.mark.parametrize("dtype", DTYPES)
def test_reads_what_the_library_writes(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {
        "a": torch.arange(6).reshape(2, 3).to(dtype),
        "b": torch.ones((), dtype=dtype),
        "c": torch.empty(0, 3, dtype=dtype),
    }
    save_file(tensors, tmp_path / SINGLE, metadata={"format": "pt"})
    found = dict(iter_tensors(tmp_path))
    assert set(found) == set(tensors)
    assert all(found[name].dtype is dtype and torch.equal(found[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("limit", [10**9, 300, 1])
def test_the_library_reads_what_is_written(tmp_path: Path, dtype: torch.dtype, limit: int) -> None:
    tensors = {f"t{i}": torch.randn(5, i + 1) for i in range(6)}
    writer = SafetensorsWriter(tmp_path, {n: tuple(t.shape) for n, t in tensors.items()}, dtype, limit)
    for name in reversed(tensors):  # any order
        writer.put(name, tensors[name])
    writer.finish()
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == {10**9: 1, 300: {torch.float32: 2, torch.bfloat16: 1}[dtype], 1: 6}[limit] or limit == 300
    loaded = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert all(torch.equal(loaded[name], tensors[name].to(dtype)) for name in tensors)
    assert len(files) == 1 or set(json.loads((tmp_path / INDEX).read_text())["weight_map"]) == set(tensors)
    assert set(dict(iter_tensors(tmp_path))) == set(tensors)


def test_files_stay_below_the_limit() -> None:
    shapes = {f"t{i}": (10,) for i in range(7)} | {"big": (100,), "last": (1,)}
    assert plan_files(shapes, torch.float32, 120) == [
        ["t0", "t1", "t2"], ["t3", "t4", "t5"], ["t6"], ["big"], ["last"]
    ]  # fmt: skip


def test_an_unwritten_tensor_is_our_mistake(tmp_path: Path) -> None:
    writer = SafetensorsWriter(tmp_path, {"a": (2,)}, torch.float32, 100)
    with pytest.raises(AssertionError, match="never written"):
        writer.finish()


def test_a_disk_too_small_is_told_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(ValueError, match=r"10 bytes free, the weights need 400"):
        SafetensorsWriter(tmp_path, {"a": (100,)}, torch.float32, 1000)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("keep", [0, 5, 20, -1])
def test_truncated_file_is_named_with_its_sizes(tmp_path: Path, keep: int) -> None:
    save_file({"a": torch.zeros(10)}, tmp_path / SINGLE)
    whole = (tmp_path / SINGLE).read_bytes()
    (tmp_path / SINGLE).write_bytes(whole[:keep])
    with pytest.raises(ValueError, match=f"{SINGLE} is truncated") as caught:
        read_folder(tmp_path)
    if keep == -1:
        assert f"{len(whole) - 1} bytes" in str(caught.value) and str(len(whole)) in str(caught.value)


def test_a_file_of_another_kind_is_named(tmp_path: Path) -> None:
    (tmp_path / SINGLE).write_bytes((16).to_bytes(8, "little") + b"not json at all!" + b"x" * 50)
    with pytest.raises(ValueError, match="not a safetensors file"):
        read_header(tmp_path / SINGLE)


@pytest.mark.parametrize(
    ("names", "told"),
    [
        ([], "holds no weights"),
        (["pytorch_model.bin"], r"weights only as pytorch_model\.bin.*save_pretrained"),
        (["model-q8.gguf"], r"gguf_file='model-q8\.gguf'"),
    ],
)
def test_folder_without_safetensors(tmp_path: Path, names: list[str], told: str) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ValueError, match=told):
        read_folder(tmp_path)


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a folder"):
        read_folder(tmp_path / "nowhere")


def write_indexed(folder: Path) -> None:
    writer = SafetensorsWriter(folder, {"a": (4,), "b": (4,)}, torch.float32, 16)
    writer.put("a", torch.zeros(4))
    writer.put("b", torch.ones(4))
    writer.finish()


def test_missing_weight_file_is_named(tmp_path: Path) -> None:
    write_indexed(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks 1 of 2 weight files .*model-00002-of-00002"):
        read_folder(tmp_path)


@pytest.mark.parametrize("text", ["{", "{}", '{"weight_map": {"zzz": "model-00001-of-00002.safetensors"}}'])
def test_broken_index_is_named(tmp_path: Path, text: str) -> None:
    write_indexed(tmp_path)
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
        read_folder(tmp_path)
