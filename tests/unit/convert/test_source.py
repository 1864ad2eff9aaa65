"""Each rank's part of every weight, against whole tensors cut by the shard; and how little of a folder it reads."""

import dataclasses
from collections import Counter
from pathlib import Path

import pytest
import torch

from convert import hf_to_mega
from convert.boxes import Columns, Tensors
from convert.from_hf import open_hf, whole_shapes
from convert.opening import open_weights
from convert.source import BLOCK_BYTES, Source
from convert.to_hf import export
from models import Chunk, ModelConfig, Runtime, build
from models.init import InitSource
from parallel.materialise import materialise
from parallel.sharding import SINGLE, WHOLE, Axis, Place, shard_of
from scripts.params import load_model
from tests.unit.convert.test_from_hf import CFG, VARIANTS

CPU = torch.device("cpu")


class Counted:
    """Tensors that count the bytes asked for, by Hugging Face name."""

    def __init__(self, tensors: Tensors) -> None:
        self.tensors, self.bytes, self.largest = tensors, Counter[str](), 0

    @property
    def metas(self):
        return self.tensors.metas

    def rows(self, hf: str, start: int, stop: int, columns: Columns | None = None) -> torch.Tensor:
        found = self.tensors.rows(hf, start, stop, columns)
        self.bytes[hf] += found.nbytes
        self.largest = max(self.largest, found.nbytes)
        return found


def written(folder: Path, cfg: ModelConfig) -> Path:
    source = InitSource(cfg, 0)
    return export(folder, cfg, ((name, source.tensor(name)) for name in whole_shapes(cfg)))


def counted(folder: Path, cfg: ModelConfig) -> tuple[Source, Counted]:
    opened = open_hf(folder)
    tensors = Counted(opened.tensors)
    return Source(dataclasses.replace(opened, tensors=tensors), cfg), tensors


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_every_part_is_the_whole_cut(tmp_path: Path, variant: str, tp: int) -> None:
    """Bit by bit, at every rank of tp x ep: heads that do not divide, shared key/value heads, padded vocabularies."""
    cfg = dataclasses.replace(VARIANTS[variant], vocab_size=37)
    source, whole = Source(open_hf(written(tmp_path / "hf", cfg)), cfg), InitSource(cfg, 0)
    ep = 2 if cfg.moe else 1
    for tp_rank in range(tp):
        for ep_rank in range(ep):
            place = Place(tp=Axis(tp, tp_rank), ep=Axis(ep, ep_rank))
            model = build(cfg, place)
            materialise(model, source, place.cut, CPU)
            for name, param in model.named_parameters():
                assert torch.equal(param, shard_of(param).slice(whole.tensor(name), place.cut)), name
            for name, buffer in model.named_buffers():
                assert torch.equal(buffer, whole.tensor(name)), name


def test_a_rank_of_two_reads_half_of_what_is_cut(tmp_path: Path) -> None:
    """Rows and columns; only norms are read by both. Together the ranks read everything else once."""
    cfg = dataclasses.replace(CFG, family="qwen3", qk_norm=True)
    folder = written(tmp_path / "hf", cfg)
    sizes = {name: meta.shape for name, meta in open_hf(folder).tensors.metas.items()}
    both: Counter[str] = Counter()
    for rank in range(2):
        source, tensors = counted(folder, cfg)
        place = Place(tp=Axis(2, rank))
        materialise(build(cfg, place), source, place.cut, CPU)
        for name, shape in sizes.items():
            assert tensors.bytes[name] == 4 * torch.Size(shape).numel() // (1 if "norm" in name else 2), name
        both += tensors.bytes
    cut = {name: count for name, count in both.items() if "norm" not in name}
    assert cut == {name: 4 * torch.Size(shape).numel() for name, shape in sizes.items() if "norm" not in name}


def test_an_expert_rank_reads_its_experts(tmp_path: Path) -> None:
    cfg = VARIANTS["qwen3_moe"]
    folder = written(tmp_path / "hf", cfg)
    for rank in range(2):
        source, tensors = counted(folder, cfg)
        place = Place(tp=Axis(2, 1), ep=Axis(2, rank))
        materialise(build(cfg, place), source, place.cut, CPU)
        read = {name.split(".experts.")[1][0] for name in tensors.bytes if ".experts." in name}
        assert read == ({"0", "1"}, {"2", "3"})[rank]


