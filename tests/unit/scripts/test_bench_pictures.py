"""The benchmarks with pictures: their samples, the peer's padding and their figures by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from scripts.bench import llava, picture_load, pictures
from scripts.bench.harness import Contender, Record
from scripts.bench.peers.hf_llava import padded
from scripts.bench.picture_load import FEATURES, IMAGE, Sample
from scripts.bench.turns import Schedule, Turn
from scripts.bench.workload import EOS, PAD


def record(name: str, tokens: int, loss: float = 1.0) -> Record:
    """One round of a CPU-second."""
    return Record(Contender(name, "nothing"), [[Turn(0, tokens, 1.0, 1.0, 100.0, loss)]])


def test_equal_samples_are_equally_long_and_have_a_picture_each(tmp_path: Path) -> None:
    samples = picture_load.same_samples(tmp_path)
    assert [len(sample.ids) for sample in samples] == [128] * 8
    assert all(sample.ids.count(IMAGE) == FEATURES == 64 and sample.ids[-1] == EOS for sample in samples)
    assert all(Image.open(tmp_path / name).size == (112, 112) for sample in samples for name in sample.images)


def test_texts_of_mixed_rows_are_the_peers_ids(tmp_path: Path) -> None:
    """Every picture's word stands for its features; a completion ends as Loom ends it."""
    samples = picture_load.mixed_samples(tmp_path, 60, pictures=6)
    picture_load.write_tokenizer(tmp_path / "start")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "start")
    for sample in samples:
        row = picture_load.row_of(sample)
        assert row["prompt"].split().count("<image>") == len(sample.images) == len(row["images"])
        prompt = tokenizer.encode(row["prompt"].replace("<image>", " ".join(["<image>"] * FEATURES)))
        assert prompt == sample.ids[: sample.prompt]
        assert [*tokenizer.encode(row["completion"]), EOS] == sample.ids[sample.prompt :]
        assert len(sample.ids) <= picture_load.LONGEST
    counts = {len(sample.images) for sample in samples}
    assert {0, 1} < counts and max(counts) > 2
    assert max(len(sample.ids) for sample in samples) > 8 * min(len(sample.ids) for sample in samples)


def test_the_peer_pads_to_the_longest_and_looks_at_all_pictures() -> None:
    samples = [Sample([5, IMAGE, 6, EOS], 2, ["a"]), Sample([7, EOS], 1, [])]
    looked: list[list[str]] = []
    batch = padded(samples, lambda names: looked.append(names) or torch.zeros(1))
    assert looked == [["a"]]
    assert batch["input_ids"].tolist() == [[5, IMAGE, 6, EOS], [7, EOS, PAD, PAD]]
    assert batch["labels"].tolist() == [[-100, -100, 6, EOS], [-100, EOS, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert "attention_mask" not in padded(samples[:1], lambda names: torch.zeros(1))
    assert "pixel_values" not in padded(samples[1:], lambda names: torch.zeros(1))


def test_wait_leaves_out_the_warm_up_and_the_first_step_of_a_turn() -> None:
    shares = [0.9, 0.9, 0.8, 0.1, 0.3]  # two steps of warm-up, then a turn of three
    steps = [{"perf/step_time": 1.0 + number, "perf/data_wait": share} for number, share in enumerate(shares)]
    assert pictures.waited(steps, Schedule(2, 1, 3)) == pytest.approx((4 * 0.1 + 5 * 0.3) / 9)


def test_ratios_are_to_the_best_and_losses_to_the_first() -> None:
    records = [record("eight", 100, 2.0), record("four", 150, 2.002), record("two", 120, 1.999)]
    assert pictures.best(records).contender.name == "four"
    assert llava.disagreement(records) == pytest.approx(0.001)
