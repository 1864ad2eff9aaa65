"""The benchmark of generation: its prompts, its peer's padding, its ratios and its floor by hand."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch

from models import ModelConfig
from scripts.bench import generation, generation_growth
from scripts.bench.generation_growth import Floor, Machine, Point
from scripts.bench.generation_work import Work, kept, lengths, prompts_of, texts_of
from scripts.bench.harness import Contender, Record
from scripts.bench.peers.hf_generate import left_padded
from scripts.bench.turns import Turn


class Letters:
    """A token a character."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]


def test_prompts_are_of_all_lengths_and_always_the_same() -> None:
    found = lengths(2000, 0)
    assert (min(found), max(found)) == (16, 512)
    # Even over the logarithm: as many below 91 = sqrt(16 x 512) as above, within 4 standard errors of 2000 draws.
    assert abs(sum(length < 91 for length in found) - 1000) < 4 * 0.5 * 2000**0.5
    texts = ["one text", "another", "and a third one, which is longer"]
    made = prompts_of(texts, Letters(), 20, 3)
    assert [len(prompt) for prompt in made] == lengths(20, 3)
    assert made == prompts_of(texts, Letters(), 20, 3) != prompts_of(texts, Letters(), 20, 4)
    assert all("".join(map(chr, prompt)) in "\n".join([*texts * 60]) for prompt in made)


def test_texts_mix_the_channels(tmp_path: Path) -> None:
    for name in ("reference", "dialogue", "code", "maths"):
        line = {"messages": [{"role": "user", "content": name}, {"role": "assistant", "content": "yes"}]}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(line) + "\n")
    assert texts_of(tmp_path) == ["reference\nyes", "dialogue\nyes", "code\nyes", "maths\nyes"]
    (tmp_path / "code.jsonl").unlink()
    with pytest.raises(RuntimeError, match="prepare_quickstart"):
        texts_of(tmp_path)


def test_work_and_new_tokens_travel_through_the_folder(tmp_path: Path) -> None:
    work = Work([[1, 2], [3]], 2, 5, (7,))
    work.write(tmp_path)
    read = Work.read(argparse.Namespace(data=str(tmp_path)))
    assert (read.prompts, read.samples, read.new_tokens, read.stop_tokens) == ([[1, 2], [3]], 2, 5, (7,))
    read.keep("hf 16", [[1], [2, 3]])
    read.keep("loom 64", [[1], [2, 4]])
    assert kept(tmp_path, "hf 16") == [[1], [2, 3]]
    assert generation.alike(tmp_path, "loom 64", "hf 16") == "1/2"


def test_padding_is_on_the_left() -> None:
    ids, mask = left_padded([[5, 6, 7], [8]], 0)
    assert torch.equal(ids, torch.tensor([[5, 6, 7], [0, 0, 8]]))
    assert torch.equal(mask, torch.tensor([[1, 1, 1], [0, 0, 1]]))


def test_ratios_are_to_the_best_batch_size_of_the_peer() -> None:
    def record(name: str, module: str, wall_s: float, cpu_s: float) -> Record:
        return Record(Contender(name, module), [[Turn(0, 120, cpu_s, wall_s, 9.0, 0.0)]])

    records = [
        record("hf 16", generation.HF, 6.0, 10.0),
        record("hf 32", generation.HF, 4.0, 8.0),
        record("loom 64", generation.LOOM, 1.0, 2.0),
    ]
    rows = [line.split() for line in generation.table(records, ["", "2/2", "1/2"]).splitlines()]
    assert rows[1][2:] == ["120", "20", "0.67", "12", "0.80", "9"]
    assert rows[3][2:] == ["120", "120", "4.00", "60", "4.00", "9", "1/2"]


def test_the_floor_by_hand() -> None:
    cfg = ModelConfig("llama", 100, 8, 16, 2, 4, 2, 2, 64)
    # A layer: q 8x8, k and v 4x8 each, out 8x8, gate, up and down 16x8 each: 64 + 64 + 64 + 384 = 576; head 100x8.
    weights = 2 * 576 + 800
    floor = Floor.of(cfg, [10, 20])
    assert floor.weight_bytes == 4 * weights
    assert floor.cache_bytes == 4 * 2 * 30 * 8  # fp32, layers, tokens, keys and values of 2 heads of 2
    assert floor.flops == 2 * 2 * weights + 2 * 30 * 2 * 2 * 8  # every cached token: score and value of 8 columns
    assert floor.seconds(Machine(1e3, 1e9)) == pytest.approx(floor.flops / 1e3, rel=1e-3)
    assert floor.seconds(Machine(1e12, 1e3)) == pytest.approx((floor.weight_bytes + floor.cache_bytes) / 1e3)


def test_growth_tells_what_a_cached_token_adds(tmp_path: Path) -> None:
    points = [Point("a", 100, 10.0, 20.0, 5.0), Point("b", 600, 15.0, 30.0, 6.0), Point("c", 100, 10.0, 20.0, 5.0)]
    rows = [line.split() for line in generation_growth.table(points).splitlines()[2:]]
    assert rows == [["a", "100", "10.0", "20.0", "5.0"], ["b", "600", "15.0", "30.0", "6.0", "20.00"],
                    ["c", "100", "10.0", "20.0", "5.0"]]  # fmt: skip
    generation_growth.plot(points, tmp_path / "new" / "growth.png")
    assert (tmp_path / "new" / "growth.png").read_bytes().startswith(b"\x89PNG")
