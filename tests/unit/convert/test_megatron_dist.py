"""`torch_dist` checkpoints: what is written is what torch.distributed.checkpoint reads; what it writes is read."""

from __future__ import annotations

import argparse
import dataclasses
import io
import itertools
import pickle
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from convert.boxes import Meta
from convert.from_hf import hf_shapes
from convert.megatron.args import to_args
from convert.megatron.dist import begin_dist, open_dist
from convert.megatron.dist_writing import frame
from convert.megatron.layout import Layout
from scripts.params import load_model
from tests.dist_files import DENSE, MIXED, SPARSE, assert_same, edited, write
from tests.megatron_shards import put_together


def read_by_torch(root: Path) -> dict[str, Any]:
    """Every tensor and object as torch's own reader gives it."""
    metadata = dcp.FileSystemReader(root / "release").read_metadata()
    state: dict[str, Any] = {
        name: torch.full(entry.size, -7, dtype=entry.properties.dtype)
        if isinstance(entry, TensorStorageMetadata)
        else io.BytesIO()
        for name, entry in metadata.state_dict_metadata.items()
    }
    dcp.load(state, checkpoint_id=root / "release", no_dist=True)
    return state


@pytest.mark.parametrize("kept", [{"attention_out_bias": True, "qkv_bias": True}, {"mlp_bias": True}])
def test_biases_the_model_lacks_are_zeros_and_must_be(tmp_path: Path, kept: dict[str, bool]) -> None:
    cfg = dataclasses.replace(load_model("tiny_llama", []), **kept)
    hf = write(cfg, Layout(tp=2), tmp_path).tensors
    state = read_by_torch(tmp_path)
    lacking = "self_attention" if "mlp_bias" in kept else "mlp"
    for name in ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2"):
        bias = state[f"decoder.layers.{name}.bias"]
        assert bias.shape == state[f"decoder.layers.{name}.weight"].shape[:2]
        assert bias.any() == (not name.startswith(lacking)), name
    opened = open_dist(tmp_path)
    assert opened.cfg == cfg
    assert_same(put_together(opened.tensors), hf)


