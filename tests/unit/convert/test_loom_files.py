"""Checkpoints of runs opened as Hugging Face tensors: pieces of any cut, scattered over any ranks; what is refused."""

import dataclasses
import itertools
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from convert.from_hf import weight_rules, whole_shapes
from convert.loom_files import FORMAT, open_loom
from convert.source import Source
from convert.to_hf import export
from models import ModelConfig, build
from models.init import InitSource
from models.rules import Stack
from parallel.config import ParallelConfig
from parallel.sharding import REPLICATED, Axis, Place, Shard, shard_of
from tests import cases
from tests.unit.convert.test_from_hf import VARIANTS

RANKS = 5


def shards(cfg: ModelConfig) -> dict[str, Shard]:
    model = build(cfg)
    return {name: shard_of(p) for name, p in model.named_parameters()} | {
        name: REPLICATED for name, _ in model.named_buffers()
    }


def write_run(run: Path, cfg: ModelConfig, tp: int = 1, ep: int = 1, step: int = 3, **state: Any) -> Path:
    """A checkpoint of a run: every part in pieces of random lengths, on random ranks, in no order."""
    draw, source, folder = random.Random(f"{tp} {ep}"), InitSource(cfg, step), run / "checkpoints" / f"step_{step:07d}"
    files: list[dict[str, torch.Tensor]] = [{} for _ in range(RANKS)]
    entries: dict[str, Any] = {}
    for name, shard in shards(cfg).items():
        whole, pieces = source.tensor(name), []
        for index, cut in enumerate(shard.cuts(tp, ep)):
            flat = shard.slice(whole, cut).flatten()
            borders = sorted({0, len(flat), *(draw.randrange(len(flat)) for _ in range(3))})
            for start, stop in itertools.pairwise(borders):
                rank = draw.randrange(RANKS)
                files[rank][f"param/{name}@{index}:{start}"] = flat[start:stop].clone()
                pieces.append([rank, index, start, stop - start])
        draw.shuffle(pieces)
        about = {"shape": list(whole.shape), "shard": dataclasses.asdict(shard), "tp": tp, "ep": ep}
        entries[name] = about | {"pieces": pieces}
    folder.mkdir(parents=True)
    for rank, tensors in enumerate(files):
        save_file(tensors | {"rng": torch.zeros(4, dtype=torch.uint8)}, folder / f"rank_{rank:05d}.safetensors")
    whole_state = {"format": FORMAT, "step": step, "model": dataclasses.asdict(cfg), "tensors": entries} | state
    (folder / "state.json").write_text(json.dumps(whole_state))
    return folder


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_every_tensor_of_every_layout_comes_out(tmp_path: Path, variant: str, tp: int) -> None:
    """Key/value heads on several ranks, a padded vocabulary, experts dealt out; each by its rule's own split."""
    cfg = dataclasses.replace(VARIANTS[variant], vocab_size=37)
    folder = write_run(tmp_path / "run", cfg, tp, 2 if cfg.moe else 1)
    opened, source, rules = open_loom(tmp_path / "run"), InitSource(cfg, 3), weight_rules(cfg)[0]
    assert (opened.path, opened.cfg, opened.format) == (folder, cfg, "loom")
    expected = {hf: t for name in whole_shapes(cfg) for hf, t in rules[name].to_hf(source.tensor(name)).items()}
    assert set(opened.tensors.metas) == set(expected)
    for hf, tensor in expected.items():
        meta = opened.tensors.metas[hf]
        assert (meta.dtype, meta.shape) == (torch.float32, tuple(tensor.shape))
        rows = tensor if tensor.ndim == 1 else tensor.view(-1, tensor.shape[-1])
        assert torch.equal(opened.tensors.rows(hf, 0, len(rows)), rows), hf
        assert torch.equal(opened.tensors.rows(hf, len(rows) // 3, len(rows)), rows[len(rows) // 3 :]), hf
    place = Place(tp=Axis(2, 1))
    part = Source(opened, cfg)
    for name, param in build(cfg, place).named_parameters():
        assert torch.equal(part.part(name, shard_of(param), place.cut),
                           shard_of(param).slice(source.tensor(name), place.cut)), name  # fmt: skip


LAYOUTS = {
    "ZeRO-3": (3, ParallelConfig(), "llama"),
    "tensor parallel": (1, ParallelConfig(tp=2), "tied"),
    "pipeline": (1, ParallelConfig(pp=2), "tied"),
    "experts": (2, ParallelConfig(ep=2), "qwen3_moe"),
}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_what_a_run_saved_is_what_it_trained(pool, tmp_path: Path, kind: str) -> None:
    zero, layout, name = LAYOUTS[kind]
    cfg = dataclasses.replace(cases.TINY, tied_embeddings=name == "tied")
    if name == "qwen3_moe":
        cfg = dataclasses.replace(VARIANTS[name], vocab_size=97, max_seq_len=128)
    trained = pool(2).run(cases.train, zero, 2, steps=1, layout=layout, model=cfg, save_to=str(tmp_path))[0]
    state = tmp_path / "step_0000001" / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"model": dataclasses.asdict(cfg)}))
    found = dict(Source(open_loom(tmp_path), cfg).weights())
    assert found.keys() == trained["weights"].keys()
    for name, tensor in found.items():
        assert torch.equal(tensor.flatten(), trained["weights"][name]), name
    fresh = InitSource(cfg, 3)
    assert sum(torch.equal(tensor, fresh.tensor(name)) for name, tensor in found.items()) == 0, "nothing was trained"