def test_a_stage_reads_its_layers(tmp_path: Path) -> None:
    folder = written(tmp_path / "hf", CFG)
    for stage, ends in enumerate(("embed_tokens", "lm_head")):
        source, tensors = counted(folder, CFG)
        chunk = Chunk(stage, stage + 1, stage == 0, stage == 1)
        materialise(build(CFG, SINGLE, Runtime(), chunk), source, WHOLE, CPU)
        layers = {name.split(".")[2] for name in tensors.bytes if ".layers." in name}
        assert layers == {str(stage)}
        assert {name for name in tensors.bytes if ".layers." not in name} <= {f"model.{ends}.weight", f"{ends}.weight",
                                                                              "model.norm.weight"}  # fmt: skip


def test_the_kernel_agrees_about_the_bytes(tmp_path: Path) -> None:
    """/proc/self/io, of one tp rank of two and ep rank of two of a mixture: no more than headers and its own part."""
    cfg = load_model("tiny_mixtral", ["hidden_size=128", "intermediate_size=256", "moe.expert_size=256"])
    folder = written(tmp_path / "hf", cfg)
    place = Place(tp=Axis(2, 1), ep=Axis(2, 1))
    model, opened = build(cfg, place), open_hf(folder)
    source, before = Source(opened, cfg), _bytes_read()
    materialise(model, source, place.cut, CPU)
    read, own = _bytes_read() - before, sum(4 * p.numel() for p in model.parameters())
    total = sum(4 * torch.Size(meta.shape).numel() for meta in opened.tensors.metas.values())
    assert read <= own + 4096 and own < 0.4 * total


@pytest.mark.parametrize("form", ["torch", "safetensors", "torch_dist"])
@pytest.mark.parametrize("variant", ["llama_biases", "qwen2", "mixtral", "deepseek_v3"])
def test_every_part_comes_from_megatrons_files_too(tmp_path: Path, variant: str, form: str) -> None:
    """Written at tp 2 x pp 2 (x ep 2), with a padded vocabulary and a tied copy; taken at tp 1, 2, 4 and ep 1, 2."""
    cfg = dataclasses.replace(VARIANTS[variant], vocab_size=37)
    mega(written(tmp_path / "hf", cfg), tmp_path / "mega", form, tp=2, pp=2, ep=2 if cfg.moe else 1)
    source, whole = Source(open_weights(tmp_path / "mega"), cfg), InitSource(cfg, 0)
    source.check()
    for tp, ep in [(1, 1), (2, 2), (4, 1)]:
        place = Place(tp=Axis(tp, tp - 1), ep=Axis(ep, ep - 1) if cfg.moe else Axis())
        for name, param in build(cfg, place).named_parameters():
            found = source.part(name, shard_of(param), place.cut)
            assert torch.equal(found, shard_of(param).slice(whole.tensor(name), place.cut)), (name, tp, ep)


@pytest.mark.parametrize("form", ["torch", "safetensors"])
@pytest.mark.parametrize("tp", [1, 2])
def test_a_rank_reads_its_own_of_megatrons_files(tmp_path: Path, form: str, tp: int) -> None:
    """Cut alike, and cut anew: then its columns of the rows of a linear layer."""
    cfg = load_model("tiny_mixtral", ["hidden_size=128", "intermediate_size=256", "moe.expert_size=256"])
    mega(written(tmp_path / "hf", cfg), tmp_path / "mega", form, tp=tp, ep=2)
    place = Place(tp=Axis(2, 1), ep=Axis(2, 1))
    model, source = build(cfg, place), Source(open_weights(tmp_path / "mega"), cfg)
    materialise(build(cfg, place), source, place.cut, CPU)  # whatever is found out at the first read is now known
    before = _bytes_read()
    materialise(model, source, place.cut, CPU)
    assert _bytes_read() - before <= sum(4 * p.numel() for p in model.parameters()) + 4096


def mega(hf: Path, out: Path, form: str, **layout: int) -> None:
    words = [word for key, size in layout.items() for word in (f"--{key}", str(size))]
    hf_to_mega.run(["--hf", str(hf), "--out", str(out), "--format", form, *words, "--workers", "1"])


def _bytes_read() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(lines[0].removeprefix("rchar: "))


def test_a_large_tensor_is_read_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert BLOCK_BYTES < 2**30
    monkeypatch.setattr("convert.source.BLOCK_BYTES", 300)
    source, tensors = counted(written(tmp_path / "hf", CFG), CFG)
    assert torch.equal(source.tensor("embed.weight"), InitSource(CFG, 0).tensor("embed.weight"))
    assert tensors.largest == 256 and tensors.bytes["model.embed_tokens.weight"] == 40 * 16 * 4
