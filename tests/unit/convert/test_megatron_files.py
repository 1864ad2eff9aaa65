"""Files of Megatron's ranks: what is written is what torch and safetensors read; what is read runs no code."""

from __future__ import annotations

import argparse
import io
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from convert.boxes import Meta
from convert.from_hf import hf_shapes
from convert.megatron.args import to_args
from convert.megatron.layout import Layout
from convert.megatron.rank_files import Strided, begin_torch_file, read_objects, read_torch_file
from convert.megatron.safe_files import read_safetensors_file
from convert.megatron.writing import begin_safetensors, begin_torch
from convert.stored import StoredTensor
from scripts.params import load_model
from tests.megatron_saved import CASES, case, fill, folder_name, states_of, weights
from tests.megatron_shards import Memory


def same(found: dict[str, Any], expected: dict[str, torch.Tensor]) -> bool:
    assert list(found) == list(expected) or set(found) == set(expected), set(found) ^ set(expected)
    return all(found[n].dtype == t.dtype and torch.equal(found[n], t) for n, t in expected.items())


def load(file: Path, **how: Any) -> dict[str, Any]:
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(file, weights_only=True, **how)


@pytest.mark.parametrize("name", CASES)
def test_torch_loads_what_is_written(tmp_path: Path, name: str) -> None:
    cfg, layout = case(name)
    hf, args = weights(cfg), to_args(cfg, layout, torch.bfloat16)
    fill(begin_torch(tmp_path, cfg, layout, Memory(hf).metas, args), hf)
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "release"
    expected = states_of(hf, cfg, layout)
    assert len(list((tmp_path / "release").iterdir())) == len(expected)
    keys = ["model"] if layout.vpp == 1 else [f"model{k}" for k in range(layout.vpp)]
    for rank, states in expected.items():
        file = tmp_path / "release" / folder_name(layout, rank) / "model_optim_rng.pt"
        for how in ({}, {"mmap": True}):
            content = load(file, **how)
            assert set(content) == {"args", "checkpoint_version", "iteration", *keys}
            assert (content["checkpoint_version"], content["iteration"]) == (3.0, 0)
            assert isinstance(content["args"], argparse.Namespace) and vars(content["args"]) == args
            assert all(same(content[key], state) for key, state in zip(keys, states, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_safetensors_loads_what_is_written(tmp_path: Path, name: str) -> None:
    cfg, layout = case(name)
    hf, args = weights(cfg), to_args(cfg, layout, torch.bfloat16)
    fill(begin_safetensors(tmp_path, cfg, layout, Memory(hf).metas, args), hf)
    for rank, states in states_of(hf, cfg, layout).items():
        file = tmp_path / "release" / folder_name(layout, rank) / "model_optim_rng.safetensors"
        prefixes = [""] if layout.vpp == 1 else [f"model{k}/" for k in range(layout.vpp)]
        expected = {p + n: t for p, state in zip(prefixes, states, strict=True) for n, t in state.items()}
        assert same(load_file(file), expected)
        with safe_open(file, "pt") as opened:
            assert opened.metadata()["format"] == "pt" and opened.metadata()["checkpoint_version"] == "3.0"
        read = read_safetensors_file(file)
        assert (read.checkpoint_version, read.iteration, read.chunks) == (3.0, 0, layout.vpp)
        listed = {key: list(value) if isinstance(value, tuple) else value for key, value in args.items()}
        assert dict(read.args) == listed and read.args["params_dtype"] is torch.bfloat16


def test_a_begun_checkpoint_takes_no_space_and_is_zero(tmp_path: Path) -> None:
    # One storage beyond 4 GiB, where offsets no longer fit 32 bits.
    cfg = load_model("tiny_llama", [f"vocab_size={2**25 + 100}"])
    layout = Layout(vocab_multiple=256)
    metas = {name: Meta(torch.bfloat16, shape) for name, shape in hf_shapes(cfg).items()}
    pieces = begin_torch(tmp_path, cfg, layout, metas, to_args(cfg, layout, torch.bfloat16))
    (file,) = tmp_path.glob("release/mp_rank_00/*")
    assert file.stat().st_size > 2 * 2**32 and file.stat().st_blocks * 512 < 2**20
    rows = torch.randn(3, 64).bfloat16()
    for ((_, tensor),) in (pieces.of("model.embed_tokens.weight"), pieces.of("lm_head.weight")):
        tensor.put(2**25 + 97, rows)
    state = load(file, mmap=True)["model"]
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        assert state[name].shape == (2**25 + 256, 64)
        assert torch.equal(state[name][2**25 + 97 : 2**25 + 100], rows)
        assert not state[name][:100].any() and not state[name][2**25 + 100 :].any()


@pytest.mark.parametrize("begin", [begin_torch, begin_safetensors])
def test_fused_tensors_take_the_wider_dtype(tmp_path: Path, begin: Callable[..., Any]) -> None:
    cfg = load_model("tiny_llama", [])
    metas = {name: Meta(torch.bfloat16, shape) for name, shape in hf_shapes(cfg).items()}
    name = "model.layers.0.self_attn.k_proj.weight"
    metas[name] = Meta(torch.float32, metas[name].shape)
    pieces = begin(tmp_path, cfg, Layout(), metas, to_args(cfg, Layout(), torch.bfloat16))
    assert {tensor.dtype for _, tensor in pieces.of("model.layers.0.self_attn.q_proj.weight")} == {torch.float32}
    assert {tensor.dtype for _, tensor in pieces.of("model.layers.1.self_attn.q_proj.weight")} == {torch.bfloat16}


def test_archives_say_that_checksums_of_values_are_unknown(tmp_path: Path) -> None:
    file = tmp_path / "model_optim_rng.pt"
    (place,) = begin_torch_file(file, [{"a": Meta(torch.float32, (4, 4))}], {}).values()
    assert isinstance(place, StoredTensor)
    place.put(0, torch.ones(4, 4))
    assert torch.equal(load(file)["model"]["a"], torch.ones(4, 4))
    with zipfile.ZipFile(file) as archive:
        assert archive.getinfo("model_optim_rng/data/0").CRC == 0
        archive.read("model_optim_rng/data.pkl")  # of everything else they are right


def saved(folder: Path, state: dict[str, Any], **more: Any) -> Path:
    """A rank's file by plain torch.save."""
    args = argparse.Namespace(num_layers=2, params_dtype=torch.bfloat16)
    content = {"args": args, "checkpoint_version": 3.0, "iteration": 5, "model": state} | more
    torch.save(content, folder / "model_optim_rng.pt")
    return folder / "model_optim_rng.pt"


def rows_of(tensor: Any) -> torch.Tensor:
    return tensor.rows(0, tensor.shape[0])


def test_views_of_storages_are_read_where_they_lie(tmp_path: Path) -> None:
    flat = torch.randn(1000)
    state = {
        "offset": flat[10:34].view(4, 6),
        "same storage": flat[10:34].view(6, 4),
        "transposed": flat[100:160].view(10, 6).t(),
        "columns": flat[200:260].view(10, 6)[:, 1:4],
        "strided vector": flat[300:340:3],
        "expanded": flat[7:13].expand(5, 6),
        "parameter": torch.nn.Parameter(torch.randn(3, 3)),
        "half": torch.randn(9, 7).half()[2:, :],
        "empty": torch.empty(0, 4),
        "number": torch.tensor(3.0),
    }
    file = read_torch_file(saved(tmp_path, state))
    assert (file.args, file.iteration) == ({"num_layers": 2, "params_dtype": torch.bfloat16}, 5)
    for name, tensor in state.items():
        found = file.tensors[0, name]
        assert (found.shape, found.dtype) == (tuple(tensor.shape), tensor.dtype)
        contiguous = name not in ("transposed", "columns", "strided vector", "expanded")
        assert isinstance(found, StoredTensor if contiguous else Strided)
        whole = found.read() if isinstance(found, StoredTensor) else rows_of(found)
        assert torch.equal(whole, tensor.detach()) and whole.is_contiguous()
        if tensor.dim() and len(tensor) > 3:
            assert torch.equal(found.rows(2, 4), tensor[2:4])


def module_with(monkeypatch: pytest.MonkeyPatch, module: str, kind: type) -> Any:
    """`kind` as a class of a module, so that pickle finds it there."""
    kind.__module__, kind.__qualname__ = module, kind.__name__
    monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
    setattr(sys.modules[module], kind.__name__, kind)
    return kind


class Evil:
    """Unpickled, it makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return (Path.touch, (self.file,))


class Custom:
    """A class of somebody's."""


@pytest.mark.parametrize("where", ["args", "model", "beside"])
def test_a_class_inside_is_refused_and_named(tmp_path: Path, where: str) -> None:
    thing = Evil(tmp_path / "touched")
    state, more = {"a": torch.ones(2)}, {}
    if where == "args":
        more = {"args": argparse.Namespace(x=thing, y=Custom())}
    elif where == "model":
        state |= {"a._extra_state": thing}
    else:
        more = {"opt_param_scheduler": {"x": [thing]}}
    file = saved(tmp_path, state, **more)
    with pytest.raises(ValueError, match=r"pathlib\.Path\.touch|getattr") as refused:
        read_torch_file(file)
    assert (
        str(file) in str(refused.value) and "run code" in str(refused.value) and "save it again" in str(refused.value)
    )
    assert (where != "args") or "Custom" in str(refused.value)
    assert not (tmp_path / "touched").exists()
    torch.load(file, weights_only=False)
    assert (tmp_path / "touched").exists()  # it would have


def test_objects_of_megatron_are_stood_in_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []

    class AttnBackend:
        def __init__(self, value: int = 0) -> None:
            self.value = value

        def __reduce__(self) -> Any:
            return AttnBackend, (self.value,)

        def __setstate__(self, state: object) -> None:
            called.append(state)

    class Options:
        def __setstate__(self, state: object) -> None:
            called.append(state)

    backend = module_with(monkeypatch, "megatron.core.transformer.some_enums", AttnBackend)
    options = module_with(monkeypatch, "megatron.core.some_options", Options)()
    options.input_data = "E|t"
    buffer = io.BytesIO(b"state")
    args = argparse.Namespace(
        backend=backend(3), options=options, nested=types.SimpleNamespace(a=1), path=Path("/x/y"), plain=[1, None, "a"]
    )
    extra = {"a._extra_state": buffer, "b._extra_state": None, "c._extra_state": torch.zeros(3, dtype=torch.uint8)}
    random = [{"np_rng_state": np.random.RandomState(0).get_state(), "random_rng_state": (3, (1, 2), None)}]
    file = saved(tmp_path, {"a": torch.ones(2)} | extra, args=args, rng_state=random, optimizer={"state": {0: flat()}})
    for module in ("megatron.core.transformer.some_enums", "megatron.core.some_options"):
        monkeypatch.delitem(sys.modules, module)
    read = read_torch_file(file)
    assert not called and type(read.args["backend"]) is not backend
    assert read.args["options"].input_data == "E|t"
    assert read.args["nested"].a == 1 and read.args["path"] == Path("/x/y") and read.args["plain"] == [1, None, "a"]
    assert [name for _, name in read.tensors] == ["a", "c._extra_state"]


def flat() -> dict[str, torch.Tensor]:
    return {"exp_avg": torch.ones(5)}


def test_damaged_archives_are_told(tmp_path: Path) -> None:
    file = saved(tmp_path, {"a": torch.randn(100, 100)})
    whole = file.read_bytes()
    middle = whole.index(b"checkpoint_version")
    damaged = {
        "cut at the end": whole[:-1],
        "cut in the middle": whole[: len(whole) // 2],
        "empty": b"",
        "text": b"version https://git-lfs.github.com/spec/v1\n",
        "a bit of the objects": whole[:middle] + b"C" + whole[middle + 1 :],
    }
    for why, content in damaged.items():
        file.write_bytes(content)
        with pytest.raises(ValueError, match="fetch it again") as told:
            read_torch_file(file)
        assert str(file) in str(told.value), why


def test_other_archives_are_told(tmp_path: Path) -> None:
    old = tmp_path / "model_optim_rng.pt"
    torch.save({"model": {"a": torch.ones(2)}}, old, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"before torch 1\.6"):
        read_torch_file(old)
    torch.save({"weight": torch.ones(2)}, old)
    with pytest.raises(ValueError, match=r"has no args \(found weight\)"):
        read_torch_file(old)
    torch.save([1, 2], old)
    with pytest.raises(ValueError, match="found list"):
        read_torch_file(old)
    with pytest.raises(ValueError, match="language_model"):
        read_torch_file(saved(tmp_path, {"language_model": {"embedding": {}}}))
    with pytest.raises(ValueError, match="holds no weights"):
        read_torch_file(saved(tmp_path, {}, model=None))


def test_a_tensor_beyond_its_storage_is_told(tmp_path: Path) -> None:
    file = saved(tmp_path, {"a": torch.ones(2, 3)})
    with zipfile.ZipFile(file) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    entries["model_optim_rng/data/0"] = bytes(20)
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    with pytest.raises(ValueError, match="a does not lie within a storage"):
        read_torch_file(file)


def test_big_endian_and_compressed_archives_are_told(tmp_path: Path) -> None:
    file = saved(tmp_path, {"a": torch.ones(2)})
    with zipfile.ZipFile(file) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    for change, how, match in (
        ({"model_optim_rng/byteorder": b"big"}, zipfile.ZIP_STORED, "big-endian"),
        ({}, zipfile.ZIP_DEFLATED, "compressed"),
    ):
        with zipfile.ZipFile(file, "w", how) as archive:
            for name, content in (entries | change).items():
                archive.writestr(name, content)
        with pytest.raises(ValueError, match=match):
            read_torch_file(file)


def test_a_safetensors_file_without_args_is_told(tmp_path: Path) -> None:
    file = tmp_path / "model_optim_rng.safetensors"
    for metadata in (None, {"format": "pt"}, {"args": "{", "checkpoint_version": "3.0", "iteration": "0"}):
        save_file({"a": torch.ones(2)}, file, metadata=metadata)
        with pytest.raises(ValueError, match="does not say how its model is made and cut"):
            read_safetensors_file(file)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="truncated"):
        read_safetensors_file(file)


def test_what_other_libraries_allow_is_not_made(tmp_path: Path) -> None:
    """Accelerate adds numpy's own functions to torch's list for the whole process."""
    file = tmp_path / "model_optim_rng.pt"
    torch.save({"args": argparse.Namespace(), "state": np.random.RandomState(0).get_state()}, file)
    theirs = torch.serialization.get_safe_globals()
    torch.serialization.add_safe_globals([np._core.multiarray._reconstruct, np.ndarray])  # pyright: ignore[reportAttributeAccessIssue]
    before = torch.serialization.get_safe_globals()
    assert not isinstance(read_objects(file, file)["state"][1], np.ndarray)
    assert set(map(str, torch.serialization.get_safe_globals())) == set(map(str, before))
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(theirs)