def test_the_latest_complete_checkpoint_of_a_run_is_taken(tmp_path: Path) -> None:
    cfg = VARIANTS["llama"]
    older, newer = write_run(tmp_path, cfg, step=3), write_run(tmp_path, cfg, 2, step=20)
    (tmp_path / "checkpoints" / "step_0000030").mkdir()
    for path, found in [(tmp_path, newer), (tmp_path / "checkpoints", newer), (older, older), (newer, newer)]:
        opened = open_loom(path)
        assert opened.path == found
        step = 3 if found == older else 20
        assert torch.equal(Source(opened, cfg).tensor("norm.weight"), InitSource(cfg, step).tensor("norm.weight"))
        embed = Source(opened, cfg).tensor("embed.weight")
        assert torch.equal(embed, InitSource(cfg, step).tensor("embed.weight"))
    (tmp_path / "checkpoints" / "latest").write_text("step_0000003\n")
    assert open_loom(tmp_path).path == older


def test_one_expert_is_read_alone(tmp_path: Path) -> None:
    """The bytes the kernel counts are those of the expert: never the stack, never another rank's part."""
    cfg = dataclasses.replace(VARIANTS["mixtral"], hidden_size=64, intermediate_size=96)
    assert cfg.moe is not None
    cfg = dataclasses.replace(cfg, moe=dataclasses.replace(cfg.moe, expert_size=96))
    write_run(tmp_path, cfg, 2, 2)
    tensors, rule = open_loom(tmp_path).tensors, weight_rules(cfg)[0]["layers.1.mlp.experts.gate_up"]
    assert isinstance(rule, Stack)
    for hf in tensors.metas:  # every file's header is read now
        tensors.rows(hf, 0, min(tensors.metas[hf].shape[0], 96))
    for names in rule.hf:
        for hf in names:
            before = _bytes_read()
            tensors.rows(hf, 0, 96)
            assert 96 * 64 * 4 <= _bytes_read() - before <= 96 * 64 * 4 + 4096


def _bytes_read() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(lines[0].removeprefix("rchar: "))


def test_the_tokenizer_and_the_template_are_found_where_the_run_says(tmp_path: Path) -> None:
    (tmp_path / "tok").mkdir()
    cfg = VARIANTS["llama"]
    said: dict[str, Any] = {"tokenizer": str(tmp_path / "tok"), "chat_template": str(tmp_path / "own.jinja")}
    opened = open_loom(write_run(tmp_path / "a", cfg, **said))
    assert (opened.files, opened.chat_template) == (tmp_path / "tok", tmp_path / "own.jinja")
    gone = open_loom(write_run(tmp_path / "b", cfg, tokenizer=str(tmp_path / "gone"), chat_template=None))
    assert (gone.files, gone.chat_template) == (None, None)


def test_an_export_of_the_opened_run_is_the_model(tmp_path: Path) -> None:
    cfg = VARIANTS["deepseek_v3"]
    opened = open_loom(write_run(tmp_path / "run", cfg, 2, 2).parent)
    source = InitSource(cfg, 3)
    one = export(tmp_path / "opened", cfg, opened.tensors, dtype=torch.bfloat16, shard_bytes=2000)
    other = ((name, source.tensor(name)) for name in whole_shapes(cfg))
    two = export(tmp_path / "whole", cfg, other, dtype=torch.bfloat16, shard_bytes=2000)
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in two.iterdir()) and len(names) > 5
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in names)


# ---- what is refused -------------------------------------------------------------------------------------------------


def changed(folder: Path, **new: Any) -> Path:
    file = folder / "state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | new))
    return folder


def test_a_folder_without_a_checkpoint_is_told(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step_0000001.building").mkdir(parents=True)
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=r"holds no complete checkpoint\. Name a run folder"):
            open_loom(path)


def test_another_versions_checkpoint_is_told(tmp_path: Path) -> None:
    cfg = VARIANTS["llama"]
    model = dataclasses.asdict(cfg)
    for number, (wrong, why) in enumerate(
        [
            ({"model": model | {"heads": 3}}, "heads"),
            ({"model": {"family": "llama"}}, "vocab_size"),
            ({"model": model | {"rope": {"base": 1}}}, "base"),
            ({"model": model | {"num_layers": 3}}, r"6 tensors are missing.*layers\.2\.attn_norm\.weight"),
            ({"model": model | {"intermediate_size": 25}}, r"4 tensors.*layers\.0\.mlp\.gate_up\.weight"),
            ({"format": 99}, "format 99"),
        ]
    ):
        with pytest.raises(ValueError, match=f"(?s)written by another version of Loom.*{why}|{why}.*reads {FORMAT}"):
            open_loom(changed(write_run(tmp_path / str(number), cfg), **wrong))


def test_a_cut_or_lost_rank_file_is_told(tmp_path: Path) -> None:
    cfg = VARIANTS["llama"]
    folder = write_run(tmp_path, cfg)
    file = folder / "rank_00002.safetensors"
    os.truncate(file, file.stat().st_size - 4)
    opened = open_loom(folder)
    with pytest.raises(ValueError, match=rf"cannot read {file}: .*truncated"):
        dict(Source(opened, cfg).weights())
    file.unlink()
    with pytest.raises(ValueError, match=r"is not whole: rank_00002\.safetensors missing"):
        open_loom(folder)


def test_elements_that_no_piece_holds_are_not_made_up(tmp_path: Path) -> None:
    cfg = VARIANTS["llama"]
    folder = write_run(tmp_path, cfg)
    tensors = json.loads((folder / "state.json").read_text())["tensors"]
    lost = tensors["embed.weight"]["pieces"].pop()
    opened = open_loom(changed(folder, tensors=tensors))
    with pytest.raises(ValueError, match=rf"names no piece for {lost[3]} elements of embed\.weight"):
        Source(opened, cfg).tensor("embed.weight")
