"""`torch_dist` checkpoints that are damaged, of another model or unsafe: told at once, and no code is run."""

from __future__ import annotations

import os
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from convert.megatron.dist import open_dist
from convert.megatron.layout import Layout
from tests.dist_files import DENSE, Edit, edited, write

FC2 = "decoder.layers.mlp.linear_fc2.weight"


def stored(metadata: Metadata) -> TensorStorageMetadata:
    entry = metadata.state_dict_metadata[FC2]
    assert isinstance(entry, TensorStorageMetadata)
    return entry


def drop(metadata: Metadata) -> None:
    del metadata.state_dict_metadata[FC2]


def rename(metadata: Metadata) -> None:
    metadata.state_dict_metadata["decoder.layers.mlp.linear_fc9.weight"] = metadata.state_dict_metadata.pop(FC2)
    for index in [index for index in metadata.storage_data if index.fqn == FC2]:
        metadata.storage_data[MetadataIndex("decoder.layers.mlp.linear_fc9.weight", index.offset)] = (
            metadata.storage_data.pop(index)
        )


def reshape(metadata: Metadata) -> None:
    entry = stored(metadata)
    entry.size = torch.Size((*entry.size[:-1], entry.size[-1] + 1))


def lose_a_part(metadata: Metadata) -> None:
    stored(metadata).chunks.pop()


def overlap(metadata: Metadata) -> None:
    """Half of a layer twice and the other half not at all: the number of elements is right."""
    chunks = stored(metadata).chunks
    chunks[1] = chunks[0]


def stick_out(metadata: Metadata) -> None:
    chunk = stored(metadata).chunks[0]
    chunk.sizes = torch.Size((2, *chunk.sizes[1:-1], 9999))


def no_place(metadata: Metadata) -> None:
    del metadata.storage_data[next(index for index in metadata.storage_data if index.fqn == FC2)]


def elsewhere(metadata: Metadata) -> None:
    for info in metadata.storage_data.values():
        info.relative_path = "../../secret"


def behind_the_end(metadata: Metadata) -> None:
    next(info for index, info in metadata.storage_data.items() if index.fqn == FC2).offset += 10**9


def compressed(metadata: Metadata) -> None:
    next(iter(metadata.storage_data.values())).transform_descriptors = ["zstd"]


EDITS: dict[Edit, str] = {
    drop: rf"1 tensors are missing:\n  {FC2}",
    rename: rf"1 tensors are missing:\n  {FC2}\n1 tensors have no place in the model:\n  decoder.layers.mlp.linear_fc9",
    reshape: rf"1 tensors have another shape:\n  {FC2}: \[3, 64, \d+\] in the file",
    lose_a_part: rf"{FC2} is not whole: \d+ of \d+ elements",
    overlap: rf"{FC2} has two parts for the same place, at \[0, 0, 0\] and \[0, 0, 0\]",
    stick_out: rf"{FC2} has a part of .* outside of",
    no_place: rf"{FC2} has no place for its part at",
    elsewhere: r"secret is missing",
    behind_the_end: r"__0_0.distcp is truncated: it has \d+ bytes",
    compressed: r"stored as \['zstd'\]",
}


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_a_metadata_that_is_not_the_models_is_refused(tmp_path: Path, edit: Edit) -> None:
    write(DENSE, Layout(tp=2), tmp_path)
    edited(tmp_path, edit)
    with pytest.raises(ValueError, match=EDITS[edit]):
        open_dist(tmp_path)


class Evil:
    """Unpickled, it makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.file}",)


def test_the_metadata_runs_no_code(tmp_path: Path) -> None:
    write(DENSE, Layout(), tmp_path)
    file = tmp_path / "release" / ".metadata"
    for content in (Evil(tmp_path / "ran"), Metadata({}, Evil(tmp_path / "ran"), {}), re.compile("a")):
        file.write_bytes(pickle.dumps(content))
        with pytest.raises(ValueError, match=r"\.metadata holds \S+, which is no part of .* could run code"):
            open_dist(tmp_path)
    assert not (tmp_path / "ran").exists()
    # The file may write on its own records, on no class of ours or of torch.
    before = dict(vars(Metadata))
    code = b"ctorch.distributed.checkpoint.metadata\nMetadata\n(N}S'__len__'\nI1\nstb."
    file.write_bytes(code)
    with pytest.raises(ValueError, match="metadata"):
        open_dist(tmp_path)
    assert dict(vars(Metadata)) == before


@pytest.mark.parametrize("content", [b"", b"abc", b"\x80\x04", pickle.dumps({"a": 1}), pickle.dumps(Metadata({}))])
def test_a_damaged_metadata_is_told(tmp_path: Path, content: bytes) -> None:
    write(DENSE, Layout(), tmp_path)
    (tmp_path / "release" / ".metadata").write_bytes(content)
    with pytest.raises(ValueError, match=r"\.metadata (is|holds)|tensors are missing"):
        open_dist(tmp_path)


def test_damaged_files_are_told(tmp_path: Path) -> None:
    write(DENSE, Layout(), tmp_path)
    folder = tmp_path / "release"
    data = folder / "__0_0.distcp"
    size = data.stat().st_size
    content = data.read_bytes()
    os.truncate(data, size // 2)
    with pytest.raises(ValueError, match=r"__0_0.distcp is truncated"):
        open_dist(tmp_path)
    data.write_bytes(b"\0" * size)
    opened = open_dist(tmp_path)
    with pytest.raises(ValueError, match=r"__0_0.distcp \(bytes \d+ to \d+\) is damaged .*fetch it again"):
        opened.tensors.rows("model.norm.weight", 0, 1)
    data.unlink()
    with pytest.raises(ValueError, match=r"__0_0.distcp is missing"):
        open_dist(tmp_path)
    data.write_bytes(content)
    torch.save({"iteration": 1}, folder / "common.pt")
    with pytest.raises(ValueError, match=r"common.pt does not say how its model is made: it holds no args"):
        open_dist(tmp_path)
    torch.save({"args": Evil(tmp_path / "ran")}, folder / "common.pt")
    with pytest.raises(ValueError, match=r"common.pt holds objects of \S*system"):
        open_dist(tmp_path)
    assert not (tmp_path / "ran").exists()
    (folder / "common.pt").unlink()
    with pytest.raises(ValueError, match=r"neither common.pt nor common_state"):
        open_dist(tmp_path)


def test_a_part_that_is_another_is_told(tmp_path: Path) -> None:
    write(DENSE, Layout(), tmp_path)

    def swap(metadata: Metadata) -> None:
        one, other = (
            next(index for index in metadata.storage_data if index.fqn == name)
            for name in ("decoder.final_layernorm.weight", FC2)
        )
        metadata.storage_data[one] = metadata.storage_data[other]

    edited(tmp_path, swap)
    opened = open_dist(tmp_path)
    with pytest.raises(ValueError, match=r"is not \[64\] of torch.bfloat16, as .metadata says"):
        opened.tensors.rows("model.norm.weight", 0, 1)