def test_a_bias_the_model_lacks_and_the_checkpoint_has_is_refused(tmp_path: Path) -> None:
    write(dataclasses.replace(load_model("tiny_llama", []), attention_out_bias=True, qkv_bias=True), Layout(), tmp_path)

    def swap(metadata: Metadata) -> None:
        bias, norm = (
            next(i for i in metadata.storage_data if i.fqn == f"decoder.layers.{name}")
            for name in ("mlp.linear_fc2.bias", "self_attention.linear_qkv.layer_norm_weight")
        )
        metadata.storage_data[bias] = metadata.storage_data[norm]

    edited(tmp_path, swap)
    with pytest.raises(ValueError, match=r"mlp.linear_fc2.bias .* is not zero"):
        open_dist(tmp_path)


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2, vocab_multiple=16), Layout(tp=4, pp=3)], ids=str)
def test_torch_reads_the_global_tensors(tmp_path: Path, layout: Layout) -> None:
    hf = write(DENSE, layout, tmp_path).tensors
    state = read_by_torch(tmp_path)
    layers = [f"model.layers.{i}." for i in range(3)]
    heads, groups, size = DENSE.num_heads, DENSE.num_kv_heads, DENSE.head_dim
    for kind in ("weight", "bias"):
        found = state[f"decoder.layers.self_attention.linear_qkv.{kind}"]
        for stored, layer in zip(found, layers, strict=True):
            grouped = stored.unflatten(0, (groups, heads // groups + 2, size))
            q, k, v = grouped[:, :-2].flatten(0, 2), grouped[:, -2].flatten(0, 1), grouped[:, -1].flatten(0, 1)
            for found_part, letter in ((q, "q"), (k, "k"), (v, "v")):
                assert torch.equal(found_part, hf[f"{layer}self_attn.{letter}_proj.{kind}"])
    fc1 = torch.stack([torch.cat([hf[f"{at}mlp.gate_proj.weight"], hf[f"{at}mlp.up_proj.weight"]]) for at in layers])
    assert torch.equal(state["decoder.layers.mlp.linear_fc1.weight"], fc1)
    for name, theirs in {
        "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
        "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
        "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
        "mlp.linear_fc2.weight": "mlp.down_proj.weight",
    }.items():
        assert torch.equal(state[f"decoder.layers.{name}"], torch.stack([hf[at + theirs] for at in layers])), name
    padded = layout.padded_vocab(70)
    for name, theirs in (("embedding.word_embeddings", "model.embed_tokens"), ("output_layer", "lm_head")):
        found = state[f"{name}.weight"]
        assert found.shape[0] == padded > 70
        assert torch.equal(found[:70], hf[f"{theirs}.weight"]) and not found[70:].any()
    assert torch.equal(state["decoder.final_layernorm.weight"], hf["model.norm.weight"])
    assert sum(isinstance(value, torch.Tensor) for value in state.values()) == 10


def test_experts_are_stacked_behind_layers_that_are_all_alike(tmp_path: Path) -> None:
    hf = write(SPARSE, Layout(tp=2), tmp_path).tensors
    state = read_by_torch(tmp_path)
    assert SPARSE.moe is not None
    fc1, fc2 = (state[f"decoder.layers.mlp.experts.experts.linear_fc{n}.weight"] for n in (1, 2))
    assert fc1.shape[:2] == fc2.shape[:2] == (2, SPARSE.moe.num_experts)
    for layer, expert in ((0, 0), (1, 2)):
        at = f"model.layers.{layer}.block_sparse_moe.experts.{expert}."
        assert torch.equal(fc1[layer, expert], torch.cat([hf[f"{at}w1.weight"], hf[f"{at}w3.weight"]]))
        assert torch.equal(fc2[layer, expert], hf[f"{at}w2.weight"])
    assert "decoder.layers.pre_mlp_layernorm.weight" in state  # as Transformer Engine calls it


def test_layers_that_differ_have_names_of_their_own(tmp_path: Path) -> None:
    hf = write(MIXED, Layout(pp=3), tmp_path).tensors
    state = read_by_torch(tmp_path)
    assert MIXED.moe is not None and MIXED.moe.first_dense == 1
    assert torch.equal(state["decoder.layers.0.mlp.linear_fc2.weight"], hf["model.layers.0.mlp.down_proj.weight"])
    fc2 = state["decoder.layers.2.mlp.experts.experts.linear_fc2.weight"]
    assert torch.equal(fc2[1], hf["model.layers.2.mlp.experts.1.down_proj.weight"])
    bias = state["decoder.layers.1.mlp.router.expert_bias"]
    assert bias.dtype == torch.float32
    assert torch.equal(bias, hf["model.layers.1.mlp.gate.e_score_correction_bias"])
    norm = state["decoder.layers.0.self_attention.linear_kv_up_proj.layer_norm_weight"]
    assert torch.equal(norm, hf["model.layers.0.self_attn.kv_a_layernorm.weight"])


def test_torch_converts_it_to_one_file(tmp_path: Path) -> None:
    hf = write(DENSE, Layout(tp=2), tmp_path).tensors
    dcp_to_torch_save(tmp_path / "release", tmp_path / "one.pt")
    found = torch.load(tmp_path / "one.pt", weights_only=True)
    assert torch.equal(found["decoder.final_layernorm.weight"], hf["model.norm.weight"])


def test_each_part_is_what_torch_save_writes(tmp_path: Path) -> None:
    values = torch.arange(15, dtype=torch.bfloat16).view(1, 3, 5)
    head, tail = frame(torch.bfloat16, (1, 3, 5))
    found = torch.load(io.BytesIO(head + values.view(torch.uint8).numpy().tobytes() + tail), weights_only=True)
    assert torch.equal(found, values) and found.dtype == values.dtype
    for shape in ((1,), (2**34,)):  # more than 4 GiB, which a zip writes in another way
        head, tail = frame(torch.float32, shape)
        assert len(head) + len(tail) < 3000


def test_a_begun_checkpoint_takes_no_space(tmp_path: Path) -> None:
    cfg = load_model("llama3_70b", [])
    metas = {name: Meta(torch.bfloat16, shape) for name, shape in hf_shapes(cfg).items()}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin_dist(tmp_path, cfg, Layout(tp=2), metas, to_args(cfg, Layout(tp=2), torch.bfloat16))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024  # KiB
    files = [file.stat() for file in (tmp_path / "release").glob("*.distcp")]
    assert sum(stat.st_size for stat in files) > 140e9 and max(stat.st_size for stat in files) < 8e9
    assert sum(stat.st_blocks * 512 for stat in files) < 20e6
    assert open_dist(tmp_path).cfg == cfg


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_the_same_bytes_come_back(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    cfg = data.draw(st.sampled_from([DENSE, SPARSE, MIXED]))
    tp = data.draw(st.sampled_from([1, 2, 4]))
    layout = Layout(
        tp=tp,
        ep=data.draw(st.sampled_from([1, 2])) if cfg.moe else 1,
        implementation=data.draw(st.sampled_from(["local", "transformer_engine"])),
        experts=data.draw(st.sampled_from(["grouped", "sequential"])),
        vocab_multiple=data.draw(st.integers(1, 40)),
    )
    root = tmp_path_factory.mktemp("dist")
    source = write(cfg, layout, root)
    opened = open_dist(root)
    assert opened.format == "torch_dist" and opened.cfg == cfg and opened.files is None
    assert opened.layout is not None
    assert (opened.layout.tp, opened.layout.ep, opened.layout.implementation) == (tp, layout.ep, layout.implementation)
    assert opened.layout.padded_vocab(70) == layout.padded_vocab(70)
    assert_same(put_together(opened.tensors), source.tensors)


@settings(max_examples=20, deadline=None, phases=(Phase.explicit, Phase.generate))
@given(data=st.data())
def test_parts_may_be_cut_in_any_way(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Written by hand: every tensor is cut at random places along every dim, also across layers and experts."""
    cfg = data.draw(st.sampled_from([DENSE, SPARSE]))
    root = tmp_path_factory.mktemp("dist")
    source = write(cfg, Layout(), root)
    folder = root / "release"
    tensors = {name: value for name, value in read_by_torch(root).items() if isinstance(value, torch.Tensor)}
    metadata = Metadata({}, None, {})
    with (folder / "__3_1.distcp").open("wb") as file:
        for name, tensor in tensors.items():
            cuts = [data.draw(st.sets(st.integers(1, n - 1), max_size=2)) if n > 1 else set() for n in tensor.shape]
            chunks = []
            for block, offsets in blocks(tensor, [sorted(each) for each in cuts]):
                start = file.tell()
                turned = block.dim() == 3 and block.shape[0] == 1 and min(block.shape[1:]) > 1
                if turned and data.draw(st.booleans()):
                    block = block.transpose(1, 2).contiguous().transpose(1, 2)
                torch.save(block.clone(), file)
                metadata.storage_data[MetadataIndex(name, offsets)] = _StorageInfo(  # pyright: ignore
                    "__3_1.distcp", start, file.tell() - start
                )
                chunks.append(ChunkStorageMetadata(torch.Size(offsets), block.shape))
            properties = TensorProperties(tensor.dtype)
            metadata.state_dict_metadata[name] = TensorStorageMetadata(properties, tensor.shape, chunks)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    (folder / "__0_0.distcp").unlink()
    assert_same(put_together(open_dist(root).tensors), source.tensors)


def blocks(tensor: torch.Tensor, cuts: list[list[int]]) -> list[tuple[torch.Tensor, tuple[int, ...]]]:
    found: list[tuple[torch.Tensor, tuple[int, ...]]] = [(tensor, ())]
    for dim, places in enumerate(cuts):
        edges = [0, *places, tensor.shape[dim]]
        found = [
            (block.narrow(dim, a, b - a), (*offsets, a))
            for block, offsets in found
            for a, b in itertools.pairwise(edges)
        ]
    return found


def with_objects(metadata: Metadata) -> None:
    """Notes, objects and optimizer states of a real run."""
    metadata.all_local_plans = [torch.distributed.checkpoint.SavePlan([])]  # pyright: ignore
    metadata.mcore_data = {"a": slice(1, 2)}  # pyright: ignore
    name = "decoder.final_layernorm.weight"
    moment = f"optimizer.state.exp_avg.{name}"
    index = next(index for index in metadata.storage_data if index.fqn == name)
    metadata.state_dict_metadata[moment] = metadata.state_dict_metadata[name]
    metadata.storage_data[MetadataIndex(moment, index.offset)] = metadata.storage_data[index]
    metadata.state_dict_metadata["rng_state/shard_0_1"] = BytesStorageMetadata()
    metadata.storage_data[MetadataIndex("rng_state/shard_0_1")] = metadata.storage_data[index]


def test_what_a_run_adds_is_left_alone(tmp_path: Path) -> None:
    source = write(DENSE, Layout(), tmp_path)
    edited(tmp_path, with_objects)
    assert_same(put_together(open_dist(tmp_path / "release").tensors), source.tensors)


def test_args_may_lie_among_the_tensors(tmp_path: Path) -> None:
    """As newer versions of Megatron write them."""
    source = write(DENSE, Layout(tp=2), tmp_path)
    folder = tmp_path / "release"
    with torch.serialization.safe_globals([argparse.Namespace]):
        common = torch.load(folder / "common.pt", weights_only=True)
    (folder / "common.pt").unlink()
    torch.save([common], folder / "__1_0.distcp")

    def add(metadata: Metadata) -> None:
        size = (folder / "__1_0.distcp").stat().st_size
        metadata.state_dict_metadata["common_state/shard_0_1"] = BytesStorageMetadata()
        metadata.storage_data[MetadataIndex("common_state/shard_0_1")] = _StorageInfo("__1_0.distcp", 0, size)

    edited(tmp_path, add)
    opened = open_dist(tmp_path)
    assert opened.cfg == DENSE and opened.layout is not None and opened.layout.tp == 2
    assert_same(put_together(opened.tensors), source.tensors)
    (folder / "__1_0.distcp").write_bytes(b"x" * (folder / "__1_0.distcp").stat().st_size)
    with pytest.raises(ValueError, match=r"__1_0.distcp .*fetch it again"):
        open_dist(tmp_path)
